"""The noise levels of UQDM, Yang, Will & Mandt 2025: few, and with uniform noise between them."""

import math

from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_compress._diffusers import SchedulerMixin


class UQDMScheduler(SchedulerMixin, ConfigMixin):
    """Levels t = 0 (least noisy) to T, z_t = alpha_t x_0 + sigma_t epsilon, where gamma = log(sigma^2 / alpha^2) is linear in t.

    Between levels t and s = t - 1 the posterior is uniform instead of Gaussian, with the same mean (`equations.posterior`) and
    variance.

    Args:
        num_steps: T.
        gamma_min, gamma_max: at t = 0 and t = T.
        gamma_origin: gamma where the network's time is 0; it is 1 at gamma_max. Default: gamma_min.
        reference: density that p(z_s | z_t) is a convolution of with that uniform one, "logistic".
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int = 4,
        gamma_min: float = -12.3,
        gamma_max: float = 6.0,
        gamma_origin: float | None = None,
        reference: str = "logistic",
    ):
        if num_steps < 1 or not gamma_min < gamma_max or reference != "logistic":
            raise ValueError(
                f"{num_steps} steps from {gamma_max} down to {gamma_min} with a {reference} reference are not supported"
            )

    def gamma(self, t: int) -> float:
        return self.config.gamma_min + (self.config.gamma_max - self.config.gamma_min) * t / self.config.num_steps

    def level(self, t: int) -> tuple[float, float]:
        """alpha and sigma at level t."""
        return (1 + math.exp(self.gamma(t))) ** -0.5, (1 + math.exp(-self.gamma(t))) ** -0.5

    def time(self, t: int) -> float:
        """The network's conditioning on level t."""
        low, high = self.config.gamma_origin, self.config.gamma_max
        low = self.config.gamma_min if low is None else low
        return (self.gamma(t) - low) / (high - low)

    def width(self, t: int) -> float:
        """Width of the uniform posterior q(z_s | z_t, x_0) of the step that leaves level t."""
        return math.sqrt(12) * self.level(t - 1)[1] * self._share(t)

    def scale(self, t: int) -> float:
        """Scale of the logistic density of p(z_s | z_t), for a factor of 1: its deviation is that of z_t given z_s, as it stood
        alone."""
        return math.sqrt(3) / math.pi * self.level(t)[1] * self._share(t)

    def _share(self, t):
        """Square root of the share of z_t's noise variance that the step from level s = t - 1 added."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.level(t), self.level(t - 1)
        return math.sqrt(1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
