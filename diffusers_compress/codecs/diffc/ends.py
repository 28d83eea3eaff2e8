"""The two ends of a DiffC file, a sender and a receiver for each picture. `loop` walks with either."""

from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.codecs.diffc import drift, reference
from diffusers_compress.codecs.diffc.format import File, Parameters
from diffusers_compress.codecs.diffc.rate import RateControl
from diffusers_compress.codecs.diffc.timesteps import timesteps_of
from diffusers_compress.coding import dct
from diffusers_compress.coding.channels import channel_of
from diffusers_compress.coding.channels.trellis import Trellis
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.format import container

Channel = Trellis | ModuleType


class Sender:
    """Knows x_0 [1, C, h, w]; its rate control chooses how far each step goes."""

    def __init__(self, x_0: Tensor, rate: RateControl):
        self.x_0, self.rate, self.messages = x_0, rate, []
        self.channel = channel_of(rate.parameters.channel)

    def goes_on(self, t: int, step: int) -> bool:
        return self.rate.goes_on(t, step)

    def plan(self, t: int, x_0_hat: Tensor, error: Tensor, limit: int | None = None) -> tuple[int, int, Tensor] | None:
        """(s, budget, shift [n]) of the next step, its budget no more than `limit`, or None if nothing more fits.

        y ~ N(m, I) is sent with the shift m = (mu_q - mu_p) / std = sqrt(snr_s - snr_t) (x_0 - x_0_hat). Theis et al. 2022
        """
        difference = coefficients_of(self.channel, self.x_0 - x_0_hat).flatten()

        def snr_gain(budget):
            v = excess(self.channel, error[None], budget)[0]
            return reference.snr_gain(difference.square(), v, self.channel.kl(budget)).item()

        step = self.rate.next_step(t, snr_gain, limit)
        if step is None:
            return None
        s, budget = step
        return s, budget, float(self.rate.noise.snr[s] - self.rate.noise.snr[t]) ** 0.5 * difference

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

    def plan(self, t: int, x_0_hat: Tensor, error: Tensor) -> tuple[int, int, np.ndarray]:
        """(s, budget, message) of the next step."""
        step = len(self.messages)
        return self.timesteps[step + 1], self.budgets[step], self.sent[step]

    @staticmethod
    def transmit(channel: Channel, messages: list, v: Tensor, rank: Tensor, budget: int, step: int) -> tuple[list, Tensor]:
        return messages, channel.decode(np.stack(messages), v, rank, budget, step)


def coefficients_of(channel: Channel, x: Tensor) -> Tensor:
    """What the channel sends of x [..., h, w]; the published coder sends x itself."""
    return dct.transform(x) if channel.wide else x


def from_coefficients(channel: Channel, coefficients: Tensor) -> Tensor:
    return dct.inverse(coefficients) if channel.wide else coefficients


def excess(channel: Channel, error: Tensor, budget: int) -> Tensor:
    """What the reference expects beyond the noise's own variance: v [B, n], from the error's shape [B, n] and the budget."""
    return reference.excess(error, channel.kl(budget)) if channel.wide else torch.zeros_like(error)


def drift_of(x_t: Tensor, file: File) -> float | None:
    """Estimated rms difference from the sender's x_t; None if the file does not tell, or was cut."""
    whole, check = len(file.payload) == len(file.parameters.budgets), file.parameters.check
    return drift.drift(x_t, check) if whole and check is not None else None
