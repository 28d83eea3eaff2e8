"""The distribution of each quantized latent from a network: a mean-scale hyperprior with context, for all rates.

Balle et al., Variational image compression with a scale hyperprior (2018); Minnen et al., Joint autoregressive and hierarchical
priors (2018). y_hat, the quantized latent, is coded in the order of `context_model.batches` under logistic distributions whose mean and
scale a small network gives, from the known neighbours and from z_hat, side information that an analysis network h_a makes and
that is sent first. Whatever decides a table is an integer: weights, activations in [-127, 127] and their sums, which stay far below
2^24, where float32 is exact in any order of summation. The networks see the latent in units of its local spread, which is why one
model serves all rates.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_compress._diffusers import ModelMixin
from diffusers_compress.coding.context_model import NEIGHBOURS, batches, order, relative, surroundings
from diffusers_compress.coding.logistic import ESCAPE_BITS, PER_OCTAVE, REACH, TABLES, TOTAL, UNIT

LIMIT = 127  # of weights and activations
PARTS = 32  # a spread, in activations
ONE = 64  # the weight that stands for 1
KINDS, STEPS = 4, 4
STRIDE = 8  # of the side information and of the coarsest grid
Z_LIMIT = 15
LEVELS = torch.tensor([round(2 ** (i / 8)) for i in range(8, 161)])  # eighth octaves; UNIT is 72
LARGEST_INDEX = 60


def rounded(x: Tensor) -> Tensor:
    """x rounded to integers, with the gradient of x."""
    return x + ((x + 0.5).floor() - x).detach()


class IntegerLinear(nn.Module):
    """Linear layers on integers: `groups` of them side by side, each on an input of its own. [G, N, n_in] -> [G, N, n_out].

    The output is floor((weight @ x + 64 bias) / 64 + 1/2), within +-127. The parameters are weight / 64 and bias / 64, the integers
    being in [-127, 127]: after `settle` exact in float16 and bfloat16 too.
    """

    def __init__(self, n_in: int, n_out: int, groups: int = 1, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, n_out, n_in) * gain / math.sqrt(n_in))
        self.bias = nn.Parameter(torch.zeros(groups, 1, n_out))

    def forward(self, x: Tensor, groups=slice(None)) -> Tensor:
        """`groups`: those whose inputs x holds."""
        weight, bias = (integers(p[groups]).to(x) for p in (self.weight, self.bias))
        return rounded(torch.baddbmm(ONE * bias, x, weight.mT) / ONE).clamp(-LIMIT, LIMIT)


def integers(parameter: Tensor) -> Tensor:
    return rounded(ONE * parameter).clamp(-LIMIT, LIMIT)


class HyperPrior(ModelMixin, ConfigMixin):
    """Component "hyperprior" of `RelicPipeline`.

    Args:
        latent_channels: C of the latents it was trained for.
        hyper_channels: of z_hat, which has an eighth of the latent's sides.
        features: numbers that z_hat gives each position.
        hidden: width of the context network.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, latent_channels: int = 4, hyper_channels: int = 4, features: int = 16, hidden: int = 64):
        super().__init__()
        channels, width = latent_channels, hidden
        self.h_a = nn.Sequential(
            nn.Conv2d(channels, 32, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(32, hyper_channels, 3, 2, 1),
        )
        self.z_index = nn.Parameter(torch.full((hyper_channels,), 20.0 / ONE))
        self.h_s = nn.ModuleList([IntegerLinear(9 * hyper_channels, 64), IntegerLinear(64, features)])
        inputs = channels * (NEIGHBOURS + 2) + features + STEPS + 1
        self.trunk = nn.ModuleList(
            nn.ModuleList([IntegerLinear(inputs, width), IntegerLinear(width, width)]) for _ in range(KINDS)
        )
        self.heads = nn.ModuleList(
            nn.ModuleList(
                [IntegerLinear(width + 2 * channels, width // 2, channels), IntegerLinear(width // 2, 2, channels, 0.3)]
            )
            for _ in range(KINDS)
        )

    # ------------------------------------------------------------------------------------------------ side information

    def analyse(self, v: Tensor, units: Tensor, h: int, w: int) -> Tensor:
        """v [B, C, h w] (any dtype) -> z [B, Z, h/8, w/8], not yet rounded. The sender's alone: no reader depends on its floats."""
        weight = self.h_a[0].weight
        y = (v / units.clamp(min=1)[:, None] * (units > 0)[:, None]).to(weight).clamp(-8, 8).unflatten(-1, (h, w))
        y = F.pad(y, (0, -w % STRIDE, 0, -h % STRIDE))
        return self.h_a(y).clamp(-Z_LIMIT, Z_LIMIT)

    def z_indices(self) -> Tensor:
        """Tables of the channels of z_hat, whose mean is 0: [Z] integers."""
        return integers(self.z_index).clamp(0, LARGEST_INDEX)

    @torch.no_grad()
    def settle(self):
        """Put the integer parameters on their grid, so that no cast to another type moves them."""
        for name, parameter in self.named_parameters():
            if not name.startswith("h_a"):
                parameter.copy_(integers(parameter) / ONE)

    def side_information(self, v: np.ndarray, units: list[int], h: int, w: int) -> np.ndarray:
        """z_hat [Z, h/8, w/8] int64 for v [C, h w]: the sender's."""
        z = self.analyse(torch.from_numpy(v)[None], torch.tensor(units), h, w)
        return rounded(z)[0].long().numpy()

    def z_shape(self, h: int, w: int) -> tuple[int, int, int]:
        return self.config.hyper_channels, -(-h // STRIDE), -(-w // STRIDE)

    def integer_bytes(self) -> bytes:
        """All that tables follow from: the configuration and the integer parameters, in order of their names."""
        parameters = [(n, p) for n, p in sorted(self.state_dict().items()) if not n.startswith("h_a")]
        return b"".join(name.encode() + integers(p).cpu().to(torch.int8).numpy().tobytes() for name, p in parameters)

    def synthesise(self, z_hat: Tensor) -> Tensor:
        """z_hat [B, Z, a, b], integers as floats -> features [B, F, a, b] in [0, 127]."""
        a, b = z_hat.shape[-2:]
        x = F.unfold(F.pad(z_hat * 8, (1, 1, 1, 1)), 3).mT.flatten(0, 1)[None]
        x = self.h_s[1](self.h_s[0](x).relu()).relu()
        return x[0].unflatten(0, (-1, a * b)).mT.unflatten(-1, (a, b))

    # -------------------------------------------------------------------------------------------------------- context

    def context(self, v: Tensor, batch, units: Tensor, features: Tensor, w: int, dithered: bool):
        """What is known of the positions of a batch: (centre, spread) [B, C, N] int64, levels of the spread, trunk [B N, width]."""
        centre, spread, difference = surroundings(v, batch, units[:, None])
        positions = torch.as_tensor(batch.positions, device=v.device)
        cell = positions // w // STRIDE * features.shape[-1] + positions % w // STRIDE
        around = relative(difference, spread[..., None], LIMIT, PARTS).movedim(2, 1).flatten(2)
        around = around if batch.kind else torch.zeros_like(around)
        level = level_of(spread)
        rows = [around, level.mT, level_of(units).expand(*around.shape[:2], -1)]
        inputs = torch.cat([*rows, features.flatten(2)[..., cell].mT], -1)
        flags = inputs.new_zeros(STEPS + 1)
        flags[batch.step.bit_length() - 1] = flags[STEPS] = 64
        flags[STEPS] *= dithered
        x = torch.cat([inputs, flags.expand(*inputs.shape[:2], -1)], -1).flatten(0, 1)[None]
        for layer in self.trunk[batch.kind]:
            x = layer(x).relu()
        return centre, spread, level, x[0]

    def distributions(self, kind: int, trunk: Tensor, earlier: Tensor, channels=slice(None)) -> tuple[Tensor, Tensor]:
        """Heads of `channels`: trunk [M, width], earlier [G, M, C] (see `deviation`) -> shift in spreads / 64, scale: [G, M] each."""
        first, second = self.heads[kind]
        x = torch.cat([trunk.expand(len(earlier), -1, -1), earlier, earlier.abs()], -1)
        return second(first(x, channels).relu(), channels).unbind(-1)

    def forward(self, v: Tensor, units: Tensor, dithered: bool) -> Tensor:
        """Bits [B] of the latents v [B, C, h, w], int64, that have the standard deviations `units` [C], both in parts of the step.

        For training: differentiable in the parameters, all positions at once.
        """
        h, w = v.shape[-2:]
        v = F.pad(v.flatten(2), (0, 1))
        z_hat = rounded(self.analyse(v[..., :-1], units, h, w))
        bits = code_length(z_hat, self.z_indices()[:, None, None]).flatten(1).sum(1)
        features = self.synthesise(z_hat)
        channels = order(units.tolist())
        before = torch.zeros(len(channels), len(units), device=v.device)
        for i in range(len(channels)):
            before[i, channels[:i]] = 1
        for batch in batches(h, w, STRIDE, h * w):
            centre, spread, level, trunk = self.context(v, batch, units, features, w, dithered)
            value = v[..., batch.positions]
            known = deviation(value, centre, spread).movedim(1, -1).flatten(0, 1)
            found = self.distributions(batch.kind, trunk, before[:, None] * known, channels)
            shift, scale = (x.unflatten(1, (len(v), -1)).movedim(0, 1) for x in found)
            offset = ((value - centre)[:, channels] - shift * spread[:, channels] / 64) / UNIT
            index = rounded(index_of(level[:, channels], scale))
            bits = bits + code_length(offset, index).flatten(1).sum(1)
        return bits


def learned(model: HyperPrior, z_hat: np.ndarray, h: int, w: int, units: list[int], dither: np.ndarray, dithered: bool):
    """Generator over an h x w latent as `context_model.adaptive`, under the model's distributions; `model`: as `weights.portable` gives it.

    z_hat [Z, h/8, w/8]: integers.
    """
    channels, units = order(units), torch.tensor(units)
    v = torch.zeros(1, len(units), h * w + 1, dtype=torch.int64)
    features, heads = model.synthesise(torch.from_numpy(z_hat)[None].double()), [exact(head) for head in model.heads]
    for batch in batches(h, w, STRIDE, h * w):
        *known, trunk = model.context(v, batch, units, features, w, dithered)
        centre, spread, level = (part[0].numpy() for part in known)
        seen = torch.cat([trunk, trunk.new_zeros(len(trunk), 2 * len(units))], 1)
        of_earlier = seen[:, trunk.shape[1] :].T.numpy().reshape(2, len(units), -1)  # and its magnitude
        values, noise = v[0].numpy(), dither[:, batch.positions]
        for c in channels:
            (weight, bias), (last_weight, last_bias) = heads[batch.kind][c]
            hidden = torch.addmm(bias, seen, weight).floor_().clamp_(0, LIMIT)
            output = torch.addmm(last_bias, hidden, last_weight).floor_().clamp_(-LIMIT, LIMIT)
            shift, scale = output.T.numpy().astype(np.int64)  # from here on in numpy, which is faster on so little
            mean = centre[c] + (shift * spread[c] >> 6)
            index = np.floor(index_of(level[c], scale) + 0.5).astype(np.int64)
            value = yield c, batch.positions, mean + noise[c], index
            values[c, batch.positions] = value
            of_earlier[0, c] = relative(value - centre[c], spread[c], LIMIT, PARTS)
            of_earlier[1, c] = np.abs(of_earlier[0, c])


def exact(head: nn.ModuleList) -> list:
    """For each channel the layers of its head: (weight [n_in, n_out], bias [1, n_out]) of each, whose `floor` is that of `IntegerLinear`."""
    return list(zip(*[zip(integers(layer.weight).mT / ONE, integers(layer.bias) + 0.5) for layer in head]))


def code_length(offset: Tensor, index: Tensor, in_tables: bool = False) -> Tensor:
    """Bits of integers that lie `offset` above the mean of a logistic distribution with the scale that `index` stands for.

    `in_tables`: as files code them, where each symbol has a least probability, and what lies beyond a table's reach an escape.
    """
    rate = torch.exp2(5 - index / PER_OCTAVE)
    above, below = (offset + 0.5) * rate, (offset - 0.5) * rate
    # F(above) - F(below) = F(above) F(-below) (1 - exp(below - above)) for the logistic function F
    bits = (F.softplus(-above) + F.softplus(below) - torch.log(-torch.expm1(-rate))) / math.log(2)
    if not in_tables:
        return bits
    step = torch.exp2(((index - (TABLES - 1)) / PER_OCTAVE).ceil().clamp(min=0))  # low bits are sent as they are
    excess = (offset.abs() / step).floor() - REACH
    bits = torch.where(excess < 0, bits, F.softplus((REACH - 0.5) * step * rate) / math.log(2))
    escape = torch.where(excess < 0, 0, ESCAPE_BITS + (excess.clamp(min=0) + 1).log2().floor())
    return escape - ((1 - (2 * REACH + 1) / TOTAL) * torch.exp2(-bits) + 1 / TOTAL).log2()


def level_of(x: Tensor) -> Tensor:
    """Eighth octaves that x is above UNIT, within +-127, as integers; x = 0 counts as -65."""
    return torch.bucketize(x, LEVELS.to(x.device), right=True) - 65


def deviation(v: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """What a channel's value tells the later ones: [..., N] in [-127, 127]."""
    return relative(v - centre, spread, LIMIT, PARTS)


def index_of(level, scale):
    """Table of `logistic`, unrounded, of tensors or arrays: the spread's own scale, and `scale` eighths of a table more."""
    return ((PER_OCTAVE * level + scale) / 8 + 18).clip(0, LARGEST_INDEX)


# --------------------------------------------------------------------------------------------------- quantization parameters

LARGEST_SCALE, LARGEST_SHIFT, LARGEST_LEVEL = 1.0, 1.9, 1.0  # octaves, steps, octaves


class ParameterNetwork(ModelMixin, ConfigMixin):
    """Component "parameter_network" of `RelicPipeline`: affine quantization parameters and timestep from latent and rate.

    Relic et al. 2024. The sender's alone: what it chooses is written into the file.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, latent_channels: int = 4, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * latent_channels + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.out = nn.Linear(hidden, 2 * latent_channels + 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, y: Tensor, std: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents y [B, C, h, w] less their means, deviations std [C], step widths [B] ->

        scale [B, C] of the step widths in octaves, shift [B, C] of the means in steps, level [B]: by how many octaves the denoiser
        should assume more noise than the quantization makes.
        """
        y = y / std[:, None, None]
        y = F.pad(y, (0, 1, 0, 1), mode="replicate")
        slope = (y[..., 1:] - y[..., :-1]).abs().mean((-1, -2)) + (y[..., 1:, :] - y[..., :-1, :]).abs().mean((-1, -2))
        mean, power = y.mean((-1, -2)), y.std((-1, -2), unbiased=False)
        x = torch.cat([mean, (power + 1e-3).log(), (slope + 1e-3).log()], 1)
        x = torch.cat([x, step[:, None].log2()], 1).to(self.out.weight)
        out = self.out(self.layers(x)).tanh()
        scale, shift, level = out.split([y.shape[1], y.shape[1], 1], 1)
        return LARGEST_SCALE * scale, LARGEST_SHIFT * shift, LARGEST_LEVEL * level[:, 0]

    def choose(self, x_0: Tensor, statistics: dict, step: float) -> tuple[list[float], list[float], float]:
        """Scales, shifts and level for one latent [C, h, w] on the CPU."""
        mean, std = (torch.tensor(statistics[name], dtype=torch.float64) for name in ("mean", "std"))
        y = (x_0.double() - mean[:, None, None])[None]
        scale, shift, level = self(y, std, torch.tensor([step], dtype=torch.float64))
        return scale[0].tolist(), shift[0].tolist(), float(level)
