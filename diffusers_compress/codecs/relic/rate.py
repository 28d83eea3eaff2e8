"""The search for the step width that brings a Relic file to a wanted size."""

import math
from dataclasses import replace

from torch import Tensor

from diffusers_compress.codecs.relic.format import SCALES_PER_OCTAVE, SHIFT_PARTS, STEP_BITS, Parameters, step_width
from diffusers_compress.codecs.relic.quantizer import Quantizer, powers, worth_coding
from diffusers_compress.codecs.relic.symbols import EntropyModel, Sender
from diffusers_compress.diffusion.schedule import NoiseSchedule, timestep_at
from diffusers_compress.format import container
from diffusers_compress.format.container import Header
from diffusers_compress.models.hyperprior import ParameterNetwork
from diffusers_compress.weights import portable

COARSEST = 2**STEP_BITS - 1
FILLED, AIM = 0.994, 0.997  # of the permitted size: where the search for the step width ends, and what it looks for
FORECASTS, SEARCHES = 3, 12
KEPT = 4  # files of the search in memory: each holds all its symbols
CONTEXT = 0.8  # share of the bits that is left when the neighbours are known, about


def plan(
    parameters: Parameters, x_0: Tensor, noise: NoiseSchedule, statistics: dict, network: ParameterNetwork | None = None
) -> tuple[Parameters, Quantizer]:
    """The parameters with their timestep, their coded channels and what the parameter network chooses; their `Quantizer` for x_0."""
    level, step = 0.0, step_width(parameters.step)
    # It knows dithered files. With less noise than at the first timestep there is nothing to choose between.
    if network is not None and parameters.dithered and step / math.sqrt(12) > 1 / float(noise.ratio[0]):
        scales, shifts, level = portable(network).choose(x_0, statistics, step)
        parameters.scales = [round(SCALES_PER_OCTAVE * scale) for scale in scales]
        parameters.shifts = [round(SHIFT_PARTS * shift) for shift in shifts]
    if parameters.coded is None:
        parameters.coded = channels_of(powers(x_0, statistics), step, parameters.dithered)[0]
    quantizer = Quantizer(parameters, statistics, x_0.shape)
    sigma = quantizer.level(quantizer.values(x_0), x_0) * 2**level
    parameters.timestep = timestep_at(noise, 1 / sigma)  # D^2 / 12 = sigma^2 / alpha^2 with dither, Relic et al. 2025
    return parameters, quantizer


def channels_of(power: Tensor, step: float, dithered: bool) -> tuple[list[bool], float]:
    """Of each channel, whether it is coded; bits per position of the latent in all coded channels, about. `power`: see `powers`."""
    worth, bits = worth_coding(power, step)
    if not dithered:
        worth = worth | True
    return worth.tolist(), CONTEXT * float(bits.mean(1)[worth].sum())


class RateSearch:
    """A picture's file at one step width after another, until its size is as wanted. `parameters`: what is not sought."""

    def __init__(
        self,
        x_0: Tensor,
        header: Header,
        parameters: Parameters,
        noise: NoiseSchedule,
        model: EntropyModel,
        statistics: dict,
        network: ParameterNetwork | None = None,
    ):
        self.x_0, self.header, self.parameters, self.noise = x_0, header, parameters, noise
        self.model, self.statistics, self.network = model, statistics, network
        self.tried = {}

    def at(self, step: int, coded: list[bool] | None = None) -> tuple[int, Parameters, Sender]:
        """(size in bytes, parameters, sender) with step width number `step`; the size may be two bytes off."""
        key = step, tuple(coded or ())
        if key not in self.tried:
            own = replace(self.parameters, step=step, coded=coded)
            parameters, quantizer = plan(own, self.x_0, self.noise, self.statistics, self.network)
            sender = self.model.send(quantizer, quantizer.values(self.x_0))
            size = container.overhead(replace(self.header, parameters=parameters.to_bytes())) + math.ceil(sender.bits() / 8)
            self.tried[key] = size, parameters, sender
            if len(self.tried) > KEPT:
                self.tried.pop(next(iter(self.tried)))
        return self.tried[key]

    def data(self, step: int, coded: list[bool] | None = None) -> bytes:
        """The file with this step width."""
        _, parameters, sender = self.at(step, coded)
        return container.pack(replace(self.header, parameters=parameters.to_bytes()), sender.payload())

    def within(self, max_bytes: float) -> bytes:
        """The largest file up to this size. ValueError if even the smallest exceeds it."""
        # The size jumps where a channel comes in, so the channels stay fixed while the step width is sought.
        step, coded = self.guess(max_bytes)
        for channels in coded, [False] * len(coded):
            step = self.finest(max_bytes, step, channels)
            while len(data := self.data(step, channels)) > max_bytes and step < COARSEST:
                step += 1
            if len(data) <= max_bytes:
                return data
        raise ValueError(
            f"a {self.header.width}x{self.header.height} picture may take {int(max_bytes)} bytes here; the smallest file has {len(data)}"
        )

    def finest(self, max_bytes: float, step: int, coded: list[bool]) -> int:
        """About the smallest step whose file is not larger; the search starts at `step`."""
        low, high = -1, COARSEST  # below it too large; small enough
        for tries in range(SEARCHES):
            size, _, sender = self.at(step, coded)
            if size > max_bytes:
                low = step
            else:
                high = step
            if high - low <= 1 or FILLED * max_bytes <= size <= max_bytes:
                break
            forecast = sender.steps_to(sender.bits() + 8 * (AIM * max_bytes - 1 - size))
            step += forecast << max(0, tries - 1)  # further each time, lest it creep
            if tries >= FORECASTS and low >= 0 and high < COARSEST:
                step = (low + high) // 2
            step = max(low + 1, min(high - 1, step))
        return high

    def guess(self, max_bytes: float) -> tuple[int, list[bool]]:
        """Number of a step width that should give such a size, and the channels worth coding with it."""
        power = powers(self.x_0, self.statistics)
        for step in range(0, COARSEST + 1, 15):
            coded, bits = channels_of(power, step_width(step), self.parameters.dithered)
            if self.x_0[0].numel() * bits / 8 + 30 <= max_bytes:
                break
        return step, coded
