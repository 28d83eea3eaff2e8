"""The noise levels of CDC, Yang & Mandt 2023, and which of them a decoder walks over."""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from diffusers_compress._diffusers import SchedulerMixin

SCHEDULES, PREDICTION_TYPES = ("cosine", "linear"), ("sample", "epsilon")


class CDCScheduler(SchedulerMixin, ConfigMixin):
    """Levels t = 0 (least noisy) to T - 1 of the diffusion x_t = alpha_t x_0 + sigma_t epsilon.

    `DDIMScheduler` does not walk over these timesteps, nor does its last step end at alpha = 1.

    Args:
        num_train_timesteps: T. Published: 8193, or 20000 for "linear".
        beta_schedule: "cosine" (Nichol & Dhariwal 2021) or "linear" (Ho et al. 2020, for any T).
        prediction_type: what the network gives: "sample", x_0, or "epsilon".
        clip_sample: whether x_0_hat is kept within [-1, 1].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 8193,
        beta_schedule: str = "cosine",
        prediction_type: str = "sample",
        clip_sample: bool = True,
    ):
        if beta_schedule not in SCHEDULES or prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"beta_schedule must be one of {SCHEDULES}, prediction_type one of {PREDICTION_TYPES}; "
                f"not {beta_schedule!r} and {prediction_type!r}"
            )
        count = num_train_timesteps
        if beta_schedule == "cosine":
            # Nichol & Dhariwal 2021, eq. 17, over T + 1 places from 0 to 1
            angles = (np.linspace(0, 1, count + 1) + 0.008) / 1.008 * np.pi / 2
            betas = (1 - np.cos(angles[1:]) ** 2 / np.cos(angles[:-1]) ** 2).clip(0, 0.999)
        else:
            betas = np.linspace(1e-4, 2e-2, count) * 1000 / count
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))

    def level(self, t: int) -> tuple[float, float]:
        """alpha and sigma at level t; -1 stands for no noise at all."""
        alpha_squared = float(self.alphas_cumprod[t]) if t >= 0 else 1.0
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def levels_at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B] at times t / T [B] in [0, 1)."""
        alpha_squared = self.alphas_cumprod.to(time.device)[(time * self.config.num_train_timesteps).long()]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def time(self, t: int) -> float:
        """The network's conditioning on level t."""
        return t / self.config.num_train_timesteps

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """The levels that a decoder of so many steps leaves, noisiest first. ValueError for more steps than levels."""
        last = self.config.num_train_timesteps - 1
        if num_inference_steps > last + 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, the model has {last + 1} levels")
        if num_inference_steps == 1:
            return [last]
        return [last * i // (num_inference_steps - 1) for i in range(num_inference_steps - 1, -1, -1)]
