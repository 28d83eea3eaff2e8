"""The dial between the least error and the most natural look, which the receiver sets: `realism` in [0, 1], the same in all codecs.

A receiver knows x_0 up to a distribution. Its mean m has the least squared error D*, and too little texture: its distance P* (Wasserstein-2)
from the distribution of pictures is the largest. A sample s looks natural and has more error. Between them, with a = realism,

    x_a = (1 - a) m + a s,    P = (1 - a) P*,    D = D* + (P* - P)^2

(Freirich, Michaeli, Meir 2021; Eq. 16 and 17 of the survey, arXiv:2601.18932), if s is the sample nearest to m, as the end of the
probability-flow ODE is for a Gaussian source. For an independent draw from the posterior D = (1 + a^2) D*.
"""

import numpy as np
from torch import Tensor

from diffusers_compress.diffusion.equations import ddim, predict_x0, wide
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.diffusion.solvers import Walk, timesteps_to_zero


def blend(mean: Tensor, sample: Tensor, realism: float) -> Tensor:
    """Eq. 17 of the survey."""
    return (1 - realism) * mean + realism * sample


def dial(walk: Walk, realism: float, schedule: NoiseSchedule, share: float = 0.0) -> Walk:
    """A walk of `solvers` whose x_0 is blended with the mean; at 0 there is the mean alone, at 1 the walk.

    For an exact denoiser x_0_hat of the first call is the mean, and no call is added. A trained network's first guess is too smooth:
    `share` of the way to its `second_guess`, one call more, is nearer. `calibration.calibrate_second_guess` measures it.
    """
    x_t, t = next(walk)
    output = yield x_t, t
    if realism < 1:
        mean = predict_x0(output, x_t, *schedule.level(t), schedule.prediction_type)
        if share and t > 0:
            x_s, s = after_one_step(x_t, mean, t, schedule)
            second = predict_x0((yield x_s, s), x_s, *schedule.level(s), schedule.prediction_type)
            mean = blend(mean, second, share)
        if realism == 0:
            return mean
    try:
        while True:
            output = yield walk.send(output)
    except StopIteration as end:
        return end.value if realism == 1 else blend(mean, end.value, realism)


def after_one_step(x_t: Tensor, x_0_hat: Tensor, t: int, schedule: NoiseSchedule) -> tuple[Tensor, int]:
    """(x_s, s), t > 0, where the flow in two calls makes the second: half of the way, as `solvers.solve` places timesteps."""
    s = timesteps_to_zero(t, 2)[1]
    return ddim(wide(x_t), x_0_hat, *schedule.level(t), *schedule.level(s)), s


def share_of_second_guess(calibration: dict | None, ratio: float) -> float:
    """`dial`'s share at this alpha/sigma, by what `calibrate_second_guess` found; 0 without."""
    measured = (calibration or {}).get("second_guess")
    return float(np.interp(ratio, measured["ratio"], measured["share"])) if measured else 0.0
