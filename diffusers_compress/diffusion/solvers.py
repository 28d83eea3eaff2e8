"""From x_t at some noise level down to x_0, in a few calls of the network.

`solve` and `ancestral` are generators: they yield (x_t, t) wherever they need the network, are sent its output, and return x_0.
Many of them can so share one batch (`run`), each at a timestep of its own.
"""

import math
from collections.abc import Callable, Generator, Iterable
from itertools import pairwise

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_compress.coding import randomness
from diffusers_compress.diffusion.equations import ddim, posterior, predict_x0, wide
from diffusers_compress.diffusion.schedule import FLOW, SMALLEST_ALPHAS_CUMPROD, NoiseSchedule

Walk = Generator[tuple[Tensor, int], Tensor, Tensor]

# Schedulers that `solve` runs as they are, those in whose place it takes DDIM steps, and why others cannot finish a picture.
NATIVE_SOLVERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
DDIM_SOLVERS = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)
STUDENT = "it is for students in few steps (`finisher=`): each step brings new noise, or needs a network that was distilled"
REFUSED = {
    "FlowMapEulerDiscreteScheduler": STUDENT,
    "FlowMatchLCMScheduler": STUDENT,
    "LCMScheduler": STUDENT,
    "SASolverScheduler": "it solves a stochastic differential equation",
    "TCDScheduler": STUDENT,
}

# Share of new noise in each step of `few_calls`. The solvers above add none: students by Turbo, Lightning, Hyper-SD or of flow maps have them.
FRESH_NOISE = {
    "FlowMapEulerDiscreteScheduler": 0.0,  # Gu et al. 2026 (AnyFlow)
    "FlowMatchLCMScheduler": 1.0,
    "LCMScheduler": 1.0,  # Luo et al. 2023, algorithm 3
    "TCDScheduler": 0.3,  # Zheng et al. 2024, gamma of algorithm 2: diffusers' default
}

# Options of the native solvers that would place the timesteps, or change the levels, once more.
OWN_SPACING = (
    "rescale_betas_zero_snr",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)


def run(walks: list[Walk], network: Callable[[Tensor, list[int], list[int]], Tensor]) -> list:
    """What each walk returns. network(x_t [B, ...], t [B], i [B]) -> [B, ...]: one call a round for all walks i that wait for it."""

    def answer(requests, active):
        x_t, t = zip(*requests)
        return network(torch.cat(x_t), list(t), active).split(1)

    return together(walks, answer)


def together(walks: list[Generator], answer: Callable[[list, list[int]], Iterable], key: Callable = lambda request: 0) -> list:
    """What each walk returns. answer(requests, i) -> one answer each, for walks i whose requests have the same key, the largest first."""
    results, waiting = [None] * len(walks), {}

    def resume(i, found):
        try:
            waiting[i] = walks[i].send(found)
        except StopIteration as stop:
            waiting.pop(i, None)
            results[i] = stop.value

    for i in range(len(walks)):
        resume(i, None)
    while waiting:
        first = max(map(key, waiting.values()))
        active = [i for i, request in waiting.items() if key(request) == first]
        for i, found in zip(active, answer([waiting[i] for i in active], active)):
            resume(i, found)
    return results


def ancestral(x_t: Tensor, t: int, num_steps: int, schedule: NoiseSchedule, generator: torch.Generator | None) -> Walk:
    """The reverse process of Ho et al. 2020, algorithm 2, from x_t [1, ...] in min(num_steps, t + 1) calls, the last for x_0_hat."""
    timesteps = timesteps_to_zero(t, min(num_steps, t + 1))
    for t, s in zip(timesteps, timesteps[1:]):
        x_0_hat = predict_x0((yield x_t, t), x_t, *schedule.level(t), schedule.prediction_type)
        mean, std = posterior(x_t, x_0_hat, *schedule.level(t), *schedule.level(s))
        x_t = mean + std * randn_tensor(mean.shape, generator, mean.device, mean.dtype)
    return predict_x0((yield x_t, timesteps[-1]), x_t, *schedule.level(timesteps[-1]), schedule.prediction_type)


def solve(x_t: Tensor, t: int, num_steps: int, schedule: NoiseSchedule, scheduler: SchedulerMixin) -> Walk:
    """Follow the probability-flow ODE from x_t [1, ...] at timestep `t` down to x_0 in min(num_steps, t + 1) calls of the network.

    x_t is yielded in our convention whatever the solver, and the output is expected in the schedule's prediction type.
    `scheduler`, which is left as it is, says which solver. Those of NATIVE_SOLVERS run with their own options but on our timesteps.
    DDIM steps instead: DDIM_SOLVERS, which are DDIM (flow matching's Euler is), cannot take these timesteps, fail near zero SNR
    (Heun), or draw noise (DDPM and the ancestral ones: `ancestral` is theirs). The last call of all is x_0_hat. What solves a
    stochastic equation or is unknown raises ValueError.
    """
    check_solver(scheduler)
    name = type(scheduler).__name__
    if t not in range(len(schedule.alpha)):
        raise ValueError(f"t is {t}; permitted are 0 to {len(schedule.alpha) - 1}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; permitted are whole numbers from 1")

    timesteps = timesteps_to_zero(t, min(num_steps, t + 1))
    if name in NATIVE_SOLVERS and len(timesteps) > 1:
        x = yield from _solve_native(wide(x_t), timesteps, schedule, scheduler)
    else:
        x = yield from follow(x_t, timesteps, schedule)
    return predict_x0((yield x, timesteps[-1]), x, *schedule.level(timesteps[-1]), schedule.prediction_type)


def few_calls(x_t: Tensor, level: tuple[float, float], timesteps: list[int], schedule: NoiseSchedule, fresh_noise: float) -> Walk:
    """A student's steps from x_t [1, ...] of this level, (alpha, sigma), down to x_0, with a call at each of the falling timesteps.

    x_t gets the noise that it lacks to the first of them. A step t -> s then goes down the ODE to a share 1 - fresh_noise of s, and up to s
    with new noise: Zheng et al. 2024 (TCD), algorithm 2. With 1 it starts from x_0_hat anew, as in LCM; with 0 it is DDIM. The noise is the
    format's, so that everybody sees the same picture. (LCM's boundary condition, a factor of x_0_hat within 1e-5 of 1 at its
    timesteps, is left out.)
    """
    x = noisier(wide(x_t), level, schedule.level(timesteps[0]), 0)
    for step, (t, s) in enumerate(pairwise(timesteps), 1):
        x_0_hat = predict_x0((yield x, t), x, *schedule.level(t), schedule.prediction_type)
        between = (1.0, 0.0) if fresh_noise == 1 else schedule.level(int((1 - fresh_noise) * s))
        x = ddim(x, x_0_hat, *schedule.level(t), *between)
        x = noisier(x, between, schedule.level(s), step)
    return predict_x0((yield x, timesteps[-1]), x, *schedule.level(timesteps[-1]), schedule.prediction_type)


def noisier(x_s: Tensor, level: tuple[float, float], wanted: tuple[float, float], step: int) -> Tensor:
    """x_s of a level, (alpha, sigma), with as much of the format's noise as makes it x_t of the wanted, noisier one."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = level, wanted
    # Kingma et al. 2021 (VDM), appendix A:  q(x_t | x_s) = N(a_ts x_s, var_ts)
    a_ts = alpha_t / alpha_s if alpha_s else 1.0  # pure noise stays as it is
    var_ts = sigma_t**2 - a_ts**2 * sigma_s**2
    if var_ts <= 1e-9:  # rounding
        return a_ts * x_s
    n = randomness.normals(x_s.numel(), randomness.FINISH, step, device=x_s.device).view_as(x_s)
    return a_ts * x_s + var_ts**0.5 * n


def fresh_noise_of(scheduler: SchedulerMixin) -> float:
    """For `few_calls`; ValueError that says why, if a student cannot have this scheduler."""
    name = type(scheduler).__name__
    if name in FRESH_NOISE:
        return FRESH_NOISE[name]
    check_solver(scheduler)
    return 0.0


def check_solver(scheduler: SchedulerMixin) -> None:
    """ValueError that says why, if `solve` cannot take this scheduler."""
    name, config = type(scheduler).__name__, scheduler.config
    # Other classes carry algorithm_type along in their config, but do not act on it.
    algorithm = config.get("algorithm_type", "") if name.startswith("DPMSolver") else ""
    if algorithm.startswith("sde") or name.startswith("FlowMatchEuler") and config.get("stochastic_sampling"):
        reason = "it solves a stochastic differential equation"
    elif name in NATIVE_SOLVERS + DDIM_SOLVERS:
        return
    else:
        reason = REFUSED.get(name, "it is not known to solve the probability-flow ODE")
    raise ValueError(
        f"{name} {algorithm} cannot finish a picture: {reason}; set pipe.scheduler to one that can, such as DDIMScheduler or "
        f"DPMSolverMultistepScheduler (all of them: {', '.join(NATIVE_SOLVERS + DDIM_SOLVERS)})"
    )


def timesteps_to_zero(t: int, num_steps: int) -> list[int]:
    """num_steps (at most t + 1) different timesteps from t towards 0, denser there.  Song et al. 2021 (DDIM), appendix D.2."""
    return [max((t + 1) * k**2 // num_steps**2, k) - 1 for k in range(num_steps, 0, -1)]


def follow(x_t: Tensor, timesteps: list[int], schedule: NoiseSchedule) -> Walk:
    """From x_t at the first of the timesteps to x at the last by steps of DDIM."""
    x = wide(x_t)
    for t, s in zip(timesteps, timesteps[1:]):
        x_0_hat = predict_x0((yield x, t), x, *schedule.level(t), schedule.prediction_type)
        x = ddim(x, x_0_hat, *schedule.level(t), *schedule.level(s))
    return x


def _solve_native(x: Tensor, timesteps: list[int], schedule, scheduler) -> Walk:
    """As `follow`, by a copy of `scheduler` that has these timesteps only, numbered from 0, and so must take them all.

    These solvers are variance-preserving inside: they see x_t / norm_t, and of flow matching the v prediction of the same x_0_hat.
    """
    levels = [schedule.level(t) for t in timesteps[::-1]]
    norms = [1.0 if schedule.prediction_type != FLOW else math.hypot(*level) for level in levels]
    alphas_cumprod = torch.tensor([alpha / norm for (alpha, _), norm in zip(levels, norms)], dtype=torch.float64) ** 2
    alphas_cumprod = alphas_cumprod.clamp(min=SMALLEST_ALPHAS_CUMPROD)
    betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    solver = type(scheduler).from_config(
        scheduler.config,
        trained_betas=betas.tolist(),
        num_train_timesteps=len(timesteps),
        prediction_type="v_prediction" if schedule.prediction_type == FLOW else schedule.prediction_type,
        timestep_spacing="trailing",
        interpolation_type="linear",
        lambda_min_clipped=-math.inf,
        **dict.fromkeys(OWN_SPACING, False),
    )
    solver.set_timesteps(len(timesteps), device="cpu")  # where reading them makes nobody wait
    # scale_model_input turns the solver's state into x_t (Euler and its kin keep x_t / alpha_t); its inverse starts the state.
    state = x / norms[-1] / solver.scale_model_input(x.new_ones(()), solver.timesteps[0])
    for i in solver.timesteps[:-1]:
        scaled, norm, (alpha, sigma) = solver.scale_model_input(state, i), norms[int(i)], levels[int(i)]
        output = yield norm * scaled, timesteps[-1 - int(i)]
        if schedule.prediction_type == FLOW:
            x_0_hat = predict_x0(output, norm * scaled, alpha, sigma, FLOW)
            # Salimans & Ho 2022, section 4, solved for v
            output = (alpha * scaled - norm * x_0_hat) / sigma
        state = solver.step(wide(output), i, state, return_dict=False)[0]
    return norms[0] * solver.scale_model_input(state, solver.timesteps[-1])
