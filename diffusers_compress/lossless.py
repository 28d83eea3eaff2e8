"""Files that give back every pixel, of codecs that are lossy by themselves: docs/lossless.md.

The lossy file stays as it is. Behind it the pixels are coded, each from its neighbours and, if the codec has a `prediction` that saves bytes,
from that picture. Both ends must have the same prediction: it is computed in float64, and rounded so that values keep clear of the edges. If
it comes out differently all the same, the digest in the file tells.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_compress import images
from diffusers_compress.coding import pixel_model
from diffusers_compress.coding.channels import dither
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import WrongModel
from diffusers_compress.format import lossless as format
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits
from diffusers_compress.outputs import CompressOutput, DecompressOutput

ARGUMENT = """
            lossless: let the pixels themselves follow, to be had from the file bit by bit. The rate then is that of the lossy part, and the file
                as large as the pixels need."""


def encodes(lossy: Callable) -> Callable:
    """A codec's `compress`, with a further argument `lossless`."""
    own = inspect.signature(lossy)
    argument = inspect.Parameter("lossless", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    signature = own.replace(parameters=[*own.parameters.values(), argument])

    @functools.wraps(lossy)
    def with_option(self: Any, *arguments: Any, **options: Any) -> CompressOutput:
        given = signature.bind(self, *arguments, **options).arguments
        lossless = given.pop("lossless", False)
        pictures = [images.to_tensor(picture)[0] for picture in images.as_list(given["image"])] if lossless else []
        if not all(map(images.is_8_bit, pictures)):
            raise ValueError("lossless files hold 8 bits a sample, and this picture has more; round it first")
        if any(max(x.shape) > format.MAX_SIDE for x in pictures):
            raise ValueError(f"lossless files hold sides of at most {format.MAX_SIDE} pixels")
        out = lossy(**given)
        if not lossless:
            return out
        files = [extended(self, data, x) for data, x in zip(out.bitstreams, pictures)]
        bpp = [8 * len(data) / x[0].numel() for data, x in zip(files, pictures)]
        return CompressOutput(bitstreams=files, bpp=bpp, notes=out.notes)

    with_option.__signature__ = signature  # type: ignore[attr-defined]
    with_option.__doc__ = (lossy.__doc__ or "").replace("\n\n        Raises:", f"{ARGUMENT}\n\n        Raises:", 1)
    return with_option


def decodes(lossy: Callable) -> Callable:
    """A codec's `decompress`, able to read lossless files. Of one that was cut it gets the lossy part."""
    signature = inspect.signature(lossy)

    @functools.wraps(lossy)
    def of_any(self: Any, *arguments: Any, **options: Any) -> DecompressOutput:
        given = signature.bind(self, *arguments, **options).arguments
        bitstreams, limits = given["bitstreams"], given.get("limits", DEFAULT_LIMITS)
        files: list = [bitstreams] if isinstance(bitstreams, (bytes, bytearray)) else list(bitstreams)
        found = {i: file for i, data in enumerate(files) if (file := format.read(data, limits)) is not None}
        if not found:
            return lossy(**given)
        if given.get("num_images_per_prompt", 1) != 1:
            raise ValueError("num_images_per_prompt must be 1: a lossless file holds one picture; `extract` gives its lossy part")
        exact = {i: file for i, file in found.items() if file.pixels is not None}
        rest = [i for i in range(len(files)) if i not in exact]
        given["bitstreams"] = [found[i].lossy if i in found else files[i] for i in rest]
        out = lossy(**given)
        pictures, notes = dict(zip(rest, out.images)), dict(zip(rest, out.notes))
        for i in found.keys() - exact.keys():
            notes[i] = [*notes[i], "the file was cut before its last pixel: this is its lossy part"]
        notes |= zip(exact, self.check_model([file.header for file in exact.values()], given.get("allow_other_model", False)))
        for i, file in exact.items():
            pictures[i] = images.to_output(picture_of(self, file, limits)[None], given.get("output_type", "pil"))[0]
        order, drift = range(len(files)), dict(zip(rest, out.drift or []))
        return DecompressOutput(
            images=[pictures[i] for i in order],
            notes=[notes[i] for i in order],
            drift=None if out.drift is None else [drift.get(i) for i in order],
        )

    return of_any


def extended(pipe: Any, lossy: bytes, x: Tensor) -> bytes:
    """A lossless file of the picture x [3, H, W] in [-1, 1], 8 bits a sample, from its lossy file."""
    picture, places = ((x + 1) * 127.5).round().byte().numpy(), places_of(pipe, lossy, DEFAULT_LIMITS)
    alone = format.pack(lossy, None, coded(picture))
    if places is None:
        return alone
    nudge = dither.nudge_of([places])
    like = rounded(places, nudge)
    predicted = format.pack(lossy, format.Prediction(nudge, digest_of(like)), coded(picture, like))
    return min(alone, predicted, key=len)


def coded(picture: np.ndarray, like: np.ndarray | None = None) -> bytes:
    encoder = Encoder()
    pixel_model.encode(encoder, picture, like)
    return encoder.getvalue()


def picture_of(pipe: Any, file: format.LosslessFile, limits: Limits) -> Tensor:
    """The picture [3, H, W] in [-1, 1] that a whole lossless file holds. WrongModel if its prediction comes out differently here."""
    like = None
    if file.prediction is not None:
        places = places_of(pipe, file.lossy, limits)
        like = None if places is None else rounded(places, file.prediction.nudge)
        if like is None or digest_of(like) != file.prediction.digest:
            raise WrongModel(
                "the pixels were predicted from a picture that comes out differently here: these are other weights, such as those of another "
                "dtype, or float64 is not computed alike on this machine or by this torch; load the file's own model with dtype float32. "
                "`diffusers-compress extract` gives the lossy file, which decodes here"
            )
    picture = pixel_model.decode(Decoder(file.pixels or b""), (file.header.height, file.header.width), like)
    return torch.from_numpy(picture) / 127.5 - 1


def places_of(pipe: Any, lossy: bytes, limits: Limits) -> np.ndarray | None:
    """The picture that predicts [3, H, W], pixels and what lies between them, plus 1/2; None if the codec or the weights allow of none."""
    x = pipe.prediction(lossy, limits)
    return None if x is None else ((x.double().clamp(-1, 1) + 1) * 127.5 + 0.5).numpy()


def rounded(places: np.ndarray, nudge: int) -> np.ndarray:
    """Pixels, rounded so that no machine rounds otherwise: `dither.nudge_of`."""
    return np.floor(places + nudge / dither.NUDGES).clip(0, 255).astype(np.uint8)


def digest_of(picture: np.ndarray) -> bytes:
    return hashlib.blake2b(picture.tobytes(), digest_size=format.DIGEST_BYTES).digest()
