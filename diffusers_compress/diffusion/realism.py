"""The dial between the least error and the most natural look, which the receiver sets: `realism` in [0, 1], the same in all codecs.

A receiver knows x_0 up to a distribution. Its mean m has the least squared error D*, and too little texture: its distance P* (Wasserstein-2)
from the distribution of pictures is the largest. A sample s looks natural and has more error. Between them, with a = realism,

    x_a = (1 - a) m + a s,    P = (1 - a) P*,    D = D* + (P* - P)^2

(Freirich, Michaeli, Meir 2021; Eq. 16 and 17 of the survey, arXiv:2601.18932), if s is the sample nearest to m, as the end of the
probability-flow ODE is for a Gaussian source. For an independent draw from the posterior D = (1 + a^2) D*.
"""

from torch import Tensor

from diffusers_compress.diffusion.equations import predict_x0
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.diffusion.solvers import Walk


def blend(mean: Tensor, sample: Tensor, realism: float) -> Tensor:
    """Eq. 17 of the survey."""
    return (1 - realism) * mean + realism * sample


def dial(walk: Walk, realism: float, schedule: NoiseSchedule) -> Walk:
    """A walk of `solvers` whose x_0 is blended with the mean, which is x_0_hat of its first call: no call is added, at 0 there is one."""
    x_t, t = next(walk)
    output = yield x_t, t
    mean = predict_x0(output, x_t, *schedule.level(t), schedule.prediction_type)
    if realism == 0:
        return mean
    try:
        while True:
            output = yield walk.send(output)
    except StopIteration as end:
        return blend(mean, end.value, realism)
