"""Picture files and PIL images -> samples in sRGB."""

import io
import os

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from diffusers_compress.files import open_regular
from diffusers_compress.images import colour, headers

# EXIF tags that tell of the picture: description, make, model, software, date, artist, XMP, copyright, EXIF and GPS blocks.
EXIF = {0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x02BC, 0x8298, 0x8769, 0x8825}
METADATA = {"xmp", "XML:com.adobe.xmp", "photoshop", "comment"}


def open_image(path: str | os.PathLike) -> Image.Image:
    """A picture, fully read. OSError without a regular file, ValueError if Pillow cannot read it rightly or fears a bomb."""
    with open_regular(path) as file:
        return read_image(file.read(), path)


def read_image(data: bytes, path: str | os.PathLike | None = None) -> Image.Image:
    """As `open_image`, of the bytes of a file; `path` is what errors call it."""
    name = f"{path}: " if path else ""
    try:
        image = Image.open(io.BytesIO(data))
        image.info["stored"] = stored = headers.stored(image)
        image.load()
        colour.colour_space(image, stored)  # raises what `samples_of` would, with the file's name
    except headers.Misread as error:
        raise ValueError(f"{name}{error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}{error}; raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}not a picture that Pillow can read{_kind_of_tiff(data)}") from error
    except Exception as error:  # Pillow's readers raise many kinds for broken files
        raise ValueError(f"{name}not a picture that Pillow can read ({error})") from error
    return image


def _kind_of_tiff(data: bytes) -> str:
    """What a TIFF says of its samples, in brackets; nothing for other files."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        numbers = [tags.get(tag) for tag in (headers.PHOTOMETRIC, headers.BITS, headers.SAMPLE_FORMAT)]
    except Exception:  # no TIFF, or a broken one
        return ""
    return " (TIFF of PhotometricInterpretation {}, BitsPerSample {}, SampleFormat {})".format(*numbers)


def samples_of(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Samples [H, W] or [H, W, C] in [0, 1] of a PIL image, upright and in sRGB, last channel alpha if C is 2 or 4; and notes."""
    stored = headers.stored(image)
    notes = list(stored.notes)
    if (frames := getattr(image, "n_frames", 1)) > 1:
        notes.append(f"one of {frames} frames stored")
    if EXIF & set(image.getexif()) or METADATA & set(image.info) or getattr(image, "text", None):
        notes.append("EXIF and other metadata not stored")
    bits = stored.bits or (16 if image.mode.startswith("I") else 8)
    if bits > 8:
        notes.append(f"{bits} bits per sample stored as 8")
    space = colour.colour_space(image, stored)
    image = ImageOps.exif_transpose(image)
    if stored.cicp:  # goes before a profile
        image.info.pop("icc_profile", None)
    read = _deep_grey if image.mode.startswith(("I", "F")) else _eight_bits
    samples, alpha = read(image, bits, notes)
    if stored.white_is_zero:
        samples = 1 - samples
    if "icc_profile" in image.info and read is _deep_grey:
        samples = colour.deep_grey_to_srgb(samples, image.info["icc_profile"], notes)
    if space:
        samples = colour.to_srgb(samples, space)
        notes.append(f"colours converted to sRGB ({space.name})")
    return (samples if alpha is None else np.dstack([samples, alpha])), notes


def _deep_grey(image: Image.Image, bits: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples [H, W, 1] of mode I, I;16 or F in [0, 1], and alpha."""
    samples = np.asarray(image)[..., None]
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else (samples != transparent).astype(np.float32)
    return unit_range(samples, 1 if image.mode == "F" else 2**bits - 1), alpha


def _eight_bits(image: Image.Image, bits: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples [H, W, 1 or 3] of any other mode in [0, 1], its ICC profile applied, and alpha."""
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    profile = "icc_profile" in image.info
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    if image.mode == "La":  # Pillow has no way from here to RGBA
        image = image.convert("LA")
    if image.mode == "LAB":
        notes.append("CIELAB converted to sRGB")
        image, profile = colour.lab_to_rgb(image), False
    if image.mode == "L" and bits < 8 and isinstance(image.info.get("transparency"), int):
        # Pillow stretches the samples to 8 bits, and leaves the transparent one as it was
        image.info["transparency"] = image.info["transparency"] * 255 // (2**bits - 1)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=np.float32)[..., None] / 255
    flat = image if image.mode == "CMYK" else image.convert(mode)
    if profile:
        flat = colour.profile_to_srgb(flat, image.info["icc_profile"], notes)
    samples = np.asarray(flat.convert(mode), dtype=np.float32) / 255
    return (samples[..., None] if samples.ndim == 2 else samples), alpha


def unit_range(samples: np.ndarray, white: int) -> np.ndarray:
    """Samples as float32 in [0, 1], where `white` is 1. ValueError if any is outside."""
    if samples.size:
        low, high = samples.min(), samples.max()
        if not (low >= 0 and high <= white):  # written so that NaN fails too
            kind = "floating-point samples" if samples.dtype.kind == "f" else "samples"
            raise ValueError(f"{kind} range over [{low}, {high}], permitted is [0, {white}]")
    return samples.astype(np.float32) / np.float32(white)
