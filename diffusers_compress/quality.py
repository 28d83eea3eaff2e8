"""Files that are as small as a wanted quality of the decoded picture permits, instead of a wanted size."""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from diffusers_compress import images, metrics
from diffusers_compress.metrics import distortion

NAMES = {  # as users write them -> of `metrics.PICTURE_METRICS`; those that rise or fall with the rate throughout
    **{name: name for name in ("psnr", "ms_ssim", "wasserstein", "lpips_alex", "lpips_vgg", "dists", "wasserstein_vgg")},
    "wd": "wasserstein",
    "lpips": "lpips_alex",
}
DECIBELS, SHARE = 0.1, 0.02  # by how much a file may be better than wanted: PSNR, and the share of another metric's value
TRIES = 16


class Quality(NamedTuple):
    """A figure that a decoded picture must reach; `decoding`: arguments of the `decompress` that gives the picture."""

    label: str
    value: float
    rises: bool  # whether higher is better
    tolerance: float
    metric: Callable
    decoding: dict

    def figure(self, original: Image.Image, decoded: Image.Image) -> float:
        return self.metric(distortion.samples(original), distortion.samples(decoded), "")

    def __str__(self) -> str:
        name = self.label.removesuffix(", dB")
        return f"{name} of {self.value:g}{' dB' if name != self.label else ''}"

    def excess(self, figure: float) -> float:
        """By how much a figure is better than wanted."""
        return figure - self.value if self.rises else self.value - figure


def wanted(
    target_psnr: float | None, target_metric: tuple[str, float] | None = None, decoding: dict | None = None
) -> Quality | None:
    """The quality that these arguments of `compress` ask for; ValueError if there is no such metric."""
    name, value = ("psnr", target_psnr) if target_metric is None else target_metric
    if value is None:
        return None
    if name not in NAMES:
        raise ValueError(f"target_metric is {name!r}, permitted are {', '.join(NAMES)}")
    metric = metrics.PICTURE_METRICS[NAMES[name]]
    tolerance = DECIBELS if name == "psnr" else SHARE * value
    return Quality(metric.label, value, metric.best > 0, tolerance, metric.load(), decoding or {})


def search(quality: Quality, low: float, high: float, first: float, finest: float) -> Generator[float, float, float]:
    """Yields knobs in (low, high] to try, is sent their figures, and returns the smallest knob that was found to be good enough.

    By false position, until a figure is within the tolerance or two knobs are within `finest`. ValueError, which says what can be
    reached, if the highest knob is not good enough.
    """
    knob, bad, good = first, None, None  # (knob, excess) on both sides
    for _ in range(TRIES):
        excess = quality.excess((yield knob))
        if excess >= 0:
            good, high = (knob, excess), knob
        elif knob >= high:
            best = quality.value + (excess if quality.rises else -excess)
            raise ValueError(f"{quality} cannot be reached here; this model's best on this picture is {best:.4g}")
        else:
            bad, low = (knob, excess), knob
        if good is not None and (good[1] <= quality.tolerance or high - low <= finest):
            return good[0]
        if good is None:
            knob = high if high - knob <= max(finest, 0.1 * (high - first)) else (knob + high) / 2
        elif bad is None:
            knob = max(low + finest, (low + knob) / 2)
        else:  # aim at half the tolerance, not too near to either side
            share = (quality.tolerance / 2 - bad[1]) / (good[1] - bad[1])
            knob = low + min(max(share, 0.1), 0.9) * (high - low)
    return high if good is None else good[0]


def smallest(quality: Quality, encode: Callable[[float], bytes], pipe: Any, picture: Tensor) -> bytes:
    """The file of the lowest fidelity in (0, 1] from which the pipeline decodes a picture that is good enough.

    encode(fidelity) gives the file of the picture [3, H, W] in [-1, 1].
    """
    original, trial, files = images.to_output(picture[None])[0], search(quality, 0.0, 1.0, 0.8, 1 / 1000), {}
    fidelity = next(trial)
    try:
        while True:
            files[fidelity] = encode(fidelity)
            decoded = pipe.decompress(files[fidelity], **quality.decoding).images[0]
            fidelity = trial.send(quality.figure(original, decoded))
    except StopIteration as end:
        return files[end.value]
