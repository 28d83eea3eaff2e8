"""Realism that needs no weights: patches as a crowd, and high frequencies."""

import math

import torch
import torch.nn.functional as F

from diffusers_compress.metrics.wasserstein import pool


def laplacian_pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Band-passes of x [C, H, W] from fine to coarse, each half the size of the one before, and the rest (Burt, Adelson 1983)."""
    bands = []
    for _ in range(levels - 1):
        low = pool(x)
        bands.append(x - F.interpolate(low[None], size=x.shape[-2:], mode="bilinear", align_corners=False)[0])
        x = low
    return [*bands, x]


@torch.no_grad()
def sliced_wasserstein(x, x_hat, levels: int = 3, patches: int = 4096, projections: int = 128) -> float:
    """Sliced Wasserstein distance times 1000 between the 7x7 patches of the Laplacian pyramids, mean over levels.

    Karras et al.: Progressive Growing of GANs (2018), section 5, with one picture for a set: how alike the patches are as a
    crowd, wherever they stand. Both are normalised by the original's mean and deviation, so that lost contrast counts.
    """
    generator = torch.Generator().manual_seed(0)
    distances = []
    for band, band_hat in zip(laplacian_pyramid(x, levels), laplacian_pyramid(x_hat, levels)):
        mean, std = band.mean(dim=(1, 2), keepdim=True), band.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        top, left = (torch.randint(size - 6, (patches,), generator=generator) for size in band.shape[-2:])
        directions = F.normalize(torch.randn(projections, 147, generator=generator), dim=1)
        seven = (((y - mean) / std).unfold(1, 7, 1).unfold(2, 7, 1)[:, top, left] for y in (band, band_hat))  # [C, patches, 7, 7]
        a, b = ((directions @ y.movedim(1, 0).flatten(1).T).sort(dim=1).values for y in seven)
        distances.append((a - b).abs().mean().item())
    return 1000 * sum(distances) / levels


def high_frequency_power(x: torch.Tensor) -> float:
    """Power of the luma of x [3, H, W] above a quarter cycle per pixel, half of what the grid can hold, in any direction."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # BT.601
    luma = torch.einsum("c,chw->hw", weights, x.double())
    height, width = luma.shape
    window = torch.outer(torch.hann_window(height, dtype=torch.float64), torch.hann_window(width, dtype=torch.float64))
    power = torch.fft.fft2((luma - luma.mean()) * window).abs().square()
    radius = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij"))
    return power[radius > 0.25].sum().item()


def high_frequency_ratio(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """High-frequency power of the decoded picture over that of the original: below 1 is blurred, above 1 is noisy.

    The spectral view of generated pictures of Durall, Keuper, Keuper: Watch your Up-Convolution (CVPR 2020), as one number.
    """
    original = high_frequency_power(x)
    return high_frequency_power(x_hat) / original if original else math.nan
