"""The picture formats of today that lose something, by Pillow and imagecodecs: JPEG, WebP, AVIF, JPEG XL, JPEG 2000."""

import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from diffusers_compress.images.tensors import to_output, to_tensor


class Format(NamedTuple):
    """One of them: `encode(image, knob)` -> bytes, for knobs from the smallest file to the largest; `decode(data)` -> RGB.

    `signatures`: how its files start, `?` for any byte.
    """

    suffix: str
    signatures: tuple[bytes, ...]
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


FORMATS = {
    "jpeg": Format(
        ".jpg",
        (b"\xff\xd8\xff",),
        tuple(range(1, 101)),
        partial(save, format="JPEG", subsampling="4:2:0", optimize=True, progressive=True),
        read,
    ),
    "webp": Format(".webp", (b"RIFF????WEBP",), tuple(range(101)), partial(save, format="WEBP", method=6), read),
    "avif": Format(
        ".avif", (b"????ftypavif", b"????ftypavis"), tuple(range(101)), partial(save, format="AVIF", speed=6, max_threads=1), read
    ),
    "jxl": Format(
        ".jxl",
        (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
        tuple(25 * 0.96**step for step in range(160)),  # Butteraugli distance
        save_jxl,
        read_jxl,
    ),
    "jpeg2000": Format(
        ".j2k",
        (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
        tuple((4096 * 0.96**step,) for step in range(200)),  # compression ratio
        partial(save, format="JPEG2000", knob_name="quality_layers", quality_mode="rates", irreversible=True, no_jp2=True),
        read,
    ),
}


def kind_of(data: bytes) -> str:
    """The key in `FORMATS` of a picture file, by its first bytes. ValueError if it is none of them."""
    for name, format in FORMATS.items():
        if any(starts_with(data, signature) for signature in format.signatures):
            return name
    raise ValueError(f"not one of {', '.join(FORMATS)}: only what such a codec lost can be refined")


def starts_with(data: bytes, signature: bytes) -> bool:
    return len(data) >= len(signature) and all(mark in (byte, ord("?")) for mark, byte in zip(signature, data))


def opened(name: str, data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture of a file, in RGB, with what the file says of it in `info`. ValueError if it is damaged, an animation, or of another
    width and height than `size`."""
    try:
        found = FORMATS[name].decode(data) if name == "jxl" else Image.open(io.BytesIO(data))  # the latter decodes nothing yet
        if getattr(found, "n_frames", 1) > 1:
            raise ValueError(f"it is an animation of {found.n_frames} frames")
        if size not in (None, found.size):
            raise ValueError(f"it has {found.width}x{found.height} pixels, not {size[0]}x{size[1]}")
        return found if name == "jxl" else FORMATS[name].decode(data)
    except ImportError:
        raise
    except Exception as error:  # readers of pictures raise many kinds for broken files
        raise ValueError(f"this {name} file cannot be refined: {error}") from error


def largest_that_fits(format: Format, image: Image.Image, max_bytes: float) -> tuple[bytes, float | tuple]:
    """The file of the highest knob within `max_bytes`, found by bisection, and that knob. Those of the lowest if none fits."""
    low, high = 0, len(format.knobs) - 1
    best = format.encode(image, format.knobs[0])
    while low < high:
        middle = (low + high + 1) // 2
        tried = format.encode(image, format.knobs[middle])
        if len(tried) <= max_bytes:
            low, best = middle, tried
        else:
            high = middle - 1
    return best, format.knobs[low]


def encoded(name: str, image: Image.Image, fidelity: float | None, limit: float, overhead: int) -> bytes:
    """The file at this place of the scale of knobs, or the largest that leaves `overhead` of `limit` bytes. ValueError if there is none."""
    format = FORMATS[name]
    if fidelity is not None:
        return format.encode(image, format.knobs[round(fidelity * (len(format.knobs) - 1))])
    data, _ = largest_that_fits(format, image, limit - overhead)
    if len(data) + overhead > limit:
        raise ValueError(
            f"a {image.width}x{image.height} picture may take {int(limit)} bytes here; with the smallest {name} file it has "
            f"{len(data) + overhead}"
        )
    return data


def as_stored(picture: Image.Image) -> Tensor:
    """The samples of an RGB picture [3, H, W] in [-1, 1], neither turned nor converted."""
    return to_tensor(np.asarray(picture))[0]


def upright(x: Tensor, picture: Image.Image) -> tuple[Tensor, list[str]]:
    """x [3, H, W] turned and converted to sRGB as the picture's file asks for, and notes."""
    image = to_output(x[None])[0]
    image.info = picture.info
    return to_tensor(image)
