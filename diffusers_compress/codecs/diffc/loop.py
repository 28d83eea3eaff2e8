"""The coding loop of DiffC and its two ends, a sender and a receiver for each picture."""

from bisect import bisect_left, bisect_right
from dataclasses import replace

import numpy as np
import torch

from diffusers_compress.codecs.diffc import drift, reference
from diffusers_compress.codecs.diffc.format import (
    STRIDE_DIGITS,
    STRIDE_UNIT,
    nearest,
    number_of,
    rank_of,
)
from diffusers_compress.codecs.diffc.rate import overhead
from diffusers_compress.coding import dct
from diffusers_compress.coding.channels import CHANNELS
from diffusers_compress.diffusion import equations, schedule
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container

MAX_STRIDE = 2**22


def next_timestep(noise, t, strides):
    """Where the last of these steps ends, which starts at t: the level nearest in alpha/sigma, and at least one timestep on."""
    nearest_t = schedule.timestep_at(noise, float(noise.ratio[-1]) + sum(strides) / STRIDE_UNIT)
    return max(0, min(nearest_t, t - 1))


def timesteps_of(noise, parameters):
    """The timesteps of a file, noisiest first: step j goes from entry j to entry j + 1."""
    timesteps = [noise.alpha.numel() - 1]
    for step in range(len(parameters.strides)):
        if timesteps[-1] == 0:
            raise Corrupt(f"the file holds {len(parameters.strides)} steps, this model's noise schedule has room for {step}")
        timesteps.append(next_timestep(noise, timesteps[-1], parameters.strides[: step + 1]))
    return timesteps


def reverse(noise, channel, x_t, ends, network, error_variance):
    """The coding loop, the same for both ends of all pictures in a batch.

    ends: a `Sender` or a `Receiver` for each picture. network(x_t [B, C, h, w], t [B], i [B]) gives the network's output for the
    pictures i, error_variance(x_t, x_0_hat, t [B]) the variance [B, C, h, w] of the coefficients of x_0 - x_0_hat, and their rank.
    Returns x_t [1, C, h, w] and t of each picture where its stream ends.
    """
    x_t, t, step = list(x_t.split(1)), [noise.alpha.numel() - 1] * len(ends), 0
    while active := [i for i, end in enumerate(ends) if end.goes_on(t[i], step)]:
        x, ts = torch.cat([x_t[i] for i in active]), [t[i] for i in active]
        if noise.knows(ts[0]):  # the first step is that of all pictures
            outputs = zip(active, network(x, ts, active).split(1))
            x_0_hat = [equations.predict_x0(output, x_t[i], *noise.level(t[i]), noise.prediction_type) for i, output in outputs]
        else:
            x_0_hat = [torch.zeros_like(x_t[i]) for i in active]
        error, rank = (each.flatten(1) for each in error_variance(x, torch.cat(x_0_hat), ts))
        plans = [ends[i].plan(t[i], prediction, e) for i, prediction, e in zip(active, x_0_hat, error)]

        for budget in {plan[1] for plan in plans if plan}:
            same = [k for k, plan in enumerate(plans) if plan and plan[1] == budget]
            v = excess(channel, error[same], budget)
            # y ~ N(m, I) with the shift m = (mu_q - mu_p) / std, Theis et al. 2022
            messages, y = ends[0].transmit(channel, [plans[k][2] for k in same], v, rank[same], budget, step)
            for k, message, coefficients in zip(same, messages, y):
                i, s = active[k], plans[k][0]
                ends[i].messages.append(message)
                mu_p, std = equations.posterior(x_t[i], x_0_hat[k], *noise.level(t[i]), *noise.level(s))
                x_t[i], t[i] = mu_p + std * from_coefficients(channel, coefficients.view_as(mu_p)), s
        step += 1
    return list(zip(x_t, t))


def coefficients_of(channel, x):
    """What the channel sends of x [..., h, w]; the published coder sends x itself."""
    return dct.transform(x) if channel.wide else x


def from_coefficients(channel, coefficients):
    return dct.inverse(coefficients) if channel.wide else coefficients


def excess(channel, error, budget):
    """What the reference expects beyond the noise's own variance: v [B, n], from the error's shape [B, n] and the budget."""
    return reference.excess(error, channel.kl(budget)) if channel.wide else torch.zeros_like(error)


class Sender:
    """Knows x_0 [1, C, h, w]; chooses how far each step goes, within a last timestep, a number of steps and a file size."""

    def __init__(self, noise, x_0, header, parameters, stop_t, max_steps, max_bytes):
        self.noise, self.x_0, self.header, self.parameters = noise, x_0, header, parameters
        self.channel, self.stop_t, self.max_steps, self.max_bytes = CHANNELS[parameters.channel], stop_t, max_steps, max_bytes
        self.messages = []

    def goes_on(self, t, step):
        ended = step > len(self.messages) or 0 < step and self.parameters.last < self.parameters.budget
        return t > self.stop_t and step < self.max_steps and not ended

    def plan(self, t, x_0_hat, error):
        """(s, budget, shift [n]) of the next step, or None if nothing more fits."""
        difference = coefficients_of(self.channel, self.x_0 - x_0_hat).flatten()
        if not difference.isfinite().all():
            raise ValueError(f"the model's output at timestep {t} is not finite; load it with dtype float32 or bfloat16")

        def gain(budget):
            """snr_s - snr_t that a budget pays for."""
            v = excess(self.channel, error[None], budget)[0]
            return reference.reach(difference.square(), v, self.channel.kl(budget))

        strides = self.parameters.strides
        budget = self.affordable(strides[-1] if strides else STRIDE_UNIT)
        stride = self.stride_to(float(self.noise.snr[t]) + gain(budget)) if budget > 0 else 1
        if next_timestep(self.noise, t, [*strides, stride]) <= self.stop_t:
            stride = self.stride_within(t, stride)
            missing = float(self.noise.snr[next_timestep(self.noise, t, [*strides, stride])] - self.noise.snr[t])
            budget = bisect_left(range(budget), missing, key=gain)
        budget = min(budget, self.affordable(stride))
        if budget <= 0:
            return None
        s = next_timestep(self.noise, t, [*strides, stride])
        strides.append(stride)
        self.parameters.last = budget
        # m = (mu_q - mu_p) / std = sqrt(snr_s - snr_t) (x_0 - x_0_hat)
        return s, budget, float(self.noise.snr[s] - self.noise.snr[t]) ** 0.5 * difference

    def stride_to(self, snr):
        """The stride that comes nearest to a noise level."""
        wanted = STRIDE_UNIT * (snr**0.5 - float(self.noise.ratio[-1])) - sum(self.parameters.strides)
        return nearest(max(1, round(min(wanted, MAX_STRIDE))), STRIDE_DIGITS)

    def stride_within(self, t, stride):
        """The longest stride up to this one that stays within the last timestep."""
        for rank in range(rank_of(stride, STRIDE_DIGITS), 1, -1):
            stride = number_of(rank, STRIDE_DIGITS)
            if next_timestep(self.noise, t, [*self.parameters.strides, stride]) >= self.stop_t:
                return stride
        return 1

    def affordable(self, stride):
        """The largest budget for a step of this stride that keeps the file within its size; -1 if there is none."""

        def size(budget):
            parameters = replace(self.parameters, strides=[*self.parameters.strides, stride], last=budget)
            return overhead(self.header, parameters) + self.channel.payload_bytes(parameters.budgets)

        return bisect_right(range(self.parameters.budget + 1), self.max_bytes, key=size) - 1

    @staticmethod
    def transmit(channel, shifts, v, rank, budget, step):
        return channel.encode(torch.stack(shifts), v, rank, budget, step)

    def end_at(self, x_t):
        """Let the file tell, if it has room for that, which x_t its receivers should end at."""
        if self.parameters.check is not None:
            self.parameters.check = drift.check_of(x_t)

    def file(self):
        """The whole file. A channel that knows its payload's length only now may have to give its last steps back."""
        while True:
            payload = self.channel.pack(self.messages, self.parameters.budgets)
            data = container.pack(replace(self.header, parameters=self.parameters.to_bytes()), payload)
            if len(data) <= self.max_bytes or not self.messages:
                return data
            self.messages.pop()
            self.parameters.strides.pop()
            self.parameters.check = None  # that of a later x_t
            self.parameters.last = self.parameters.budget if self.messages else 0


class Receiver:
    """Knows the messages of a file and the timesteps they belong to."""

    def __init__(self, noise, parameters, messages):
        self.timesteps, self.budgets, self.sent = timesteps_of(noise, parameters), parameters.budgets, messages
        self.messages = []

    def goes_on(self, t, step):
        return step < len(self.sent)

    def plan(self, t, x_0_hat, error):
        step = len(self.messages)
        return self.timesteps[step + 1], self.budgets[step], self.sent[step]

    @staticmethod
    def transmit(channel, messages, v, rank, budget, step):
        return messages, channel.decode(np.stack(messages), v, rank, budget, step)


def drift_of(x_t, parameters, messages):
    """Estimated rms difference from the sender's x_t; None if the file does not tell, or was cut."""
    whole = len(messages) == len(parameters.budgets)
    return drift.drift(x_t, parameters.check) if whole and parameters.check is not None else None
