"""Decoders that were trained for it: a denoiser that sees what the base says of x_0 beside x_t.

A `BaseEstimator` makes of the base's latent y = E(base), and of how much it lost, a mean m of x_0 and its deviation at every place. Two
published second stages turn out to be one denoiser E[x_0 | x_t, y] behind it, with different noise levels:

- conditional diffusion (HFD, Hoogeboom et al. 2023): from x_t = alpha_t (m + kappa d n) down. d is the rms deviation, n ~ N(0, 1). Since
  m is near x_0 already, a small kappa is enough: HFD's shifted schedule, the late start of DIRAC (Ghouse et al. 2023).
- flow matching from m + d n to x_0: z_s = (1 - s) x_0 + s (m + d n), s from 1 to 0, in even steps of dz/ds = (z_s - x_0_hat) / s.

In the second z_s - s m = (1 - s) x_t / alpha_t at the timestep where sigma_t / alpha_t = d s / (1 - s), and its Euler step is DDIM's (Gao et al.
2024, Diffusion meets flow matching). So both walk by DDIM; a form says where the timesteps lie, and which were trained on.
"""

import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.equations import ddim, predict_x0
from diffusers_compress.diffusion.schedule import NoiseSchedule, timestep_at
from diffusers_compress.models import adapter
from diffusers_compress.models.base_estimator import BaseEstimator

Walk = Generator[tuple[Tensor, int], Tensor, tuple[Tensor, Tensor]]  # as `solvers.Walk`, but for what it returns
LATE_START = {"flow": math.inf, "diffusion": 4.0}  # kappa, of each form


def parts_of(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """What an adapter has beside the changes of the UNet: form and estimator. ValueError for another codec's adapter."""
    form = json.loads(Path(folder, adapter.ABOUT).read_text(encoding="utf-8")).get("form")
    if form not in LATE_START:
        raise ValueError(
            f"{folder} is not what examples/train_refine.py writes: its {adapter.ABOUT} names no form of {', '.join(LATE_START)}"
        )
    return {"form": form, "estimator": BaseEstimator.from_pretrained(folder, subfolder="estimator", torch_dtype=dtype)}


def seen_of(estimator: BaseEstimator, y: Tensor, errors: Tensor) -> Tensor:
    """What the network sees beside x_t, of the latents y [B, C, h, w] of bases with the rms errors [B, C]: where x_0 is likely to be, log2
    of the deviation and mean, [B, 2 C, h, w]."""
    mean, log2_deviation = estimator(y, errors)
    return torch.cat([log2_deviation, mean], 1)


def deviations(seen: Tensor) -> list[float]:
    """d of each latent: the rms deviation that the network sees."""
    log2_deviation, _ = seen.chunk(2, 1)
    return log2_deviation.exp2().square().mean((1, 2, 3)).sqrt().tolist()


def timesteps(d: float, num_steps: int, noise: NoiseSchedule, form: str, late_start: float) -> list[int]:
    """Where the network is called: at most so many different timesteps, falling."""
    if form == "diffusion":
        t = timestep_at(noise, 1 / (late_start * d))
        return solvers.timesteps_to_zero(t, min(num_steps, t + 1))
    first = 1.0 if late_start == math.inf else late_start / (1 + late_start)
    places = [first * k / num_steps for k in range(num_steps, 0, -1)]
    return sorted({timestep_at(noise, (1 - s) / (s * d)) for s in places}, reverse=True)


def walk(m: Tensor, n: Tensor, calls_at: list[int], noise: NoiseSchedule) -> Walk:
    """From the mean m [1, C, h, w], and n ~ N(0, 1) of its shape, to x_0, by calls at these timesteps.

    Returns x_0_hat of the first call, which is the mean of all x_0 as far as no noise helps, and x_0.
    """
    alpha, sigma = noise.level(calls_at[0])
    x_t, predicted = alpha * m + sigma * n, []
    for t, s in zip(calls_at, [*calls_at[1:], None]):
        predicted.append(predict_x0((yield x_t, t), x_t, *noise.level(t), noise.prediction_type))
        if s is not None:
            x_t = ddim(x_t, predicted[-1], *noise.level(t), *noise.level(s))
    return predicted[0], predicted[-1]
