"""What a file says of its samples and Pillow drops or reads wrongly: chunks of PNG, tags of TIFF, boxes of AVIF."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

# TIFF 6.0, sections 8, 11, 16, 18, 20 to 22
BITS, PHOTOMETRIC, SAMPLES, PLANAR, TRANSFER, WHITE, PRIMARIES = 258, 262, 277, 284, 301, 318, 319
COLOUR_MAP, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, ICC = 320, 332, 338, 339, 34675
COEFFICIENTS, SUBSAMPLING, REFERENCE = 529, 530, 532
WHITE_IS_ZERO, RGB, CMYK, YCBCR, LAB = 0, 2, 5, 6, 8  # values of PHOTOMETRIC
SIGNED, FLOAT = 2, 3  # values of SAMPLE_FORMAT

# Formats of which Pillow says which sample is white in its deep grey modes, I and I;16.
DEEP_GREY = ("PNG", "TIFF", "PPM", "JPEG2000")
TAKEN_AS_SRGB = "floating-point samples taken as sRGB"


class Stored(NamedTuple):
    """How a file stores its samples, where Pillow's picture does not say it."""

    bits: int = 0  # per sample; 0 where Pillow's mode says it
    white_is_zero: bool = False  # and Pillow has not undone it
    cicp: tuple[int, int, int, int] | None = None  # ITU-T H.273: colour primaries, transfer function, matrix, full range
    notes: tuple[str, ...] = ()


class Misread(ValueError):
    """Pillow would read the samples wrongly, and nothing can mend that."""


def stored(image: Image.Image) -> Stored:
    """What the file of this picture says. Raises Misread.

    PNG and AVIF tell it only before `image.load()`: `open_image` keeps it in `image.info`, which goes on to crops and copies.
    """
    if "stored" in image.info:
        return image.info["stored"]
    if isinstance(image, TiffImageFile):
        return _tiff(image)
    file = getattr(image, "fp", None)
    if image.format in ("PNG", "AVIF") and file is not None:
        position = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(position)
        return _png(data, image.info) if image.format == "PNG" else _avif(data, image.info)
    if image.mode.startswith("I") and image.format and image.format not in DEEP_GREY:
        raise Misread(f"{image.format} of mode {image.mode}, which does not say what sample is white")
    return Stored(notes=(TAKEN_AS_SRGB,) if image.mode == "F" and image.format else ())


def _png(data: bytes, info: dict) -> Stored:
    chunks = dict(_chunks(data))
    bits, cicp = chunks[b"IHDR"][8], tuple(chunks.get(b"cICP", b""))
    if bits == 16 and isinstance(info.get("transparency"), tuple):  # Pillow compares all 16 bits with the 8 that it reads
        raise Misread("PNG of 16 bits with a transparent colour (tRNS); convert it first")
    return Stored(bits, cicp=cicp if len(cicp) == 4 else None)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of a PNG's chunks up to its samples."""
    position = 8
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"IDAT":
            return
        yield name, data[position + 8 : position + 8 + length]
        position += 12 + length


def _avif(data: bytes, info: dict) -> Stored:
    """Boxes of ISO/IEC 23000-22: the first `av1C` and `colr` are the picture's. libavif undoes the matrix and the range."""
    configuration, colours = data.find(b"av1C"), data.find(b"colrnclx")
    depth = data[configuration + 6] >> 5 & 3 if configuration >= 0 else 0  # high_bitdepth, twelve_bit
    cicp = None
    if colours >= 0 and "icc_profile" not in info:
        cicp = (*struct.unpack_from(">HH", data, colours + 8), 0, 1)
    return Stored({2: 10, 3: 12}.get(depth, 8), cicp=cicp)


def _tiff(image: TiffImageFile) -> Stored:
    tags, by_pillow = image.tag_v2, image.info["compression"] == "raw"  # compressed files are read by libtiff
    photometric, bits, formats = tags.get(PHOTOMETRIC), tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (1,))
    planes, jpeg = tags.get(PLANAR, 1) == 2 and tags.get(SAMPLES, 1) > 1, image.info["compression"] in ("jpeg", "tiff_jpeg")
    ycbcr = photometric == YCBCR and (by_pillow or jpeg)
    fault = None
    if photometric is None:
        fault = "no PhotometricInterpretation, so black and white are not told apart"
    elif SIGNED in formats:
        fault = "signed samples"
    elif bits == 32 and FLOAT not in formats:
        fault = "integers of 32 bits"
    elif photometric == CMYK and tags.get(INK_SET, 1) != 1:
        fault = "other inks than CMYK"
    elif planes and (photometric == LAB or by_pillow and (bits != 8 or photometric not in (RGB, CMYK))):
        fault = "samples in planes, in a kind that Pillow mixes up"
    elif photometric == YCBCR and by_pillow and tags.get(SUBSAMPLING, (2, 2)) != (1, 1):
        fault = "uncompressed YCbCr with subsampled colours"
    elif ycbcr and not _near(tags.get(COEFFICIENTS), (0.299, 0.587, 0.114)):
        fault = "YCbCr of other coefficients than JPEG's"
    elif ycbcr and not _near(tags.get(REFERENCE), (0, 255, 128, 255, 128, 255)):
        fault = "YCbCr of another range than JPEG's"
    elif photometric == RGB and not _near(tags.get(REFERENCE), (0, 2**bits - 1) * 3):
        fault = "RGB of narrow range"
    if fault:
        raise Misread(f"TIFF with {fault}; convert it first")

    colour_map = tags.get(COLOUR_MAP, ())
    if image.mode in ("P", "PA") and colour_map and max(colour_map) < 256:  # 8-bit values, where TIFF asks for 16 bits
        image.putpalette(bytes(colour_map), "RGB;L")
    notes = []
    if 0 in tags.get(EXTRA_SAMPLES, ()):
        notes.append("extra channels not stored")
    if ICC not in tags and any(tag in tags for tag in (TRANSFER, WHITE, PRIMARIES)):
        notes.append("TIFF's colour tags neither applied nor stored")
    if FLOAT in formats:
        notes.append(TAKEN_AS_SRGB)
    return Stored(bits, photometric == WHITE_IS_ZERO and image.mode.startswith(("I", "F")), notes=tuple(notes))


def _near(values: tuple | None, wanted: tuple) -> bool:
    """Whether the tag is absent or says what is taken for granted."""
    try:
        return values is None or all(abs(a - b) < 2e-3 for a, b in zip(values, wanted, strict=True))
    except (TypeError, ValueError):  # not numbers, or not so many
        return False
