"""Compressed files as a format of Pillow: `register(pipe)`, then `Image.open("x.dfc")` and `image.save("x.dfc", bpp=0.05)`."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import IO

from diffusers import DiffusionPipeline
from PIL import Image, ImageFile

from diffusers_compress.codecs import codec_of
from diffusers_compress.contract import key_of
from diffusers_compress.files import write_file
from diffusers_compress.format import container
from diffusers_compress.format.limits import DEFAULT_LIMITS

FORMAT, SUFFIX = "DFC", ".dfc"
# Codec -> its pipeline and options of `decompress`; the first one saves
registered: dict[str, tuple[DiffusionPipeline, dict]] = {}


def register(pipe: DiffusionPipeline, **options) -> None:
    """Let Pillow read files of this pipeline's codec and model, and write such files.

    Call it once for each codec. `options` are those of `pipe.decompress`, such as num_inference_steps. To `save` belong those of
    `pipe.compress`, with `bpp` for `target_bpp`, and `codec="..."`, a name in `contract.CODECS`, where several are registered.
    """
    registered[key_of(pipe)] = pipe, options
    Image.register_open(FORMAT, CompressedImageFile, lambda prefix: prefix[0] == 0xDF and prefix[1] & 0xF0 == 0xC0)
    Image.register_save(FORMAT, save)
    Image.register_extension(FORMAT, SUFFIX)
    Image.register_mime(FORMAT, "image/x-dfc")
    if not hasattr(Image.Image.save, "keeps_old_files"):
        Image.Image.save = keep_old_files(Image.Image.save)


def keep_old_files(save: Callable) -> Callable:
    """`Image.save`, but a file of ours is written once it is compressed: Pillow empties the old one before it calls the hook."""

    @functools.wraps(save)
    def whole(image: Image.Image, fp, format: str | None = None, **params) -> None:
        path = os.fsdecode(fp) if isinstance(fp, (str, bytes, os.PathLike)) else ""
        suffix = os.path.splitext(path)[1].lower()
        if not path or (format or Image.EXTENSION.get(suffix, "")).upper() != FORMAT:
            return save(image, fp, format, **params)
        buffer = BytesIO()
        save(image, buffer, FORMAT, **params)
        write_file(path, buffer.getvalue(), overwrite=True)

    whole.keeps_old_files = True
    return whole


class CompressedImageFile(ImageFile.ImageFile):
    """Tells its size at once; the model is called when the pixels are wanted.

    Pillow's own limits of a picture's size hold (`Image.MAX_IMAGE_PIXELS`). Raises kinds of `BitstreamError`, and ValueError where no
    pipeline of the file's codec is registered.
    """

    format = FORMAT
    format_description = "Compressed by a diffusion model"

    def _open(self) -> None:
        self.data = self.fp.read()
        limits = replace(DEFAULT_LIMITS, pixels=math.inf)
        header, _ = container.read_header(self.data, limits)
        self._mode, self._size = "RGB", (header.width, header.height)
        self.codec = codec_of(self.data, limits)
        self.info = {"codec": self.codec, "bpp": 8 * len(self.data) / (header.width * header.height)}

    def load(self):
        if self.data is not None:
            if self.codec not in registered:
                raise ValueError(f"the file needs a {self.codec} pipeline; registered: {', '.join(registered) or 'none'}")
            pipe, options = registered[self.codec]
            limits = replace(DEFAULT_LIMITS, pixels=max(DEFAULT_LIMITS.pixels, self.width * self.height))
            image = pipe.decompress(self.data, **{"limits": limits, **options}).images[0]
            self.data, self.fp = None, BytesIO(image.tobytes())
            self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, "RGB")]
        return super().load()


def save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """Pillow's hook for `Image.save`."""
    options = dict(image.encoderinfo)
    codec = options.pop("codec", next(iter(registered)))
    if codec not in registered:
        raise ValueError(f"codec must be one of {', '.join(registered)}, not {codec!r}")
    if "bpp" in options:
        options["target_bpp"] = options.pop("bpp")
    file.write(registered[codec][0].compress(image, **options).bitstreams[0])
