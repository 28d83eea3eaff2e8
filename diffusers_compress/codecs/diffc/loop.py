"""The coding loop of DiffC, written once for both ends of a file (Theis et al. 2022, algorithm 1).

`walk` is the loop of one picture. Like the walks of `solvers` it is a generator: what it yields are requests, `Denoise`, `Plan` and
`Transmit`, which `reverse` answers for all pictures of a batch that wait for the same.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_compress.codecs.diffc.ends import Channel, Receiver, Sender, from_coefficients
from diffusers_compress.codecs.diffc.format import MAX_STEPS
from diffusers_compress.diffusion import equations, solvers
from diffusers_compress.diffusion.schedule import NoiseSchedule


class Denoise(NamedTuple):
    """Asks for x_0_hat [1, C, h, w], the variance [n] of the coefficients of x_0 - x_0_hat, and their rank [n]."""

    x_t: Tensor
    t: int

    @property
    def batch(self) -> tuple[int, int]:
        return -1, 0  # after all transmissions, so that all pictures share a network call


class Plan(NamedTuple):
    """Asks an end for its next step from t; None if nothing more fits. limit: what its budget must not exceed."""

    end: Sender | Receiver
    t: int
    x_0_hat: Tensor
    error: Tensor
    limit: int | None = None

    @property
    def batch(self) -> tuple[int, int]:
        return MAX_STEPS, 0  # before all transmissions, so that all pictures are planned at once


class Transmit(NamedTuple):
    """Asks for a step's message, and for y [n] with the variance 1 and the shift that was sent."""

    step: int
    budget: int
    sent: Any  # the shift at the sender's end, the message at the receiver's
    v: Tensor
    rank: Tensor

    @property
    def batch(self) -> tuple[int, int]:
        return self.step, self.budget


class Taken(NamedTuple):
    """A step that was taken: its message, and x_t and t where it ends."""

    message: Any
    x_t: Tensor
    t: int


def one_step(
    noise: NoiseSchedule, channel: Channel, x_t: Tensor, t: int, step: int, end: Sender | Receiver, known: tuple, *limit: int
) -> Generator[NamedTuple, Any, Taken | None]:
    """The step from t, with what `Denoise` says of x_t; None if nothing more fits. limit: what its budget must not exceed."""
    x_0_hat, error, rank = known
    planned = yield Plan(end, t, x_0_hat, error, *limit)
    if planned is None:
        return None
    s, budget, sent, v = planned
    message, y = yield Transmit(step, budget, sent, v, rank)
    mu_p, std = equations.posterior(x_t, x_0_hat, *noise.level(t), *noise.level(s))
    return Taken(message, mu_p + std * from_coefficients(channel, y.view_as(mu_p)), s)


def walk(noise: NoiseSchedule, channel: Channel, x_t: Tensor, end: Sender | Receiver) -> Generator:
    """From pure noise x_t [1, C, h, w] down, step by step, as far as the file goes. Returns x_t and t there."""
    t, step = noise.alpha.numel() - 1, 0
    while end.goes_on(t, step):
        known = yield Denoise(x_t, t)
        taken = yield from one_step(noise, channel, x_t, t, step, end, known)
        if taken is None:
            break
        message, x_t, t = taken
        end.messages.append(message)
        step += 1
    return x_t, t


def reverse(
    noise: NoiseSchedule,
    channel: Channel,
    x_t: Tensor,
    ends: list[Sender] | list[Receiver],
    network: Callable[[Tensor, list[int], list[int]], Tensor],
    error_variance: Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]],
    walk: Callable = walk,
) -> list[tuple[Tensor, int]]:
    """The walks of a batch of pictures from x_t [B, C, h, w]: x_t [1, C, h, w] and t of each where its stream ends.

    network(x_t [B, C, h, w], t [B], i [B]) gives the network's output for the pictures i, error_variance(x_t, x_0_hat, t [B]) the
    variance [B, C, h, w] of the coefficients of x_0 - x_0_hat, and their rank.
    """

    def denoise(requests, active):
        x_t, ts = torch.cat([x for x, _ in requests]), [t for _, t in requests]
        if noise.knows(ts[0]):  # the first step is that of all pictures
            outputs = zip(network(x_t, ts, active).split(1), x_t.split(1), ts)
            x_0_hat = [equations.predict_x0(output, x, *noise.level(t), noise.prediction_type) for output, x, t in outputs]
        else:
            x_0_hat = [torch.zeros_like(x) for x in x_t.split(1)]
        error, rank = error_variance(x_t, torch.cat(x_0_hat), ts)
        return zip(x_0_hat, error.flatten(1), rank.flatten(1))

    def plan(requests):
        own, ts, x_0_hat, error, limits = zip(*requests)
        return ends[0].plan(channel, own, ts, torch.cat(x_0_hat), torch.stack(error), limits)

    def transmit(requests):
        step, budget, *_ = requests[0]
        sent, v, rank = zip(*[request[2:] for request in requests])
        return zip(*ends[0].transmit(channel, list(sent), torch.stack(v), torch.stack(rank), budget, step))

    def answer(requests, active):
        kind = type(requests[0])
        return denoise(requests, active) if kind is Denoise else plan(requests) if kind is Plan else transmit(requests)

    walks = [walk(noise, channel, x, end) for x, end in zip(x_t.split(1), ends)]
    return solvers.together(walks, answer, key=lambda request: request.batch)
