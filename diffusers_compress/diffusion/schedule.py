"""The noise levels of a diffusers scheduler: x_t = alpha_t x_0 + sigma_t eps for t = 0 .. T-1.

Variance-preserving diffusion has alpha_t^2 + sigma_t^2 = 1, flow matching has alpha_t + sigma_t = 1.
"""

from dataclasses import dataclass, replace

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

FLOW = "flow_prediction"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# Zero terminal SNR is kept at this alpha^2, as diffusers' own solvers keep it, so that alpha / sigma never divides by zero.
SMALLEST_ALPHAS_CUMPROD = 2**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """`alpha` and `sigma`: [T] float64 on the CPU, t = 0 the least noisy; `prediction_type`: what the network's output means;
    `knows_last`: whether the network was trained at the last level."""

    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    knows_last: bool = True

    @property
    def ratio(self) -> Tensor:
        """alpha / sigma, [T], falling with t."""
        return self.alpha / self.sigma

    @property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2, [T]."""
        return self.ratio**2

    def knows(self, t: int) -> bool:
        """Whether the network was trained at timestep t, so that it may be asked there."""
        return self.knows_last or t < self.alpha.numel() - 1

    def timestep_of(self, fidelity: float) -> int:
        """From the noisiest timestep at 0 to the least noisy at 1."""
        return round((1 - fidelity) * (self.alpha.numel() - 1))

    def level(self, t: int) -> tuple[float, float]:
        """alpha and sigma at timestep t."""
        return self.alpha[t].item(), self.sigma[t].item()


def from_scheduler(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The levels a model was trained on, from any of diffusers' variance-preserving (DDIM, PNDM, DDPM, Euler, ...) and flow-matching
    schedulers (FlowMatchEuler, or UniPC and others with use_flow_sigmas).

    Its class and its sampling options (spacing, Karras sigmas, shift, ...) change nothing. Raises ValueError for EDM and other
    schedulers without such levels, and for other prediction types.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith(("FlowMatch", "FlowMap")) or config.get("prediction_type") == FLOW and config.get("use_flow_sigmas"):
        return flow_matching(config.num_train_timesteps)
    discrete = not config.get("use_flow_sigmas") and config.get("timestep_type", "discrete") == "discrete"
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or not discrete:
        raise ValueError(
            f"{name} has no noise levels at discrete timesteps that a network is trained on (EDM and continuous time are not "
            "supported); use DDIMScheduler, PNDMScheduler, DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler or the "
            "like, for a flow-matching model FlowMatchEulerDiscreteScheduler"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} has prediction_type {prediction_type!r}; supported are {', '.join(PREDICTION_TYPES)}, and with use_flow_sigmas {FLOW}"
        )

    alphas_cumprod = scheduler.alphas_cumprod
    # Heun, LMS, PNDM and others keep this option in their config when they replace another scheduler, but do not act on it.
    if config.get("rescale_betas_zero_snr") and alphas_cumprod[-1] > SMALLEST_ALPHAS_CUMPROD:
        alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(scheduler.betas), dim=0)
    alphas_cumprod = alphas_cumprod.detach().cpu().double().clamp(min=SMALLEST_ALPHAS_CUMPROD)
    return NoiseSchedule(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), prediction_type)


def flow_matching(num_train_timesteps: int) -> NoiseSchedule:
    """sigma_t = (t + 1) / T.  Lipman et al. 2023; Esser et al. 2024 (Stable Diffusion 3), eq. 13.

    The network knows every level in between as well; a scheduler's shift only chooses among them.
    """
    sigma = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    return NoiseSchedule(1 - sigma, sigma, FLOW)


def from_pure_noise(schedule: NoiseSchedule) -> NoiseSchedule:
    """The same levels, but for the last: pure noise, as a codec's x_T is, where most models were trained with a trace of a picture.

    Such a network takes the trace for granted. It must not be asked there: what is known of x_0 is its mean, 0.
    """
    if schedule.alpha[-1] ** 2 <= SMALLEST_ALPHAS_CUMPROD:
        return schedule
    alpha, sigma = schedule.alpha.clone(), schedule.sigma.clone()
    alpha[-1], sigma[-1] = 0, 1
    return replace(schedule, alpha=alpha, sigma=sigma, knows_last=False)


def timestep_at(schedule: NoiseSchedule, ratio: float) -> int:
    """The timestep whose alpha / sigma is nearest to `ratio`."""
    return int((schedule.ratio - ratio).abs().argmin())
