"""Colours of any kind to sRGB: ICC profiles (by LittleCMS), and what PNG, AVIF and EXIF say without a profile."""

import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from diffusers_compress.images.headers import Misread, Stored

NOT_APPLIED = "colour profile could not be applied; colours taken as sRGB"
# x and y of white, red, green and blue, in the order of PNG's cHRM
D65 = (0.3127, 0.3290)
SRGB = (*D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
ADOBE_RGB = (*D65, 0.640, 0.330, 0.210, 0.710, 0.150, 0.060)
SMPTE_170M = (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070)
# ITU-T H.273, table 2; 2 is "unspecified"
PRIMARIES = {
    1: SRGB,
    2: SRGB,
    5: (*D65, 0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: SMPTE_170M,
    7: SMPTE_170M,
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
# The cone responses in which one white is adapted to another: Lam 1985, as in ICC.1:2022, annex E
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def decode_srgb(v: np.ndarray) -> np.ndarray:
    """Linear light of sRGB values: IEC 61966-2-1."""
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def encode_srgb(light: np.ndarray) -> np.ndarray:
    """sRGB values of linear light in [0, 1]: the inverse of `decode_srgb`."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def decode_power(v: np.ndarray, exponent: float) -> np.ndarray:
    """Linear light of values that are its (1 / exponent)th power."""
    return v**exponent


# ITU-T H.273, table 3. The curves of SDR video (1, 6, 14, 15) are those of cameras: screens show such pictures about as sRGB.
CURVES: dict[int, Callable] = dict.fromkeys((1, 2, 6, 13, 14, 15), decode_srgb)
CURVES |= {4: partial(decode_power, exponent=2.2), 5: partial(decode_power, exponent=2.8), 8: partial(decode_power, exponent=1)}
HDR = {16: "PQ", 18: "HLG"}


class ColourSpace(NamedTuple):
    """What red, green and blue of a picture mean."""

    name: str
    decode: Callable[[np.ndarray], np.ndarray]  # values in [0, 1] to linear light
    chromaticities: tuple[float, ...] = SRGB


def colour_space(image: Image.Image, stored: Stored) -> ColourSpace | None:
    """What a file without a profile says of its colours; None for sRGB. Raises Misread for what cannot be shown so.

    The order is that of the PNG specification: cICP, profile, sRGB, gAMA with cHRM. What only EXIF says (DCF 2.0) comes last.
    """
    info = image.info
    if stored.cicp:
        primaries, transfer, matrix, full_range = stored.cicp
        if transfer in HDR:
            raise Misread(f"HDR picture ({HDR[transfer]}); map its tones to sRGB first")
        if primaries not in PRIMARIES or transfer not in CURVES or matrix != 0 or full_range != 1:
            raise Misread(f"colours of cICP {'-'.join(map(str, stored.cicp))}; convert them to sRGB first")
        space = ColourSpace("cICP", CURVES[transfer], PRIMARIES[primaries])
    elif "icc_profile" in info or "srgb" in info:
        return None
    elif info.get("gamma") or "chromaticity" in info:
        gamma, chromaticities = info.get("gamma") or 0.45455, info.get("chromaticity", SRGB)
        # 1 / 2.2 is how the PNG specification writes sRGB's curve
        decode = decode_srgb if abs(gamma - 0.45455) < 0.002 else partial(decode_power, exponent=1 / gamma)
        space = ColourSpace("gAMA, cHRM", decode, chromaticities)
    elif _is_adobe_rgb(image.getexif()):
        space = ColourSpace("EXIF: Adobe RGB", partial(decode_power, exponent=563 / 256), ADOBE_RGB)
    else:
        return None
    if space.decode is decode_srgb and np.allclose(space.chromaticities, SRGB, atol=2e-3):
        return None
    if rgb_to_xyz(space.chromaticities) is None:
        return ColourSpace("gAMA; cHRM says no colours", space.decode)
    return space


def _is_adobe_rgb(exif: Image.Exif) -> bool:
    """DCF 2.0: ColorSpace says "uncalibrated" and the interoperability index says R03; some cameras write ColorSpace 2."""
    try:
        return exif.get_ifd(0x8769).get(0xA001) == 2 or exif.get_ifd(0xA005).get(1) == "R03"
    except Exception:  # Pillow raises many kinds for broken EXIF
        return False


def to_srgb(samples: np.ndarray, space: ColourSpace) -> np.ndarray:
    """Samples [H, W, 1 or 3] in [0, 1] of this colour space, as sRGB in float32."""
    light = space.decode(samples)
    if samples.shape[-1] == 3:
        light = light @ rgb_to_srgb(space.chromaticities).T.astype(np.float32)
    return encode_srgb(light.clip(0, 1)).astype(np.float32)


def rgb_to_srgb(chromaticities: tuple[float, ...]) -> np.ndarray:
    """The matrix [3, 3] from linear red, green and blue of these chromaticities to linear sRGB, white to white."""
    source, target = rgb_to_xyz(chromaticities), rgb_to_xyz(SRGB)
    cones = (BRADFORD @ target.sum(1)) / (BRADFORD @ source.sum(1))
    adapted = np.linalg.solve(BRADFORD, cones[:, None] * BRADFORD)
    return np.linalg.solve(target, adapted @ source)


def rgb_to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray | None:
    """The matrix [3, 3] from linear red, green and blue to XYZ; None if these are no colours."""
    x, y = np.reshape(chromaticities, (4, 2)).T
    if min(y) <= 0:
        return None
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    primaries = np.stack(colours, axis=1)
    if abs(np.linalg.det(primaries)) < 1e-6:
        return None
    return primaries * np.linalg.solve(primaries, white)


def profile_to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """The image (mode L, RGB or CMYK) with its ICC profile applied; as it is if that changes nothing, or, with a note, fails."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode != "CMYK" and _changes_nothing(transform, image.mode):
            return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ImportError):
        notes.append(NOT_APPLIED)
        return image
    notes.append("colour profile converted to sRGB")
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform to sRGB moves no colour by more than two levels of 255. A profile's name proves nothing."""
    levels = np.linspace(0, 255, 256 if mode == "L" else 17).round().astype(np.uint8)
    grid = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, 289, 3)
    probe = Image.fromarray(grid)
    before, after = (np.asarray(x, dtype=int) for x in (probe.convert("RGB"), ImageCms.applyTransform(probe, transform)))
    return bool(np.abs(after - before).max() <= 2)


def deep_grey_to_srgb(samples: np.ndarray, profile: bytes | None, notes: list[str]) -> np.ndarray:
    """Grey samples in [0, 1] of any depth with their ICC profile applied: by its values at 256 levels, and lines between them."""
    levels = np.arange(256, dtype=np.uint8)
    curve = profile_to_srgb(Image.fromarray(levels[None]), profile, notes).convert("L")
    if np.array_equal(curve, levels[None]):
        return samples
    return np.interp(samples, levels / 255, np.asarray(curve)[0] / 255).astype(np.float32)


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """CIELAB with the white point D50 to sRGB. ValueError where Pillow has no LittleCMS."""
    try:
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    except (ImageCms.PyCMSError, ImportError) as error:
        raise ValueError(f"picture has mode LAB; convert it to RGB first ({error})") from error
