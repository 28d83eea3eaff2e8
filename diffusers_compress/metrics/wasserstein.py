"""Wasserstein distortion, of framelets or of VGG16's features."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

LOG2_SIGMA = 4.0  # pooling of the Wasserstein distortions in the tables: 16 pixels


def framelets(x: torch.Tensor, scales: int = 3) -> list[torch.Tensor]:
    """Piecewise linear B-spline framelets of x [C, H, W]: maps [8 C, H/2, W/2], [8 C, H/4, W/4] ... and the rest [C, h, w].

    A pyramid of oriented derivatives of order 0, 1 and 2 along each side, and a tight frame: with sides that are multiples of
    2^scales, the mean squares of all channels sum to that of x (Ron, Shen: Affine systems in L2(R^d), 1997). Borders wrap around.
    """
    # h_0, h_1, h_2 with sum |h_i(w)|^2 = 1 and sum h_i(w) h_i(w + pi)* = 0
    h = torch.tensor([[1, 2, 1], [math.sqrt(2), 0, -math.sqrt(2)], [-1, 2, -1]], dtype=x.dtype) / 4
    bank = torch.einsum("iy,jx->ijyx", h, h).reshape(9, 1, 3, 3)
    maps = []
    for _ in range(scales):
        y = F.conv2d(F.pad(x[:, None], (1, 1, 1, 1), mode="circular"), bank, stride=2)
        maps.append(y[:, 1:].flatten(0, 1))
        x = y[:, 0]
    return [*maps, x]


def vgg16_features() -> Callable:
    """x -> maps of VGG16 (ImageNet weights of torchvision) before each of its first four poolings, and x itself."""
    from torchvision.models import VGG16_Weights, vgg16

    layers = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features[:23].eval().requires_grad_(False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def features(x):
        maps, y = [x], ((x - mean.to(x.device)) / std.to(x.device))[None]
        for number, layer in enumerate(layers.to(x.device)):
            y = layer(y)
            if number in (3, 8, 15, 22):
                maps.append(y[0])
        return maps

    return features


def pool(x: torch.Tensor) -> torch.Tensor:
    """x [C, H, W] low-passed with [1 2 1] / 4 along both sides, at every second sample."""
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device).expand(len(x), 1, 1, 3) / 4
    x = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
    return F.conv2d(F.conv2d(x, kernel, stride=(1, 2), groups=len(x)), kernel.mT, stride=(2, 1), groups=len(x))


def local_statistics(y: torch.Tensor, levels: int):
    """Mean and standard deviation of y [C, H, W] around each place, pooled over 2^0, 2^1 ... 2^levels samples."""
    mean, square = y, y.square()
    yield mean, torch.zeros_like(mean)
    for _ in range(levels):
        mean, square = pool(mean), pool(square)
        yield mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def wasserstein_distortion(x, x_hat, log2_sigma: float = LOG2_SIGMA, features: Callable = framelets) -> float:
    """Wasserstein distortion with pooling width 2^log2_sigma pixels, in squared 8-bit levels.

    Qiu, Wagner, Balle, Theis: Wasserstein Distortion: Unifying Fidelity and Realism (CISS 2024), mean over all places.

    `features` takes x to a list of maps [C, h, w]; a smaller map is pooled over as many fewer samples. Between two levels of
    pooling it is linear in log2_sigma. At 0 it is the squared error of the features, which for `framelets` is that of x.
    """
    total = 0.0
    for y, y_hat in zip(features(x), features(x_hat)):
        log2_samples = max(0.0, log2_sigma - math.log2(x.shape[-1] / y.shape[-1]))
        levels = math.ceil(log2_samples)
        pairs = zip(local_statistics(y, levels), local_statistics(y_hat, levels))
        for level, ((mu, nu), (mu_hat, nu_hat)) in enumerate(pairs):
            weight = max(0.0, 1 - abs(log2_samples - level))
            if weight > 0:
                # W_2^2 of two distributions known by mean and deviation: (mu - mu')^2 + (nu - nu')^2
                distance = (mu - mu_hat).square() + (nu - nu_hat).square()
                total += weight * distance.mean(dim=(1, 2)).sum().item()
    return 255**2 * total / len(x)
