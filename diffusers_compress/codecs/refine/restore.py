"""From a base's latent to one with what the base lost: its error taken for the noise of a timestep, channel by channel.

What a good codec keeps of a picture is what a noisy channel would keep: the forward test channel of rate-distortion theory (Cover,
Thomas: Elements of Information Theory, section 10.3; the dequantization of Relic et al. 2025 is its counterpart). With y = E(base),

    y = a x_0 + noise,   a = V / (V + N),   so   y / a = x_0 + noise of variance N,   N = V D / var(y),   V = var(y) + D

where D is the mean squared error of y. y / a is x_t / alpha_t at the timestep where N = (sigma / alpha)^2. All channels start at the
timestep of the mean D; those with less noise stay what they are, with noise added, until the others are down at their level
(Kawar et al. 2022, DDRM, does so with the singular values of a measurement).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.diffusion import schedule, solvers
from diffusers_compress.diffusion.equations import ddim, predict_x0
from diffusers_compress.diffusion.schedule import NoiseSchedule

LARGEST_GAIN = 4.0  # 1 / a of what is all but lost; noise makes up the rest of its power
LOW_PASSES = 3  # frequencies below about 1/16 cycle a pixel stay those of the base


class Matched(NamedTuple):
    """z [1, C, h, w] = x_0 + noise of the variances `noise` [1, C, 1, 1], none above that of timestep t, `level`; and n ~ N(0, 1)."""

    z: Tensor
    noise: Tensor
    level: float
    n: Tensor

    def at(self, alpha: float, sigma: float) -> Tensor:
        """x_t with all noise of this level, what is missing added."""
        return alpha * (self.z + ((sigma / alpha) ** 2 - self.noise).clamp(min=0).sqrt() * self.n)

    def plain(self, y: Tensor) -> "Matched":
        """For an estimate: y as it is, all of its error taken for noise of this level."""
        return self._replace(z=y, noise=torch.full_like(self.noise, self.level))


def match(y: Tensor, errors: Tensor, n: Tensor) -> Matched:
    """The latent y [1, C, h, w] of a base whose channels have the rms `errors` [C]; n [2, C, h, w]: standard normal numbers."""
    error = errors.to(y).square().view(1, -1, 1, 1)
    mean, power = y.mean((2, 3), keepdim=True), y.var((2, 3), keepdim=True, correction=0).clamp(min=1e-12)
    total, level = power + error, float(error.mean())
    noise = (total * error / power).clamp(max=level)
    gain = ((total + noise) / power).sqrt().clamp(max=LARGEST_GAIN)
    fill = (total + noise - gain**2 * power).clamp(min=0).sqrt()
    return Matched(mean + gain * (y - mean) + fill * n[1], noise, level, n[:1])


def restore(
    start: Matched, num_steps: int, noise: NoiseSchedule, project: Callable[[Tensor], Tensor] | None = None, every: int = 2
) -> solvers.Walk:
    """The probability-flow ODE from the matched timestep down to x_0 in at most so many calls. `project`: of x_0_hat, every so many."""
    t = schedule.timestep_at(noise, 1 / math.sqrt(start.level))
    timesteps = solvers.timesteps_to_zero(t, min(num_steps, t + 1))
    x_t = start.at(*noise.level(t))
    for k, (t, s) in enumerate(zip(timesteps, timesteps[1:]), 1):
        x_0_hat = predict_x0((yield x_t, t), x_t, *noise.level(t), noise.prediction_type)
        if project is not None and k % every == 0:
            x_0_hat = project(x_0_hat)
        x_s = ddim(x_t, x_0_hat, *noise.level(t), *noise.level(s))
        alpha, sigma = noise.level(s)
        x_t = torch.where((sigma / alpha) ** 2 > start.noise, start.at(alpha, sigma), x_s)
    return predict_x0((yield x_t, timesteps[-1]), x_t, *noise.level(timesteps[-1]), noise.prediction_type)


def low_pass(x: Tensor, passes: int = LOW_PASSES) -> Tensor:
    """x [B, C, H, W] without its high frequencies: [1 2 1] / 4 along both sides, at distances of 1, 2, 4 ... pixels (a trous)."""
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device).expand(x.shape[1], 1, 1, 3) / 4
    for distance in (2**k for k in range(passes)):
        x = F.pad(x, (distance,) * 4, mode="replicate")
        x = F.conv2d(x, kernel, dilation=(1, distance), groups=x.shape[1])
        x = F.conv2d(x, kernel.mT, dilation=(distance, 1), groups=x.shape[1])
    return x


def windows(height: int, width: int, side: int, overlap: int) -> list[tuple[slice, slice]]:
    """Overlapping tiles of at most side x side pixels that cover a picture."""

    def spans(length):
        starts = [0] if length <= side else range(0, length - overlap, side - overlap)
        return [slice(start, min(start + side, length)) for start in starts]

    return [(rows, columns) for rows in spans(height) for columns in spans(width)]


def weight(rows: slice, columns: slice, height: int, width: int, overlap: int, device=None) -> Tensor:
    """Of a tile at each of its pixels [h, w]: rises from its borders inside the picture as a squared sine. Those of all tiles sum to 1."""

    def ramp(span, length):
        place = torch.arange(span.stop - span.start, dtype=torch.float32, device=device) + 0.5
        up = torch.ones_like(place) if span.start == 0 else (place / overlap).clamp(max=1)
        down = torch.ones_like(place) if span.stop == length else ((len(place) - place) / overlap).clamp(max=1)
        return (math.pi / 2 * up).sin() ** 2 * (math.pi / 2 * down).sin() ** 2

    return ramp(rows, height)[:, None] * ramp(columns, width)
