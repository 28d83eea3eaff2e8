"""Distortion and realism of decoded pictures, which every function takes as float32 [3, H, W] in [0, 1], made of 8-bit samples.

`PICTURE_METRICS` compare one picture with its original, `SET_METRICS` two sets of pictures. A metric is loaded when asked for;
those of `WITHOUT_WEIGHTS` need no weights and no library beside torch, and are the default.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from diffusers_compress.metrics.distortion import ms_ssim, psnr
from diffusers_compress.metrics.learned import (
    CLIP,
    SEGMENTER,
    load_clip,
    load_dists,
    load_fidelity,
    load_lpips,
    load_mean_iou,
    load_vgg_distortion,
    without_caption,
)
from diffusers_compress.metrics.realism import high_frequency_ratio, sliced_wasserstein
from diffusers_compress.metrics.wasserstein import wasserstein_distortion


class Metric(NamedTuple):
    """`load()` gives the function, or raises whatever keeps it away: a missing library, weights that cannot be fetched.

    A picture metric's function takes (x, x_hat, caption) and gives a float; a set metric's takes two series of pictures and gives
    floats by name. `best` is what it tends to for a perfect picture; `about` says in a sentence what it asks.
    """

    label: str
    best: float
    load: Callable[[], Callable]
    about: str = ""


PICTURE_METRICS = {
    "psnr": Metric(
        "PSNR, dB",
        math.inf,
        lambda: without_caption(psnr),
        "Squared error of the samples, on a logarithmic scale: faithful, and blind to texture. 3 dB are half the error.",
    ),
    "ms_ssim": Metric("MS-SSIM", 1, lambda: without_caption(ms_ssim), "Structure at five scales, from 0 to 1."),
    "wasserstein": Metric(
        "Wasserstein distortion, framelets, 16 px",
        0,
        lambda: without_caption(wasserstein_distortion),
        "Whether textures look alike: means and deviations of wavelet coefficients around each place.",
    ),
    "swd": Metric(
        "sliced Wasserstein distance x 1000",
        0,
        lambda: without_caption(sliced_wasserstein),
        "Whether small patches look alike, wherever they are.",
    ),
    "hf_ratio": Metric(
        "high-frequency power ratio",
        1,
        lambda: without_caption(high_frequency_ratio),
        "Fine detail in all, as a share of the original's: below 1 blurred, above 1 noisy. The edges of JPEG's blocks count too, so that "
        "its ratio near 1 is no sign of texture.",
    ),
    "lpips_alex": Metric("LPIPS (AlexNet)", 0, partial(load_lpips, "alex"), "Features of AlexNet, weighted by what people see."),
    "lpips_vgg": Metric(
        "LPIPS (VGG16)", 0, partial(load_lpips, "vgg"), "The same with features of VGG16: other figures than AlexNet's."
    ),
    "dists": Metric("DISTS", 0, load_dists, "Features of VGG16, texture compared by statistics."),
    "wasserstein_vgg": Metric(
        "Wasserstein distortion, VGG16, 16 px",
        0,
        load_vgg_distortion,
        "As the Wasserstein distortion above, of features of VGG16.",
    ),
    "clip_image": Metric(
        f"CLIP score to original ({CLIP[0]})",
        100,
        partial(load_clip, False),
        "Whether a network that reads pictures takes both for the same thing.",
    ),
    "clip_text": Metric(
        f"CLIP score to caption ({CLIP[0]})",
        100,
        partial(load_clip, True),
        "Whether it takes the decoded picture for what the caption says.",
    ),
    "miou": Metric(
        f"mIoU ({SEGMENTER.rpartition('/')[2]})",
        1,
        load_mean_iou,
        "Whether a segmenter finds the same things in the same places.",
    ),
}
SET_METRICS = {
    "fid": Metric(
        "FID/256 (half-shifted patches)",
        0,
        load_fidelity,
        "Distance of two sets of patches in features of Inception: natural or not, however far from the original. Needs thousands of patches.",
    ),
    "kid": Metric(
        "KID/256 (half-shifted patches)",
        0,
        load_fidelity,
        "The same, by another distance, less biased where there are few patches.",
    ),
}
WITHOUT_WEIGHTS = ("psnr", "ms_ssim", "wasserstein", "swd", "hf_ratio")


def reason(error: BaseException) -> str:
    """Why a metric has no figure, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"not available: {lines[0] if lines else type(error).__name__}"[:160]
