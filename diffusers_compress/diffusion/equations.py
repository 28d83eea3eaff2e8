"""The equations of diffusion with x_t = alpha_t x_0 + sigma_t eps, in float32 or better: t is the noisier level, s the less noisy one.

`alpha` and `sigma` are floats, or tensors that broadcast against x_t; alpha_t = 0 (zero terminal SNR) is allowed throughout,
except that an epsilon prediction says nothing about x_0 there.
"""

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def predict_x0(output: Tensor, x_t: Tensor, alpha: float, sigma: float, prediction_type: str) -> Tensor:
    """The network's output (what `prediction_type` says, shaped like x_t) as a prediction x_0_hat of x_0."""
    output, x_t = wide(output), wide(x_t)
    if prediction_type == "sample":
        return output
    # Ho et al. 2020, eq. 15:  x_0 = (x_t - sigma eps) / alpha
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    # Salimans & Ho 2022, section 4:  v = alpha eps - sigma x_0,  so  x_0 = alpha x_t - sigma v
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    # Lipman et al. 2023:  u = eps - x_0,  so  x_t - sigma u = (alpha + sigma) x_0
    if prediction_type == "flow_prediction":
        return (x_t - sigma * output) / (alpha + sigma)
    raise ValueError(f"prediction_type is {prediction_type!r}; permitted are epsilon, v_prediction, sample, flow_prediction")


def posterior(x_t: Tensor, x_0: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> tuple[Tensor, float]:
    """Mean (shaped like x_t) and standard deviation of q(x_s | x_t, x_0).  Ho et al. 2020, eq. 6-7, for any stride t -> s."""
    # Kingma et al. 2021 (VDM), appendix A:  q(x_t | x_s) = N(a_ts x_s, var_ts)
    a_ts = alpha_t / alpha_s
    var_ts = sigma_t**2 - a_ts**2 * sigma_s**2
    mean = (a_ts * sigma_s**2 / sigma_t**2) * wide(x_t) + (alpha_s * var_ts / sigma_t**2) * wide(x_0)
    std = sigma_s * var_ts**0.5 / sigma_t
    return mean, std


def kl_bits(x_0: Tensor, x_0_hat: Tensor, snr_t: float, snr_s: float) -> Tensor:
    """KL( q(x_s | x_t, x_0) || q(x_s | x_t, x_0_hat) ) in bits, [B]: summed over all but the first dimension."""
    # Kingma et al. 2021 (VDM), section 4.1:  (snr_s - snr_t) |x_0 - x_0_hat|^2 / 2  nats
    squared_error = (wide(x_0) - wide(x_0_hat)).square().flatten(1).sum(1)
    return (snr_s - snr_t) * squared_error / (2 * math.log(2))


def ddim(x_t: Tensor, x_0_hat: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> Tensor:
    """One step t -> s of the probability-flow ODE.  Song et al. 2021 (DDIM), eq. 12 with eta = 0."""
    epsilon_hat = (wide(x_t) - alpha_t * wide(x_0_hat)) / sigma_t
    return alpha_s * wide(x_0_hat) + sigma_s * epsilon_hat
