"""The search for the step width that brings a Relic file to a wanted size."""

import math
from dataclasses import replace

from diffusers_compress.codecs.relic.format import STEP_BITS, step_width
from diffusers_compress.codecs.relic.quantizer import powers, worth_coding
from diffusers_compress.format import container

COARSEST = 2**STEP_BITS - 1
FILLED, AIM = 0.994, 0.997  # of the permitted size: where the search for the step width ends, and what it looks for
FORECASTS, SEARCHES = 3, 12
CONTEXT = 0.8  # share of the bits that is left when the neighbours are known, about


class File:
    """A picture's file at one step width after another, until its size is as wanted."""

    def __init__(self, x_0, header, plan, model, statistics):
        """plan(step number, coded channels or None) -> (parameters, quantizer)."""
        self.x_0, self.header, self.plan, self.model, self.statistics = x_0, header, plan, model, statistics
        self.tried = {}

    def at(self, step, coded=None):
        """(size in bytes, parameters, sender) with step width number `step`; the size may be two bytes off."""
        key = step, tuple(coded or ())
        if key not in self.tried:
            parameters, quantizer = self.plan(step, coded)
            sender = self.model.send(quantizer, quantizer.values(self.x_0))
            size = container.overhead(replace(self.header, parameters=parameters.to_bytes())) + math.ceil(sender.bits() / 8)
            self.tried[key] = size, parameters, sender
        return self.tried[key]

    def data(self, step, coded=None):
        _, parameters, sender = self.at(step, coded)
        return container.pack(replace(self.header, parameters=parameters.to_bytes()), sender.payload())

    def within(self, max_bytes):
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

    def finest(self, max_bytes, step, coded):
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

    def guess(self, max_bytes):
        """Number of a step width that should give such a size, and the channels worth coding with it."""
        power = powers(self.x_0, self.statistics)
        for step in range(0, COARSEST + 1, 15):
            worth, bits = worth_coding(power, step_width(step))
            if self.x_0[0].numel() * float(bits.mean(1)[worth].sum()) * CONTEXT / 8 + 30 <= max_bytes:
                break
        return step, worth.tolist()
