"""The two ends of a DiffC file, a sender and a receiver for each picture. `loop` walks with either."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.codecs.diffc import drift, fitting, reference
from diffusers_compress.codecs.diffc.format import File, Parameters
from diffusers_compress.codecs.diffc.rate import RateControl
from diffusers_compress.codecs.diffc.timesteps import timesteps_of
from diffusers_compress.codecs.diffc.tuning import Tuned
from diffusers_compress.coding import dct
from diffusers_compress.coding.channels import channel_of
from diffusers_compress.coding.channels.trellis import Trellis
from diffusers_compress.coding.devices import double
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.format import container

Channel = Trellis | ModuleType


class Planned(NamedTuple):
    """A step: the timestep where it ends, its budget, what is sent, and the variance v [n] that both ends expect beyond the noise's."""

    s: int
    budget: int
    sent: Any  # the shift [n] at the sender's end, the message at the receiver's
    v: Tensor


BACKGROUND = 0.5  # part of a file's bits in which a place of importance 0 has a part


class Sender:
    """Knows x_0 [1, C, h, w]; its rate control chooses how far each step goes.

    importance: [h, w] in [0, 1]. What matters less drops out earlier. From there on nothing is sent of it: the receiver's own x_0_hat counts
    as the truth, so that what it holds there becomes a draw of the model, while all bits go to the rest, and go farther. No receiver has
    to know.
    tuned: how much is told of x_0 - x_0_hat, and what x_0 is aimed by, see `tuning`.
    """

    def __init__(self, x_0: Tensor, rate: RateControl, importance: Tensor | None = None, tuned: Tuned | None = None):
        self.x_0, self.rate, self.messages = x_0, rate, []
        self.until = None if importance is None else BACKGROUND + (1 - BACKGROUND) * importance.to(x_0.device)
        self.tuned = tuned
        self.channel = channel_of(rate.parameters.channel)

    def goes_on(self, t: int, step: int) -> bool:
        return self.rate.goes_on(t, step)

    def done(self, t: int) -> float:
        return self.rate.done(t)

    @staticmethod
    def plan(
        channel: Channel,
        senders: Sequence["Sender"],
        ts: Sequence[int],
        x_0_hat: Tensor,
        error: Tensor,
        limits: Sequence[int | None],
    ) -> list[Planned | None]:
        """The next step of each picture from its timestep, its budget no more than its limit, or None if nothing more fits.

        y ~ N(m, I) is sent with the shift m = (mu_q - mu_p) / std = sqrt(snr_s - snr_t) (x_0 - x_0_hat). Theis et al. 2022
        x_0_hat: [B, C, h, w], error: [B, n].
        """
        most = [max(0, sender.rate.next_budget(limit)) for sender, limit in zip(senders, limits)]
        v = excess(channel, error, most)
        for i, (sender, t, limit) in enumerate(zip(senders, ts, limits)):
            if limit is None and most[i] > 0:  # another budget for the same step has the same aim
                sender.aim(channel, t, x_0_hat[i : i + 1], v[i : i + 1], most[i])
        missing = torch.cat([sender.x_0 for sender in senders]) - x_0_hat
        for own, sender, t in zip(missing, senders, ts):
            if sender.until is not None:
                own *= sender.until > sender.done(t)
            if sender.tuned is not None:
                own *= sender.tuned.shares
        difference = coefficients_of(channel, missing).flatten(1)
        gains = reference.snr_gain(difference.square(), v, useful_bits(channel, most, v)).tolist()

        def snr_gain(i, budget):
            if budget == most[i]:
                return gains[i]
            # At its end a file tries many budgets: on the CPU, where nothing has to be waited for
            own, squared_error = error[i : i + 1].cpu(), difference[i : i + 1].square().cpu()
            return reference.snr_gain(squared_error, excess(channel, own, [budget]), channel.kl(budget)).item()

        steps = [
            sender.rate.next_step(t, partial(snr_gain, i), limit) for i, (sender, t, limit) in enumerate(zip(senders, ts, limits))
        ]
        budgets = [step[1] if step else 0 for step in steps]
        v = v if budgets == most else excess(channel, error, budgets)
        snr = senders[0].rate.noise.snr
        return [
            step and Planned(*step, float(snr[step[0]] - snr[t]) ** 0.5 * own, own_v)
            for step, t, own, own_v in zip(steps, ts, difference, v)
        ]

    def aim(self, channel: Channel, t: int, x_0_hat: Tensor, v: Tensor, budget: int) -> None:
        """Move a tuned sender's x_0, see `fitting.aimed`.

        Not by the published coder, which sends x itself and knows no variance, nor with `importance`: the aim is that of the whole picture.
        """
        if self.tuned is None or self.until is not None or not channel.wide or self.done(t) < fitting.AIMED:
            return
        part = budget / (sum(self.rate.parameters.budgets) + budget)
        self.x_0 = fitting.aimed(self.tuned.distance, self.x_0, x_0_hat, self.tuned.shares, v, channel.kl(budget), part)

    @staticmethod
    def transmit(channel: Channel, shifts: list, v: Tensor, rank: Tensor, budget: int, step: int) -> tuple[list, Tensor]:
        """(messages, y [B, n]) of pictures whose step has the same budget."""
        return channel.encode(torch.stack(shifts), v, rank, budget, step)

    def end_at(self, x_t: Tensor) -> None:
        """Let the file tell, if it has room for that, which x_t its receivers should end at."""
        if self.rate.parameters.check is not None:
            self.rate.parameters.check = drift.check_of(x_t)

    def file(self) -> bytes:
        """The whole file. A channel that knows its payload's length only now may have to give its last steps back."""
        parameters = self.rate.parameters
        while True:
            payload = self.channel.pack(self.messages, parameters.budgets)
            data = container.pack(replace(self.rate.header, parameters=parameters.to_bytes()), payload)
            if len(data) <= self.rate.max_bytes or not self.messages:
                return data
            self.messages.pop()
            self.rate.take_back()


class Receiver:
    """Knows the messages of a file and the timesteps they belong to."""

    def __init__(self, noise: NoiseSchedule, parameters: Parameters, messages: list[np.ndarray]):
        self.timesteps, self.budgets, self.sent = timesteps_of(noise, parameters), parameters.budgets, messages
        self.messages = []

    def goes_on(self, t: int, step: int) -> bool:
        return step < len(self.sent)

    @staticmethod
    def plan(
        channel: Channel, receivers: Sequence["Receiver"], ts: Sequence[int], x_0_hat: Tensor, error: Tensor, limits: Sequence
    ) -> list[Planned]:
        """The next step of each picture, as its file says."""
        files = [(receiver, len(receiver.messages)) for receiver in receivers]
        budgets = [receiver.budgets[step] for receiver, step in files]
        return [
            Planned(receiver.timesteps[step + 1], budget, receiver.sent[step], own)
            for (receiver, step), budget, own in zip(files, budgets, excess(channel, error, budgets))
        ]

    @staticmethod
    def transmit(channel: Channel, messages: list, v: Tensor, rank: Tensor, budget: int, step: int) -> tuple[list, Tensor]:
        return messages, channel.decode(np.stack(messages), v, rank, budget, step)


def coefficients_of(channel: Channel, x: Tensor) -> Tensor:
    """What the channel sends of x [..., h, w]; the published coder sends x itself."""
    return dct.transform(x) if channel.wide else x


def from_coefficients(channel: Channel, coefficients: Tensor) -> Tensor:
    return dct.inverse(coefficients) if channel.wide else coefficients


def excess(channel: Channel, error: Tensor, budgets: list[int]) -> Tensor:
    """What the reference expects beyond the noise's own variance: v [B, n], from the error's shape [B, n] and the budgets [B]."""
    return reference.excess(error, useful_bits(channel, budgets, error)) if channel.wide else torch.zeros_like(error)


def useful_bits(channel: Channel, budgets: list[int], like: Tensor) -> Tensor | float:
    """Of each budget, for a computation with `like`; a plain number if they are the same."""
    bits = [channel.kl(budget) for budget in budgets]
    return bits[0] if len(set(bits)) == 1 else torch.tensor(bits, dtype=torch.float64, device=double(like[:0]).device)


def drift_of(x_t: Tensor, file: File) -> float | None:
    """Estimated rms difference from the sender's x_t; None if the file does not tell, or was cut."""
    whole, check = len(file.payload) == len(file.parameters.budgets), file.parameters.check
    return drift.drift(x_t, check) if whole and check is not None else None
