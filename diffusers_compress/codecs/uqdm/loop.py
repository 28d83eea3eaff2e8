"""The chain of UQDM, written once for both ends: from shared noise down the levels, a symbol for each number at each step.

Yang, Will & Mandt 2025, algorithm 1. Where they round z_s less the mean of p(z_s | z_t), the number z_s itself is rounded here:
its distribution is the same, and z_s follows from symbols and dither alone, never from the network. So a difference between two machines'
networks cannot grow, it can only make a table differ, which `dither.nudge_of` keeps from happening and `dither.check_of` would
tell.
"""

import functools
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.codecs.uqdm.format import Parameters
from diffusers_compress.coding import randomness
from diffusers_compress.coding.channels import dither
from diffusers_compress.diffusion import equations
from diffusers_compress.diffusion.uqdm_scheduler import UQDMScheduler
from diffusers_compress.errors import Corrupt, WrongModel

Network = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (z_t [3, H, W], t) -> (epsilon_hat, factor), float64
PIXEL_FRACTIONS, PIXEL_REACH = 128, 8
RECONSTRUCTIONS = ("flow", "ancestral", "denoised")


def samples(x: Tensor) -> Tensor:
    """x in [-1, 1], where black and white are -1 and 1, as the model has it: the middles of 256 equal cells."""
    return (2 * ((x.double() + 1) * 127.5).round() + 1) / 256 - 1


def picture(x: Tensor) -> Tensor:
    """Undoes `samples`: x as the model has it -> black and white at -1 and 1, values between pixels too."""
    return pixels_of(x) / 127.5 - 1


def start(shape: tuple[int, int, int]) -> Tensor:
    """z at the noisiest level, shared and not sent: [3, H, W] float64."""
    return randomness.normals(int(np.prod(shape)), randomness.START).reshape(shape).double()


def x_hat(noise: Tensor, z_t: Tensor, level: tuple[float, float]) -> Tensor:
    """What the network takes the picture for, of its epsilon_hat."""
    return equations.predict_x0(noise, z_t, *level, "epsilon").clamp(-1, 1)


class Distribution(NamedTuple):
    """Of the symbols k [N] of a step: logistic with this mean and scale, both in steps, float64; u: dither in parts of a step,
    int64."""

    mean: np.ndarray
    scale: np.ndarray
    u: np.ndarray


def chain(
    network: Network, scheduler: UQDMScheduler, shape: tuple[int, int, int], device: torch.device, steps: int, transmit: Callable
) -> Tensor:
    """z [3, H, W] after so many steps, where transmit(t, z_t, distribution) gives the symbols k [N] of the step that leaves level t."""
    z = start(shape).to(device)
    for t in range(scheduler.config.num_steps, scheduler.config.num_steps - steps, -1):
        width, u = scheduler.width(t), dither.dither(z.numel(), t)
        noise, factor = network(z, t)
        mean = flat(posterior_mean(z, x_hat(noise, z, scheduler.level(t)), scheduler, t) / width)
        scale = flat(factor) * scheduler.scale(t) / width
        k = transmit(t, z, Distribution(mean + u / dither.UNIT, scale, u))
        z = torch.from_numpy((dither.UNIT * k - u) * (width / dither.UNIT)).reshape(shape).to(device)
    return z


def posterior_mean(z_t: Tensor, x: Tensor, scheduler: UQDMScheduler, t: int) -> Tensor:
    """Of q(z_s | z_t, x), s = t - 1."""
    return equations.posterior(z_t, x, *scheduler.level(t), *scheduler.level(t - 1))[0]


def flat(x: Tensor) -> np.ndarray:
    return x.flatten().cpu().numpy()


class Sender:
    """Makes the symbols of a picture x [3, H, W], as `samples` gives it."""

    def __init__(self, x: Tensor, scheduler: UQDMScheduler):
        self.x, self.scheduler = x, scheduler
        self.sent: list[tuple[np.ndarray, np.ndarray]] = []  # of each step the symbols and their places on the grid

    def transmit(self, t: int, z: Tensor, p: Distribution) -> np.ndarray:
        middle = flat(posterior_mean(z, self.x.to(z), self.scheduler, t) / self.scheduler.width(t))
        k = np.floor(middle + p.u / dither.UNIT + 0.5).astype(np.int64)
        self.sent.append((k, dither.places(p.mean, p.scale)))
        return k

    def file(self, z_0: Tensor | None = None) -> tuple[Parameters, list[bytes]]:
        """What the file says, and its sections: the steps, and the pixels if z_0 [3, H, W] is given."""
        pixel_places = [] if z_0 is None else [places_of_pixels(z_0, self.scheduler)]
        nudge = dither.nudge_of([places for _, places in self.sent] + pixel_places)
        parameters, sections = Parameters(nudge), []
        for k, places in self.sent:
            whole, row = dither.rounded(places, nudge)
            sections.append(dither.stream(k - whole, row, dither.tables()))
            parameters.checks.append(dither.check_of(whole, row))
            parameters.sizes.append(len(sections[-1]))
        for places in pixel_places:
            whole, row = rounded_pixels(places, nudge)
            k = flat(pixels_of(self.x)).astype(np.int64)
            sections.append(dither.stream(k - whole, row, pixel_tables(self.scheduler)))
            parameters.pixels = len(sections[-1])
        return parameters, sections


class Receiver:
    """Reads the symbols of the sections that are there. WrongModel or Corrupt for more or fewer steps than can be."""

    def __init__(self, parameters: Parameters, sections: list[bytes], scheduler: UQDMScheduler):
        steps, most = len(parameters.sizes), scheduler.config.num_steps
        if steps > most:
            raise WrongModel(f"the file has {steps} steps, this model {most}; load the model that the file was made with")
        if parameters.pixels is not None and steps < most:
            raise Corrupt(f"the file has pixels behind {steps} steps, where {most} are needed; fetch or encode the file again")
        self.parameters, self.scheduler = parameters, scheduler
        self.steps = iter(list(zip(parameters.checks, sections)))
        self.last = sections[-1:]
        self.has_pixels = len(sections) > len(parameters.sizes)

    def transmit(self, t: int, z: Tensor, p: Distribution) -> np.ndarray:
        check, section = next(self.steps)
        whole, row = dither.rounded(dither.places(p.mean, p.scale), self.parameters.nudge)
        if dither.check_of(whole, row) != check:
            raise WrongModel(
                f"at level {t} the network says something else than the sender's did: these are other weights, such as those of "
                "another dtype, or float64 is not computed alike here, or another version of this package made the file; load the file's "
                "own model with dtype float32"
            )
        return whole + dither.symbols(section, row, dither.tables())

    def pixels(self, z_0: Tensor) -> Tensor:
        """The picture, exactly: [3, H, W] as `samples` gives it. Corrupt for pixels other than 0 to 255."""
        whole, row = rounded_pixels(places_of_pixels(z_0, self.scheduler), self.parameters.nudge)
        k = whole + dither.symbols(self.last[0], row, pixel_tables(self.scheduler))
        if not 0 <= k.min() <= k.max() <= 255:
            raise Corrupt("the payload holds pixels that are none; fetch or encode the file again")
        return (2 * torch.from_numpy(k).reshape(z_0.shape).double() + 1) / 256 - 1


def finish(
    network: Network,
    scheduler: UQDMScheduler,
    z: Tensor,
    t: int,
    reconstruction: str,
    calls: int,
    generator: torch.Generator | None,
) -> Tensor:
    """x [3, H, W] as `samples` gives it, from z at level t. calls: of the network, for "flow" at most."""
    if reconstruction == "denoised" and t > 0:
        return x_hat(network(z, t)[0], z, scheduler.level(t))
    levels = range(t, -1, -1) if reconstruction == "ancestral" else flow_levels(t, calls)
    for t, s in zip(levels, levels[1:]):
        noise, factor = network(z, t)
        if reconstruction == "ancestral":
            # p(z_s | z_t): logistic noise, and uniform noise of one step's width
            u = torch.rand((2, *z.shape), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12).to(z)
            mean = posterior_mean(z, x_hat(noise, z, scheduler.level(t)), scheduler, t)
            z = mean + scheduler.scale(t) * factor * u[0].logit() + scheduler.width(t) * (u[1] - 0.5)
        else:
            x_0 = equations.predict_x0(noise, z, *scheduler.level(t), "epsilon")
            z = equations.ddim(z, x_0, *scheduler.level(t), *scheduler.level(s))
    return (z / scheduler.level(0)[0]).clamp(-1, 1)


def flow_levels(t: int, calls: int) -> list[int]:
    """From t down to 0, by at most so many steps."""
    calls = min(t, calls)
    return [t - t * i // calls for i in range(calls + 1)] if calls else [0]


# --------------------------------------------------------------------------------------------------------- pixels given z_0


def pixels_of(x: Tensor) -> Tensor:
    """x as `samples` gives it -> the pixel, from 0 to 255, whose cell it is the middle of, and what lies between."""
    return (x + 1) * 128 - 0.5


def places_of_pixels(z_0: Tensor, scheduler: UQDMScheduler) -> np.ndarray:
    """The mean of p(x | z_0) as places on the grid of pixels: [1, N] float64, not yet rounded down."""
    mean = pixels_of(z_0 / scheduler.level(0)[0]).clamp(0.001, 254.999)  # which is on no edge of the grid
    return (flat(mean)[None] + 0.5) * PIXEL_FRACTIONS


def rounded_pixels(places: np.ndarray, nudge: int) -> tuple[np.ndarray, np.ndarray]:
    """(whole part of the mean, row of `pixel_tables`): [N] int64 each."""
    place = np.floor(places[0] + nudge / dither.NUDGES).astype(np.int64)
    return place // PIXEL_FRACTIONS, place % PIXEL_FRACTIONS


def pixel_tables(scheduler: UQDMScheduler) -> list[np.ndarray]:
    """PIXEL_FRACTIONS rows of frequencies [2 PIXEL_REACH + 1] of p(x | z_0) ~ exp(-(z_0 / alpha_0 - x)^2 alpha_0^2 / (2 sigma_0^2))."""
    return _pixel_tables(scheduler.config.gamma_min)


@functools.lru_cache(8)
def _pixel_tables(gamma: float) -> list[np.ndarray]:
    with localcontext() as context:
        context.prec = 30  # Decimal rounds correctly, so that no machine's exp can differ
        precision = (Decimal(-gamma) / 2).exp() / 128  # alpha_0 / sigma_0, in pixels
        rows = []
        for fraction in range(PIXEL_FRACTIONS):
            mean = Decimal(2 * fraction + 1) / (2 * PIXEL_FRACTIONS) - Decimal(1) / 2
            distance = [(x - mean) * precision for x in range(-PIXEL_REACH, PIXEL_REACH + 1)]
            cumulative = list(accumulate((-min(d * d / 2, Decimal(600))).exp() for d in distance))
            left = dither.TOTAL - len(distance)
            rows.append([round(part / cumulative[-1] * left) for part in cumulative])
    return list(np.diff(np.array(rows, dtype=np.int64), prepend=0) + 1)
