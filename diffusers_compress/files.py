"""Files on disk: written whole or not at all; which of them are pictures; PNG."""

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image

PICTURE_SUFFIXES = frozenset(".avif .bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())


def write_file(path: str | os.PathLike, data: bytes, overwrite: bool = False) -> None:
    """Write all of `data` or nothing. FileExistsError if the file is there, unless `overwrite`."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not (overwrite and os.path.isfile(path)):
        raise FileExistsError(f"{path} exists already" if os.path.isfile(path) else f"{path} exists and is not a regular file")
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name with nothing behind it
        (os.replace if overwrite else _move_new)(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def _move_new(source: str, target: str) -> None:
    """Move a file, never onto another one that appeared in the meantime."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise FileExistsError(f"{target} exists already") from None
    except OSError:  # a file system without hard links
        if os.path.exists(target):
            raise FileExistsError(f"{target} exists already") from None
        os.replace(source, target)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes its name when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
