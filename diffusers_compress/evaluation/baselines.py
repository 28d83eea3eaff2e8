"""Codecs of today to compare with: JPEG, WebP, AVIF, JPEG XL, JPEG 2000."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from diffusers_compress.evaluation.clock import timed


@dataclass(frozen=True)
class Baseline:
    """A codec of today: `encode(image, knob)` -> bytes, for knobs from the smallest file to the largest."""

    suffix: str
    knobs: tuple
    encode: Callable
    decode: Callable


def save(image: Image.Image, knob, format: str, knob_name: str = "quality", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **{knob_name: knob}, **options)
    return file.getvalue()


def read(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def save_jxl(image: Image.Image, distance: float) -> bytes:
    import imagecodecs

    return imagecodecs.jpegxl_encode(np.asarray(image), distance=distance, effort=7, numthreads=1)


def read_jxl(data: bytes) -> Image.Image:
    import imagecodecs

    return Image.fromarray(imagecodecs.jpegxl_decode(data, numthreads=1)).convert("RGB")


BASELINES = {
    "jpeg": Baseline(
        ".jpg", tuple(range(1, 101)), partial(save, format="JPEG", subsampling="4:2:0", optimize=True, progressive=True), read
    ),
    "webp": Baseline(".webp", tuple(range(101)), partial(save, format="WEBP", method=6), read),
    "avif": Baseline(".avif", tuple(range(101)), partial(save, format="AVIF", speed=6, max_threads=1), read),
    "jxl": Baseline(".jxl", tuple(25 * 0.96**step for step in range(160)), save_jxl, read_jxl),
    "jpeg2000": Baseline(
        ".j2k",
        tuple((4096 * 0.96**step,) for step in range(200)),  # compression ratio
        partial(save, format="JPEG2000", knob_name="quality_layers", quality_mode="rates", irreversible=True, no_jp2=True),
        read,
    ),
}


def largest_that_fits(baseline: Baseline, image: Image.Image, max_bytes: int) -> tuple[bytes, float]:
    """The file of the highest knob within `max_bytes`, found by bisection, and the seconds that encoding it once takes.

    The file of the lowest knob if none fits.
    """
    low, high = 0, len(baseline.knobs) - 1
    best = timed(lambda: baseline.encode(image, baseline.knobs[0]))
    while low < high:
        middle = (low + high + 1) // 2
        tried = timed(lambda: baseline.encode(image, baseline.knobs[middle]))
        if len(tried[0]) <= max_bytes:
            low, best = middle, tried
        else:
            high = middle - 1
    return best
