"""How many bits a DiffC file and its steps take, and how far each step goes."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import replace

from diffusers_compress.codecs.diffc import reference
from diffusers_compress.codecs.diffc.format import (
    BUDGET_DIGITS,
    BUDGET_RANK_BITS,
    MAX_STEPS,
    STRIDE_DIGITS,
    STRIDE_UNIT,
    Parameters,
    nearest,
    number_of,
    rank_of,
)
from diffusers_compress.codecs.diffc.timesteps import next_timestep
from diffusers_compress.coding.channels import channel_of
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.format import container
from diffusers_compress.format.container import Header

MIN_BUDGET = 64  # bits of a step: below that, a step's start costs too much
MAX_STRIDE = 2**22
CHECKED_BYTES = 2000  # files from this size on carry the two bytes of `drift`


class RateControl:
    """Chooses the stride and the budget of each step, so that a file keeps to a size, a number of steps and a last timestep.

    The parameters collect what it chose.
    """

    def __init__(
        self, noise: NoiseSchedule, header: Header, parameters: Parameters, stop_t: int, max_steps: int, max_bytes: float
    ):
        self.noise, self.header, self.parameters = noise, header, parameters
        self.stop_t, self.max_steps, self.max_bytes = stop_t, max_steps, max_bytes

    def goes_on(self, t: int, step: int) -> bool:
        """Whether another step may follow at timestep t."""
        full = 0 < step and self.parameters.last < self.parameters.budget
        return t > self.stop_t and step < self.max_steps and not full

    def done(self, t: int) -> float:
        """How much of the way to its end the file has gone at timestep t: of its bytes, or of its alpha / sigma, which grows with the bits."""
        return max(
            file_bytes(self.header, self.parameters) / self.max_bytes, float(self.noise.ratio[t] / self.noise.ratio[self.stop_t])
        )

    def next_budget(self, limit: int | None = None) -> int:
        """The most bits that the next step may have, as far as one knows before its stride; -1 if there is no room for it."""
        budget = self.affordable(self.parameters.strides[-1] if self.parameters.strides else STRIDE_UNIT)
        return budget if limit is None else min(budget, limit)

    def next_step(self, t: int, snr_gain: Callable[[int], float], limit: int | None = None) -> tuple[int, int] | None:
        """(s, budget) of the step from t, or None if nothing more fits.

        snr_gain(budget): snr_s - snr_t that a budget pays for. limit: what the budget must not exceed.
        """
        strides, budget = self.parameters.strides, self.next_budget(limit)
        stride = self.stride_to(float(self.noise.snr[t]) + snr_gain(budget)) if budget > 0 else 1
        if next_timestep(self.noise, t, [*strides, stride]) <= self.stop_t:
            stride = self.stride_within(t, stride)
            missing = float(self.noise.snr[next_timestep(self.noise, t, [*strides, stride])] - self.noise.snr[t])
            budget = bisect_left(range(budget), missing, key=snr_gain)
        budget = min(budget, self.affordable(stride))
        if budget <= 0:
            return None
        s = next_timestep(self.noise, t, [*strides, stride])
        strides.append(stride)
        self.parameters.last = budget
        return s, budget

    def take_back(self) -> None:
        """Forget the last step."""
        self.parameters.strides.pop()
        self.parameters.check = None  # that of a later x_t
        self.parameters.last = self.parameters.budget if self.parameters.strides else 0

    def stride_to(self, snr: float) -> int:
        """The stride that comes nearest to a noise level."""
        wanted = STRIDE_UNIT * (snr**0.5 - float(self.noise.ratio[-1])) - sum(self.parameters.strides)
        return nearest(max(1, round(min(wanted, MAX_STRIDE))), STRIDE_DIGITS)

    def stride_within(self, t: int, stride: int) -> int:
        """The longest stride up to this one that stays within the last timestep."""
        for rank in range(rank_of(stride, STRIDE_DIGITS), 1, -1):
            stride = number_of(rank, STRIDE_DIGITS)
            if next_timestep(self.noise, t, [*self.parameters.strides, stride]) >= self.stop_t:
                return stride
        return 1

    def affordable(self, stride: int) -> int:
        """The largest budget for a step of this stride that keeps the file within its size; -1 if there is none."""
        strides = [*self.parameters.strides, stride]

        def size(budget):
            return file_bytes(self.header, replace(self.parameters, strides=strides, last=budget))

        return bisect_right(range(self.parameters.budget + 1), self.max_bytes, key=size) - 1


def within(max_bytes: float, noise: NoiseSchedule, header: Header, parameters: Parameters, steps: int) -> RateControl:
    """For a file that has this size in so many steps. ValueError if even an empty one is larger."""
    parameters.check = 0 if max_bytes >= CHECKED_BYTES else None
    smallest = overhead(header, parameters)
    if smallest > max_bytes:
        raise ValueError(
            f"a {header.width}x{header.height} picture may take {int(max_bytes)} bytes here; the smallest file has {smallest}"
        )
    parameters.budget = budget_to_fill(header, parameters, steps, max_bytes)
    return RateControl(noise, header, parameters, 0, steps, max_bytes)


def down_to(
    t: int,
    noise: NoiseSchedule,
    header: Header,
    parameters: Parameters,
    steps: int,
    calibration: dict | None,
    shape: tuple[int, int, int],
) -> RateControl:
    """For a file that goes down to timestep t, of a latent of `shape` [C, h, w]; an average picture's has so many steps."""
    bits = reference.expected_bits(calibration, shape, float(noise.snr[t]))
    parameters.check = 0 if bits >= 8 * CHECKED_BYTES else None
    budget = max(MIN_BUDGET, channel_of(parameters.channel).budget(bits / steps))
    parameters.budget = nearest(budget, BUDGET_DIGITS)
    return RateControl(noise, header, parameters, t, MAX_STEPS, math.inf)


def overhead(header: Header, parameters: Parameters) -> int:
    """Bytes of a file with these parameters that are not payload."""
    return container.overhead(replace(header, parameters=parameters.to_bytes()))


def file_bytes(header: Header, parameters: Parameters) -> int:
    """Bytes of a file with these parameters."""
    return overhead(header, parameters) + channel_of(parameters.channel).payload_bytes(parameters.budgets)


def budget_to_fill(header: Header, parameters: Parameters, steps: int, max_bytes: float) -> int:
    """The smallest budget with which so many steps fill the file; with less than MIN_BUDGET a step, it is fewer steps' budget."""

    def size(budget, steps):
        return file_bytes(header, replace(parameters, budget=budget, last=budget, strides=[STRIDE_UNIT] * steps))

    steps = max(1, bisect_right(range(1, steps + 1), max_bytes, key=lambda count: size(MIN_BUDGET, count)))
    ranks = range(2**BUDGET_RANK_BITS - 1)
    return number_of(bisect_left(ranks, max_bytes, key=lambda rank: size(number_of(rank, BUDGET_DIGITS), steps)), BUDGET_DIGITS)
