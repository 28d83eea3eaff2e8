"""Files that the commands read and write; - stands for stdin and stdout."""

import os
import re
import sys
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_compress.cli.terminal import DASH

if TYPE_CHECKING:
    from PIL import Image


def some_pictures(folder: Path, count: int) -> "tuple[list[Image.Image], list[str]]":
    """At most so many pictures of a folder's tree, evenly chosen; and in words what was passed over. FileNotFoundError if none is left."""
    from diffusers_compress import images
    from diffusers_compress.files import PICTURE_SUFFIXES, find_files, open_regular, skip_notes

    found, skipped = find_files(folder)
    pictures = []
    for name in list(found)[:: max(1, -(-len(found) // count))]:
        try:
            with open_regular(found[name]) as file:
                pictures.append(images.read_image(file.read(), name))
        except (OSError, ValueError) as error:
            skipped[name] = str(error)
    if not pictures:
        why = f"no picture here that can be read, with one of the suffixes {', '.join(sorted(PICTURE_SUFFIXES))}"
        raise FileNotFoundError(f"{folder}: {why}")
    return pictures, skip_notes(skipped)


def open_picture(path: Path) -> "Image.Image":
    from diffusers_compress import images

    return images.read_image(read_input(path), "stdin" if path == DASH else path)


def open_importance(text: str) -> "Image.Image | list | str":
    """--importance as `compress` takes it: a mask from its file, boxes, or a name."""
    if Path(text).is_file():
        return open_picture(Path(text))
    if re.fullmatch(r"[\d,;]+", text):
        return [tuple(int(side) for side in box.split(",") if side) for box in text.split(";")]
    return text


def check_target(target: Path, source: Path, force: bool):
    """Before any work: OSError if the result could not be written to `target`."""
    if target == DASH:
        if sys.stdout is None:
            raise OSError("OUT is -, and stdout is closed")
        if sys.stdout.isatty():
            raise OSError("OUT is -, and stdout is a terminal: send it to a file or a program")
        return
    check_overwrite(target, source, force)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target.parent}: this folder is read-only")


def check_overwrite(target: Path, source: Path, force: bool):
    """FileExistsError if `target` is there and must stay."""
    if target.exists():
        if not target.is_file():
            raise FileExistsError(f"{target}: exists and is not a file")
        if source != DASH and target.samefile(source):
            raise FileExistsError(f"{target}: is the input itself")
        if not force:
            raise FileExistsError(f"{target}: exists already; --force overwrites it")


def check_picture_format(target: Path, width: int, height: int):
    """Before any work: ValueError unless the format that the suffix of `target` says can hold an RGB picture of this size.

    Tries it with a black picture, for want of a table: some formats refuse large pictures (.webp), some shrink them without a word
    (.ico), some take no colours (.xbm), some have no writer at all (.h5).
    """
    from PIL import Image

    Image.init()
    format = "PNG" if target == DASH else Image.registered_extensions().get(target.suffix.lower())
    if format not in Image.SAVE:
        raise ValueError(f"{target}: no picture format has the suffix {target.suffix!r}; .png is one")
    try:
        file = BytesIO(picture_bytes(Image.new("RGB", (width, height)), target))
    except Exception as error:  # Pillow's writers raise many kinds
        raise ValueError(f"{target}: {format} cannot hold a picture of {width}x{height} pixels ({error}); .png can") from error
    if format not in Image.OPEN:  # Pillow only writes it, such as PDF
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            kept = Image.open(file).size
        except Image.DecompressionBombError:  # it was written, and large
            return
    if kept != (width, height):
        raise ValueError(f"{target}: {format} would shrink {width}x{height} pixels to {kept[0]}x{kept[1]}; .png keeps them")


def picture_bytes(image: "Image.Image", target: Path) -> bytes:
    """The picture as a file in the format that the suffix of `target` says, PNG for stdout."""
    from PIL import Image

    buffer = BytesIO()
    image.save(buffer, format="PNG" if target == DASH else Image.registered_extensions()[target.suffix.lower()])
    return buffer.getvalue()


def read_input(source: Path) -> bytes:
    if source != DASH:
        return source.read_bytes()
    if sys.stdin is None:
        raise OSError("IN is -, and stdin is closed")
    return sys.stdin.buffer.read()


def write_output(target: Path, data: bytes, force: bool):
    from diffusers_compress.files import write_file

    if target == DASH:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise OSError("OUT is -, and its reader ended before it had everything") from None
    else:
        write_file(target, data, overwrite=force)
