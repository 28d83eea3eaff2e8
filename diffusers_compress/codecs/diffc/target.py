"""A DiffC file that ends where its picture is good enough: one encoding, whose last step is made as long as it has to be.

Where the stream must end is known beforehand but for little: the sender has x_0, so that x_t = alpha_t x_0 + sigma_t eps stands for what
a perfect channel would bring down to timestep t.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress import images, quality
from diffusers_compress.codecs.diffc import rate
from diffusers_compress.codecs.diffc.ends import Channel, Sender
from diffusers_compress.codecs.diffc.finish import Finish, finished
from diffusers_compress.codecs.diffc.format import Parameters
from diffusers_compress.codecs.diffc.loop import Denoise, Plan, Taken, one_step
from diffusers_compress.codecs.diffc.rate import RateControl
from diffusers_compress.codecs.diffc.tuning import Tuned
from diffusers_compress.coding import randomness
from diffusers_compress.diffusion.finishers import finisher_of
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.format.container import Header
from diffusers_compress.quality import Quality

NEAR = 0.7  # of the snr where the stream will end: from there on pictures are looked at
FIRST = 0.65  # fidelity where the search begins
Figure = Callable[[Tensor, int], float]  # of the picture that comes of x_t at timestep t


def sender(
    pipe: DiffusionPipeline,
    wanted: Quality,
    picture: Tensor,
    x_0: Tensor,
    noise: NoiseSchedule,
    header: Header,
    parameters: Parameters,
    steps: int,
    tuned: Tuned | None = None,
) -> "QualitySender":
    """Of a picture [3, H, W] in [-1, 1] with the latent x_0 [1, C, h, w]."""
    how = Finish(**wanted.decoding | {"finisher": finisher_of(pipe, wanted.decoding.get("finisher"))})
    original = images.to_output(picture[None])[0]

    def figure(x_t, t):
        return wanted.figure(original, finished(pipe, [(x_t, t)], [header], [parameters.prompt], how)[0])

    t = timestep_for(wanted, x_0, noise, figure)
    _, channels, h, w = x_0.shape
    control = rate.down_to(t, noise, header, parameters, steps, pipe.error_calibration(), (channels, h, w))
    return QualitySender(x_0, control, wanted, t, figure, tuned)


def timestep_for(wanted: Quality, x_0: Tensor, noise: NoiseSchedule, figure: Figure) -> int:
    """Where the stream of a picture must end, about. ValueError if no timestep is good enough."""
    eps = randomness.normals(x_0.numel(), randomness.START, 1, device=x_0.device).view_as(x_0)
    trial = quality.search(wanted, 0.0, 1.0, FIRST, 2 / len(noise.alpha))
    fidelity = next(trial)
    try:
        while True:
            t = noise.timestep_of(fidelity)
            alpha, sigma = noise.level(t)
            fidelity = trial.send(figure(alpha * x_0 + sigma * eps, t))
    except StopIteration as end:
        return noise.timestep_of(end.value)


class QualitySender(Sender):
    """Ends as soon as its picture is good enough, at about timestep t."""

    def __init__(self, x_0: Tensor, rate: RateControl, wanted: Quality, t: int, figure: Figure, tuned: Tuned | None = None):
        super().__init__(x_0, rate, tuned=tuned)
        self.wanted, self.figure = wanted, figure
        self.rate.stop_t, self.near, self.end = 0, NEAR * float(rate.noise.snr[t]), t

    def done(self, t: int) -> float:
        return float(self.rate.noise.ratio[t] / self.rate.noise.ratio[self.end])


def walk(
    noise: NoiseSchedule, channel: Channel, x_t: Tensor, end: QualitySender
) -> Generator[NamedTuple, Any, tuple[Tensor, int]]:
    """As `loop.walk`, with a last step of the smallest budget that is enough. ValueError if none is."""
    t, step, good = noise.alpha.numel() - 1, 0, False
    while not good:
        taken = None
        if end.goes_on(t, step):
            known = yield Denoise(x_t, t)
            taken = yield from one_step(noise, channel, x_t, t, step, end, known)
        if taken is None:
            raise ValueError(f"{end.wanted} was not reached by a file of {step} steps")
        if noise.snr[taken.t] >= end.near:
            figure = end.figure(taken.x_t, taken.t)
            if good := end.wanted.excess(figure) >= 0:
                taken = yield from shortened(noise, channel, x_t, t, step, end, known, taken, figure)
        message, x_t, t = taken
        end.messages.append(message)
        step += 1
    return x_t, t


def shortened(
    noise: NoiseSchedule,
    channel: Channel,
    x_t: Tensor,
    t: int,
    step: int,
    end: QualitySender,
    known: tuple,
    taken: Taken,
    figure: float,
) -> Generator[NamedTuple, Any, Taken]:
    """The step that was taken, with the smallest budget that is good enough. figure: that of its picture."""
    parameters, (x_0_hat, error, _) = end.rate.parameters, known
    budget, check, tried = parameters.last, parameters.check, {parameters.last: taken}
    trial = quality.search(end.wanted, 0, budget, budget, max(1, budget // 64))
    limit = round(next(trial))
    try:
        while True:
            if limit not in tried:
                end.rate.take_back()
                tried[limit] = (yield from one_step(noise, channel, x_t, t, step, end, known, limit)) or taken
                figure = end.figure(tried[limit].x_t, tried[limit].t)
            limit = round(trial.send(figure))
    except StopIteration as stop:
        limit = round(stop.value)
    end.rate.take_back()
    yield Plan(end, t, x_0_hat, error, limit)  # the parameters are those of this step again
    parameters.check = check
    return tried[limit]
