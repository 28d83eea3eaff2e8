"""Distortion: PSNR and MS-SSIM."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SMALLEST = 176  # pixels a side: 11, the window of SSIM, on the fifth scale


def samples(image: Image.Image) -> torch.Tensor:
    """An 8-bit RGB picture as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous() / 255


def psnr(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """PSNR in dB over all samples: -10 log10 MSE."""
    mse = (x.double() - x_hat.double()).square().mean().item()
    return -10 * math.log10(mse) if mse else math.inf


def ms_ssim(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """MS-SSIM (Wang, Simoncelli, Bovik 2003), mean over the RGB channels. ValueError below 176 pixels a side."""
    if min(x.shape[-2:]) < SMALLEST:
        raise ValueError(f"picture has {x.shape[-1]}x{x.shape[-2]} pixels, five scales need {SMALLEST} a side")
    return ms_ssim_of(x, x_hat).item()


def ms_ssim_of(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """`ms_ssim` as a tensor [], through which a gradient goes."""
    result = x.new_ones(len(x))
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        luminance, contrast = ssim_terms(x, x_hat)
        term = contrast if scale < 4 else luminance * contrast
        result = result * term.mean(dim=(1, 2)).clamp(min=0) ** exponent
        x, x_hat = F.avg_pool2d(x, 2), F.avg_pool2d(x_hat, 2)
    return result.mean()


def ssim_terms(x, x_hat):
    """The luminance term and the product of the contrast and structure terms of SSIM around each place, [C, H - 10, W - 10]."""
    window = torch.exp(-torch.arange(-5.0, 6.0, device=x.device).square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(len(x), 1, 1, 11)

    def local(y):
        return F.conv2d(F.conv2d(y, window, groups=len(y)), window.mT, groups=len(y))

    mu, mu_hat = local(x), local(x_hat)
    var, var_hat, cov = local(x * x) - mu * mu, local(x_hat * x_hat) - mu_hat * mu_hat, local(x * x_hat) - mu * mu_hat
    c_1, c_2 = 0.01**2, 0.03**2
    return (2 * mu * mu_hat + c_1) / (mu * mu + mu_hat * mu_hat + c_1), (2 * cov + c_2) / (var + var_hat + c_2)
