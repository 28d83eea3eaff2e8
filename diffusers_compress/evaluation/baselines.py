"""Formats of today to compare with."""

from PIL import Image

from diffusers_compress.evaluation.clock import timed
from diffusers_compress.images import formats
from diffusers_compress.images.formats import FORMATS as BASELINES
from diffusers_compress.images.formats import Format, read, save

__all__ = ["BASELINES", "largest_that_fits", "read", "save"]


def largest_that_fits(baseline: Format, image: Image.Image, max_bytes: int) -> tuple[bytes, float]:
    """The file of the highest knob within `max_bytes` (of the lowest if none fits), and the seconds that encoding it once takes."""
    _, knob = formats.largest_that_fits(baseline, image, max_bytes)
    return timed(lambda: baseline.encode(image, knob))
