"""The two directions of a batch: pictures to files, files to pictures."""

import inspect
import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from diffusers_compress import images
from diffusers_compress.contract import unknown_options
from diffusers_compress.errors import LimitExceeded
from diffusers_compress.files import PICTURE_SUFFIXES, png
from diffusers_compress.format.container import read_header
from diffusers_compress.format.limits import DEFAULT_LIMITS

MAX_PIXELS = DEFAULT_LIMITS.pixels  # what a decoder takes unless told otherwise


class Codec(NamedTuple):
    """One direction, from files with one of the suffixes `accepts` to files with the suffix `makes`."""

    accepts: frozenset[str]
    makes: str
    size: Callable[[BinaryIO], tuple[int, int]]  # open file -> (width, height), from its first bytes
    load: Callable[[bytes], Any]  # file -> what the network takes
    code: Callable[[list], list[tuple[Any, int, list[str]]]]  # of that a list -> (result, pixels, notes) of each
    dump: Callable[[Any], bytes]  # result -> file
    batch_size: int  # inputs of like size that go through the network together at most
    multiple: int  # of pixels that the network pads to: sizes equal in this unit are alike


def encoder(pipe, batch_size: int, **options) -> Codec:
    """Pictures to .dfc files; `options` are those of `pipe.compress`."""

    check_options(pipe.compress, options)

    def code(pictures):
        out = pipe.compress(pictures, batch_size=batch_size, **options)
        return list(zip(out.bitstreams, [x.width * x.height for x in pictures], out.notes))

    return Codec(PICTURE_SUFFIXES, ".dfc", picture_size, load_picture, code, bytes, batch_size, multiple_of(pipe))


def decoder(pipe, batch_size: int, **options) -> Codec:
    """.dfc files to PNG pictures; `options` are those of `pipe.decompress`."""

    check_options(pipe.decompress, options)

    def code(files):
        out = pipe.decompress(files, batch_size=batch_size, **options)
        return [(x, x.width * x.height, notes) for x, notes in zip(out.images, out.notes)]

    return Codec(frozenset([".dfc"]), ".png", file_size, load_file, code, png, batch_size, multiple_of(pipe))


def multiple_of(pipe) -> int:
    """Of pixels that the pipeline pads sides to, as far as it says so: 1 for a codec without an autoencoder."""
    return getattr(pipe, "vae_scale_factor", 1)


def check_options(function: Callable, options: dict) -> None:
    """ValueError if the function does not know an option: before any work, not once for each picture."""
    for name in unknown_options(function, list(options)):
        raise ValueError(f"the codec has no option {name!r}, permitted are {', '.join(inspect.signature(function).parameters)}")


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """(width, height) of a picture, upright, from its header."""
    with Image.open(file) as image:
        # A PNG whose EXIF comes late would be read to its end; a wrong guess only makes a batch less full.
        sideways = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if sideways else image.size


def load_picture(data: bytes) -> Image.Image:
    with suppress(UnidentifiedImageError):  # below it is said better
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise LimitExceeded(f"{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS}")
    return images.read_image(data)


def file_size(file: BinaryIO) -> tuple[int, int]:
    header, _ = read_header(file.read())
    return header.width, header.height


def load_file(data: bytes) -> bytes:
    read_header(data)  # what is no file of ours fails here, before it spoils a batch
    return data
