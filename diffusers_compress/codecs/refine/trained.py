"""Decoders that were trained for it: a denoiser that sees what the base says of x_0 beside x_t.

A `BaseEstimator` makes of the base's latent y = E(base), and of how much it lost, a mean m of x_0 and its deviation at every place. Two
published second stages turn out to be one denoiser E[x_0 | x_t, y] behind it, with different noise levels:

- conditional diffusion (HFD, Hoogeboom et al. 2023): from x_t = alpha_t x_0 + sigma_t n where sigma_t / alpha_t = kappa d. d is the rms
  deviation, n ~ N(0, 1). Since m is near x_0 already, a small kappa is enough: HFD's shifted schedule, the late start of DIRAC (Ghouse et
  al. 2023).
- flow matching from m + d n to x_0: z_s = (1 - s) x_0 + s (m + d n), s from 1 to 0, in even steps.

In the second z_s - s m = (1 - s) x_t / alpha_t at the timestep where sigma_t / alpha_t = d s / (1 - s), and its ODE is diffusion's (Gao et al.
2024, Diffusion meets flow matching). So both take the same `walk`; a form says where the timesteps lie, and which were trained on.
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


def walk(m: Tensor, d: Tensor, n: Tensor, calls_at: list[int], noise: NoiseSchedule) -> Walk:
    """From independent Gaussians of means m and deviations d [1, C, h, w], and n ~ N(0, 1), to x_0, by calls at these timesteps.

    For those Gaussians alone the ODE is solved exactly: x_t = alpha_t m + r_t e, r_t^2 = (alpha_t d)^2 + sigma_t^2, with the same e ~ N(0, 1)
    at all t (Wang, Vastola 2024, The unreasonable effectiveness of Gaussian score approximation). DDIM steps are left for the rest, by which
    the network knows better; taken alone, a few of them would end with much less deviation than d.

    Returns x_0_hat of the first call, which is the mean of all x_0 as far as no noise helps, and x_0.
    """
    e, predicted = n, []
    for t, s in zip(calls_at, [*calls_at[1:], None]):
        alpha, sigma = noise.level(t)
        r_t = ((alpha * d) ** 2 + sigma**2).sqrt()
        x_t = alpha * m + r_t * e
        predicted.append(predict_x0((yield x_t, t), x_t, alpha, sigma, noise.prediction_type))
        rest = predicted[-1] - (m + alpha * d**2 / r_t * e)  # over E[x_0 | x_t] of the Gaussians
        alpha_s, sigma_s = (1.0, 0.0) if s is None else noise.level(s)
        r_s = ((alpha_s * d) ** 2 + sigma_s**2).sqrt()
        e = e + ddim(torch.zeros_like(rest), rest, alpha, sigma, alpha_s, sigma_s) / r_s
    return predicted[0], m + d * e
