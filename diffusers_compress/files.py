"""Files on disk: which of them are inputs, how they are read, written whole or not at all; PNG."""

import codecs
import io
import os
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = frozenset(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pgm .png .ppm .tif .tiff .webp".split())
WALKED = "a link to a folder that was walked already"


class Found(NamedTuple):
    """Inputs: name -> path, sorted by name; and what was passed over: name -> why. Names have forward slashes."""

    files: dict[str, str]
    skipped: dict[str, str]


def find_files(folder: str | os.PathLike, suffixes: Collection[str] = PICTURE_SUFFIXES) -> Found:
    """The inputs in a folder's tree, by their names below it. Every command that takes a folder of pictures finds them so.

    Files of other suffixes are passed over, and hidden ones, such as the `._photo.jpg` that macOS leaves beside a photo. Links
    are followed, but each folder is walked once. What is named like a picture and cannot be read, such as a broken link or a
    named pipe, is found: reading it says why. OSError if the folder itself cannot be read.
    """
    files, skipped, seen, folders, links = {}, {}, set(), [""], []
    while folders or links:
        name = folders.pop() if folders else links.pop(0)  # a folder's own place goes before links to it
        path = os.path.join(folder, name)
        try:
            found = os.stat(path)
            entries = [] if (found.st_dev, found.st_ino) in seen else sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            if not name:
                raise
            skipped[name] = f"a folder that cannot be read ({error.strerror})"
            continue
        if (found.st_dev, found.st_ino) in seen:
            skipped[name] = WALKED
        seen.add((found.st_dev, found.st_ino))
        for entry in entries:
            below = f"{name}/{entry.name}" if name else entry.name
            if entry.is_dir() and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(below)
            elif why := why_skipped(below, suffixes):
                skipped[below] = why
            else:
                files[below] = entry.path
    return Found(dict(sorted(files.items())), dict(sorted(skipped.items())))


def why_skipped(name: str, suffixes: Collection[str]) -> str | None:
    """Why a file of this name is no input, or None."""
    name = name.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()
    return "hidden" if name.startswith(".") else None if suffix in suffixes else f"suffix {suffix}" if suffix else "no suffix"


def skip_notes(skipped: dict[str, str]) -> list[str]:
    """What was passed over, in one line for each reason."""
    names = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)
    count = {why: f"{len(some):,}, such as {some[0]}" if len(some) > 1 else some[0] for why, some in names.items()}
    return [f"passed over: {which} ({why})" for why, which in count.items()]


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file, opened to be read. OSError at once for what might never end: a named pipe, a socket, a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path}: not a regular file")
    return open(path, "rb")


def read_text(path: str | os.PathLike) -> str:
    """Text in UTF-8, or in UTF-16 with a byte-order mark, lines ending as anywhere. ValueError for anything else."""
    with open_regular(path) as file:
        head = file.read(4096)
        utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if b"\0" in head and not utf16:
            raise ValueError(f"{path}: not a text file")
        data = head + file.read()
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at {error.start}"
        raise ValueError(f"{path}: not text in {error.encoding.upper()} ({where}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def png(image: "Image.Image") -> bytes:
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
