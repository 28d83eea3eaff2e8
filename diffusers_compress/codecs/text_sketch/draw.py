"""From a picture to a file: the thumbnail, and as many lines as the file may hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from diffusers_compress.codecs.text_sketch import edges, payload, thumbnail
from diffusers_compress.codecs.text_sketch.format import MAX_LEVELS, MAX_SIDE, MAX_THUMBNAIL, Parameters, grid_shape, read_file
from diffusers_compress.codecs.text_sketch.payload import Content
from diffusers_compress.format import container
from diffusers_compress.format.container import Header

THRESHOLDS = 64  # between the one that is asked for and 1, the last of which stands for no sketch


@dataclass(frozen=True)
class Drawing:
    """What `compress` was asked to send. ValueError for one out of its range."""

    sketch_size: int
    levels: int
    threshold: float
    detector: Callable
    thumbnail_size: int

    def __post_init__(self):
        ranges = {
            "sketch_size": (0, MAX_SIDE),
            "levels": (2, MAX_LEVELS),
            "thumbnail_size": (0, MAX_THUMBNAIL),
            "threshold": (0.01, 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")


def file_of(header: Header, x: Tensor, ids: list[int], drawing: Drawing, seed: int, limit: float) -> bytes:
    """The file of a picture x [3, H, W] in [-1, 1], with the lowest threshold at which it has at most `limit` bytes.

    ValueError if it is too large even without a sketch.
    """
    content = Content(ids)
    if drawing.thumbnail_size:
        content.thumbnail = thumbnail.quantize(edges.reduced(x, grid_shape(header.height, header.width, drawing.thumbnail_size)))
    strength = edges.strengths(x, drawing.sketch_size, drawing.detector) if drawing.sketch_size else None

    def file(k: int) -> bytes:
        """With the k-th of the thresholds."""
        threshold = drawing.threshold + (1 - drawing.threshold) * k / THRESHOLDS
        grid = None if strength is None or k == THRESHOLDS else edges.quantized(strength, threshold, drawing.levels)
        return packed(header, replace(content, sketch=grid), drawing, seed)

    data, low, high = file(0), 0, THRESHOLDS  # thresholds: one known not to fit, and one that must
    if len(data) <= limit:
        return data
    data = file(high)
    if len(data) > limit:
        raise ValueError(
            f"a {header.width}x{header.height} picture may take {int(limit)} bytes here; without a sketch, with its prompt and "
            f"thumbnail, the file has {len(data)}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        found = file(middle)
        low, high, data = (low, middle, found) if len(found) <= limit else (middle, high, data)
    return data


def packed(header: Header, content: Content, drawing: Drawing, seed: int) -> bytes:
    """The file of this content; a sketch without lines is left out."""
    if content.sketch is not None and not content.sketch.any():
        content = replace(content, sketch=None)
    side = 0 if content.sketch is None else drawing.sketch_size
    parameters = Parameters(payload.way_of(content.ids), drawing.levels if side else 0, side, drawing.thumbnail_size, seed)
    return container.pack(replace(header, parameters=parameters.to_bytes()), payload.encode(content, parameters))


def reseeded(data: bytes, seed: int) -> bytes:
    """The file with another seed."""
    header, parameters, symbols = read_file(data)
    return container.pack(replace(header, parameters=replace(parameters, seed=seed).to_bytes()), symbols)
