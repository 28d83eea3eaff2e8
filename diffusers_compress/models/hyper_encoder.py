"""The vector-quantized sketch of a latent that PerCo sends: hyper-encoder and codebook.

Careil et al., Towards image compression with perfect realism at ultra-low bitrates (ICLR 2024); layers after the public
re-implementation, PerCo (SD) (Koerber et al. 2024), whose weights `examples/convert_perco.py` brings here. Codebook after van den Oord
et al. 2017 (straight-through gradient), in few dimensions after Yu et al. 2022 (improved VQGAN).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_compress._diffusers import ModelMixin
from diffusers_compress.coding.grid_model import Codebook
from diffusers_compress.weights import stored

STRIDES = (1, 2, 4, 8)
DISTANCES = ("euclidean", "cosine")
COMMITMENT = 0.25  # van den Oord et al. 2017, beta in eq. 3
USAGE_DECAY = 0.97
SEARCH_ROUNDS = 4  # of all cells; later ones change next to nothing
DEAD = 0.03  # of a code's fair share: those used less are revived


@dataclass
class HyperEncoderOutput(BaseOutput):
    """`indices` [B, a, b] int64; `z_hat` [B, M, a, b], what stands for them; `loss`: of codebook and commitment, a scalar;
    `estimate` [B, C, h, w] of the latent, or None."""

    indices: Tensor
    z_hat: Tensor
    loss: Tensor
    estimate: Tensor | None = None


class HyperEncoder(ModelMixin, ConfigMixin):
    """Component "hyper_encoder" of `PerCoPipeline`: a latent to a grid of codebook indices, and these to features for the UNet.

    Args:
        latent_channels: C of the latents.
        stride: latent positions along a side of a cell; 1, 2, 4 or 8.
        codebook_size: K.
        width: channels of the hidden layers.
        out_channels: M, of the features.
        codebook_dim: D, of the codes.
        distance: "euclidean" or "cosine": what the nearest code is.
        estimates_latent: whether the UNet also sees an estimate of the latent, linear in z_hat of a cell and its neighbours. Not in
            the paper; a `WienerUNet` takes it as the mean of x_0.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        stride: int = 8,
        codebook_size: int = 256,
        width: int = 192,
        out_channels: int = 320,
        codebook_dim: int = 32,
        distance: str = "euclidean",
        estimates_latent: bool = False,
    ):
        super().__init__()
        if stride not in STRIDES or distance not in DISTANCES:
            raise ValueError(f"stride must be one of {STRIDES}, distance one of {DISTANCES}; not {stride} and {distance!r}")
        self.backbone = nn.Sequential(
            scaling(latent_channels, width, stride >= 8),
            *(Bottleneck(width) for _ in range(3)),
            scaling(width, width, stride >= 4),
            *(Bottleneck(width) for _ in range(3)),
            Gate(width),
            scaling(width, width, stride >= 2),
            *(Bottleneck(width) for _ in range(3)),
            scaling(width, out_channels, False),
            Gate(out_channels),
        )
        self.project_in = nn.Linear(out_channels, codebook_dim)
        self.codebook = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.project_out = nn.Linear(codebook_dim, out_channels)
        if estimates_latent:
            self.to_latent = nn.Sequential(
                nn.Conv2d(out_channels, latent_channels * stride**2, 3, padding=1, padding_mode="replicate"),
                nn.PixelShuffle(stride),
            )
        # Use of each code relative to its fair share, over the last thirty training batches; at first none is in use
        self.register_buffer("usage", torch.zeros(codebook_size))
        # What the probability model of the indices follows from: integers up to 255, which no floating-point type rounds (see `settle`)
        self.register_buffer("frequency", torch.ones(codebook_size))
        self.register_buffer("places", torch.zeros(codebook_size, codebook_dim))

    def grid_shape(self, h: int, w: int) -> tuple[int, int]:
        """[a, b] of the grid over a latent [h, w]."""
        return -(-h // self.config.stride), -(-w // self.config.stride)

    def analyse(self, x_0: Tensor) -> Tensor:
        """Latents [B, C, h, w] to points [B, a, b, D] in float32, near which codes are sought."""
        stride = self.config.stride
        h, w = x_0.shape[-2:]
        x_0 = F.pad(x_0, (0, -w % stride, 0, -h % stride), mode="replicate")
        return self.unit(self.project_in(self.backbone(x_0.to(self.dtype)).movedim(1, -1)).float())

    def unit(self, points: Tensor) -> Tensor:
        return F.normalize(points, dim=-1) if self.config.distance == "cosine" else points

    def codes(self) -> Tensor:
        """[K, D] in float32."""
        return self.unit(self.codebook.float())

    def nearest(self, points: Tensor) -> Tensor:
        """Indices [B, a, b] of the codes nearest to points [B, a, b, D]."""
        codes = self.codes()
        return (codes.square().sum(-1) - 2 * points @ codes.T).argmin(-1)

    def forward(self, x_0: Tensor, searched: bool = False) -> HyperEncoderOutput:
        """Latents [B, C, h, w]; the gradient goes straight through to the backbone. In training, codes out of use are revived.

        `searched`: indices are those that `encode` finds for an estimate. Then the codes learn from what is made of them, as in least
        squares, and the backbone learns to guess them.
        """
        points = self.analyse(x_0)
        indices = self.nearest(points)
        if searched:
            indices = self.search(x_0, indices)
            codes = self.codes()[indices]
            loss, given = COMMITMENT * (points - codes.detach()).square().mean(), codes
        else:
            if self.training:
                self.count(indices, points)
                indices = self.nearest(points)
            codes = self.codes()[indices]
            # van den Oord et al. 2017, eq. 3
            loss = (points.detach() - codes).square().mean() + COMMITMENT * (points - codes.detach()).square().mean()
            given = points + (codes - points).detach()
        z_hat = self.features(given)
        estimate = self.estimate(z_hat, *x_0.shape[-2:]) if self.config.estimates_latent else None
        return HyperEncoderOutput(indices=indices, z_hat=z_hat, loss=loss, estimate=estimate)

    def features(self, codes: Tensor) -> Tensor:
        """[B, a, b, D] -> z_hat [B, M, a, b]."""
        return self.project_out(codes.to(self.dtype)).movedim(-1, 1)

    def estimate(self, z_hat: Tensor, h: int, w: int) -> Tensor:
        """[B, M, a, b] -> an estimate of the latent [B, C, h, w]."""
        return self.to_latent(z_hat)[..., :h, :w]

    @property
    def extra_channels(self) -> int:
        """How many channels the UNet sees beside x_t."""
        return self.config.out_channels + self.config.estimates_latent * self.config.latent_channels

    @apply_forward_hook
    def encode(self, x_0: Tensor) -> Tensor:
        """Latents [B, C, h, w] to indices [B, a, b]: of the nearest codes, or of those that give a better estimate, if there is one."""
        indices = self.nearest(self.analyse(x_0))
        return self.search(x_0, indices) if self.config.estimates_latent else indices

    @torch.no_grad()
    def search(self, x_0: Tensor, indices: Tensor) -> Tensor:
        """Indices [B, a, b] whose estimate is nearer to latents [B, C, h, w] than that of given ones, as far as it is worth its bits.
        The sender's alone.

        The estimate is linear in the codes of a cell and its eight neighbours, so the error of each code of a cell among given
        neighbours is known in closed form. Cells take turns, those at once that share no neighbour: iterated conditional modes (Besag
        1986). A code costs what its number in the picture says (entropy-constrained vector quantization, Chou et al. 1989).
        """
        stride, codes = self.config.stride, self.codes()
        h, w = x_0.shape[-2:]
        target = F.pixel_unshuffle(F.pad(x_0.float(), (0, -w % stride, 0, -h % stride), mode="replicate"), stride)
        (weight, bias), (out_weight, out_bias) = (
            [parameter.float() for parameter in layer.parameters()] for layer in (self.to_latent, self.project_out)
        )
        kernel = torch.einsum("omij,md->odij", weight, out_weight)
        bias = bias + weight.sum((2, 3)) @ out_bias
        # |r - K (code - current)|^2 = code' G code - 2 code' (K' r + G current) + what no code changes, with G = K' K
        gram = torch.einsum("odij,oeij->de", kernel, kernel)
        energy = torch.einsum("kd,de,ke->k", codes, gram, codes)
        indices = indices.clone()
        for turn in SEARCH_ROUNDS * [(slice(None), slice(i, None, 3), slice(j, None, 3)) for i in range(3) for j in range(3)]:
            remainder = target - F.conv2d(F.pad(codes[indices].movedim(-1, 1), (1, 1, 1, 1), mode="replicate"), kernel, bias)
            pull = F.conv_transpose2d(remainder, kernel, padding=1).movedim(1, -1)[turn]
            error = energy - 2 * (pull + codes[indices[turn]] @ gram) @ codes.T
            # Each bit lessens the error of a Gaussian by 2 ln 2 of that of one component
            price = 2 * math.log(2) * remainder.square().mean((1, 2, 3))
            indices[turn] = (error + (price[:, None] * self.bits(indices))[:, None, None]).argmin(-1)
        return indices

    def bits(self, indices: Tensor) -> Tensor:
        """Of each code in grids [B, a, b], by how often it comes there: [B, K]."""
        flat = indices.flatten(1)
        count = torch.ones(len(flat), self.config.codebook_size, device=flat.device)
        count.scatter_add_(1, flat, torch.ones_like(flat, dtype=count.dtype))
        return (count.sum(1, keepdim=True) / count).log2()

    @apply_forward_hook
    def decode(self, indices: Tensor, h: int, w: int) -> Tensor:
        """Indices [B, a, b] to what the UNet sees beside a latent [h, w]: [B, M, h, w], and the estimate's C channels if there is one."""
        z_hat = self.features(self.codes()[indices])
        seen = spread(z_hat, self.config.stride, h, w)
        return torch.cat([seen, self.estimate(z_hat, h, w)], 1) if self.config.estimates_latent else seen

    @torch.no_grad()
    def settle(self, counts: Tensor | None = None):
        """After training, once: fix the integers that files depend on, given how often each code was used [K], if that is known."""
        codes = self.codes()
        self.places.copy_((127 * codes / codes.abs().max()).round())
        if counts is not None:
            self.frequency.copy_((255 * counts / counts.max()).round().clamp(min=1))

    def probability_model(self) -> Codebook:
        """What `grid_model` codes the indices under."""
        weights = stored(self)
        return Codebook(*(weights[name].cpu().double().numpy().astype(np.int64) for name in ("frequency", "places")))

    @torch.no_grad()
    def count(self, indices: Tensor, points: Tensor):
        """Keep count of the codes, and put those that fell out of use onto points of this batch."""
        size = self.config.codebook_size
        share = torch.bincount(indices.flatten(), minlength=size).to(self.usage) * size / indices.numel()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(share)
            share /= torch.distributed.get_world_size()
        self.usage.mul_(USAGE_DECAY).add_(share, alpha=1 - USAGE_DECAY)
        dead = (self.usage < DEAD).nonzero()[:, 0]
        if len(dead):
            points = points.flatten(0, -2)
            self.codebook[dead] = points[torch.randint(len(points), (len(dead),), device=points.device)].to(self.codebook)
            self.usage[dead] = 1.0
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(self.codebook.data, 0)

    def perplexity(self) -> float:
        """2 to the entropy of the recent use of codes: at most K; far below it the codebook has collapsed."""
        share = self.usage.double() / self.usage.double().sum()
        return float(torch.special.entr(share).sum().exp())


def spread(z_hat: Tensor, stride: int, h: int, w: int) -> Tensor:
    """z_hat [B, M, a, b] over the latent positions of its cells: [B, M, h, w]."""
    return z_hat.repeat_interleave(stride, -2).repeat_interleave(stride, -1)[..., :h, :w]


# ------------------------------------------------------------------------------------------------------------------ layers


def scaling(n_in: int, n_out: int, halve: bool) -> nn.Module:
    return nn.Conv2d(n_in, n_out, 5, stride=2, padding=2) if halve else nn.Conv2d(n_in, n_out, 1)


def bottleneck(channels: int) -> nn.Sequential:
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(channels, half, 1), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, channels, 1)
    )


class Bottleneck(nn.Module):
    """Residual bottleneck. He et al. 2022 (ELIC)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = bottleneck(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Unit(nn.Module):
    """Residual bottleneck with a rectified sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = bottleneck(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class Gate(nn.Module):
    """Residual that a mask weights, simplified attention. Cheng et al. 2020, figure 5."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_a = nn.Sequential(*(Unit(channels) for _ in range(3)))
        self.conv_b = nn.Sequential(*(Unit(channels) for _ in range(3)), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_a(x) * self.conv_b(x).sigmoid()
