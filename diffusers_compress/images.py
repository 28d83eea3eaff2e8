"""Pictures of any kind <-> tensors [B, 3, H, W] in [-1, 1]."""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# EXIF tags that tell of the picture: description, make, model, software, date, artist, XMP, copyright, EXIF and GPS blocks.
EXIF = {0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x02BC, 0x8298, 0x8769, 0x8825}
METADATA = {"xmp", "XML:com.adobe.xmp", "photoshop", "comment"}


def open_image(path: str | os.PathLike) -> Image.Image:
    """A picture, fully read. ValueError if Pillow cannot read it or takes it for a decompression bomb; OSError without a file."""
    return read_image(Path(path).read_bytes(), path)


def read_image(data: bytes, path: str | os.PathLike) -> Image.Image:
    """As `open_image`, of the bytes of a file; `path` is what errors call it."""
    file = io.BytesIO(data)  # stays open: Pillow reads frames and metadata late
    try:
        image = Image.open(file)
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture that Pillow can read") from error
    except Exception as error:  # Pillow's readers raise many kinds for broken files
        raise ValueError(f"{path}: not a picture that Pillow can read ({error})") from error
    return image


def as_list(image) -> list:
    """The single pictures of a picture, a list of pictures, a tensor [B, C, H, W] or an array [B, H, W, C]."""
    if isinstance(image, (list, tuple)) or (isinstance(image, (torch.Tensor, np.ndarray)) and image.ndim == 4):
        if len(image) == 0:
            raise ValueError("no picture given: the list is empty")
        return list(image)
    return [image]


def to_tensor(image) -> tuple[torch.Tensor, list[str]]:
    """One picture as float32 [3, H, W] in [-1, 1] on the CPU, with notes in plain words of what that does not carry.

    Takes a PIL image of any mode but LAB and La, an array [H, W] or [H, W, C], or a tensor [C, H, W]: C of 1 or 3, one more for
    alpha; uint8, uint16, or floats in [0, 1] as in diffusers. EXIF orientation is applied, colours are converted to sRGB,
    transparency is shown on white. Mode I counts as 16 bits. (Pillow itself reads 16-bit colour files as 8 bits.) ValueError for
    anything else.
    """
    notes = []
    if isinstance(image, Image.Image):
        samples, notes = _from_pil(image)
    elif isinstance(image, np.ndarray):
        samples = image
    elif isinstance(image, torch.Tensor):
        if image.ndim != 3:
            raise ValueError(f"tensor has shape {tuple(image.shape)}, permitted is [C, H, W]")
        image = image.detach().cpu().permute(1, 2, 0)
        samples = (image.float() if image.is_floating_point() else image).numpy()
    else:
        raise ValueError(f"picture is a {type(image).__name__}, permitted are PIL images, numpy arrays and torch tensors")

    samples = samples[..., None] if samples.ndim == 2 else samples
    if samples.ndim != 3 or samples.shape[-1] not in (1, 2, 3, 4) or samples.size == 0:
        raise ValueError(f"picture has shape {samples.shape}, permitted are [H, W] and [H, W, C] with C of 1 to 4, none empty")
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        notes.append("16 bits per sample stored as 8")
    samples = _unit_range(samples)
    channels = samples.shape[-1]
    if channels in (2, 4):
        samples, alpha = samples[..., :-1], samples[..., -1:]
        if alpha.min() < 1:
            notes.append("alpha channel composited on white and not stored")
        samples = samples * alpha + (1 - alpha)
    if channels < 3:
        notes.append("greyscale stored as colour")
        samples = samples.repeat(3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(samples.transpose(2, 0, 1))) * 2 - 1, notes


def _unit_range(samples: np.ndarray) -> np.ndarray:
    """Samples as float32 in [0, 1]."""
    if samples.dtype.kind == "u" and samples.dtype.itemsize <= 2:
        return samples.astype(np.float32) / (255 if samples.dtype.itemsize == 1 else 65535)
    if samples.dtype.kind != "f":
        raise ValueError(f"samples are {samples.dtype}, permitted are uint8, uint16 and floats in [0, 1]")
    low, high = samples.min(), samples.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(f"floating-point samples range over [{low}, {high}], permitted is [0, 1]")
    return samples.astype(np.float32)


def _from_pil(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Samples [H, W] or [H, W, C] of a PIL image, upright and in sRGB, and notes."""
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"one of {image.n_frames} frames stored")
    if EXIF & set(image.getexif()) or METADATA & set(image.info) or getattr(image, "text", None):
        notes.append("EXIF and other metadata not stored")
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        if profile:
            notes.append("colour profile neither applied nor stored")
        samples = np.asarray(image)
        if image.mode == "I":
            if samples.min() < 0 or samples.max() > 65535:
                raise ValueError(f"samples of mode I range over [{samples.min()}, {samples.max()}], permitted is [0, 65535]")
            samples = samples.astype(np.uint16)
        return samples, notes
    if image.mode in ("LAB", "La"):  # Pillow cannot convert these to RGB
        raise ValueError(f"picture has mode {image.mode}; convert it to RGB first")

    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colour = image if image.mode == "CMYK" else image.convert(mode)
    if profile:
        colour = _to_srgb(colour, profile, notes)
    bands = [np.asarray(colour.convert(mode))] + ([np.asarray(alpha)] if alpha else [])
    return np.dstack(bands), notes


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """The image with its ICC profile applied; as it is, with a note, if the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError):
        notes.append("colour profile could not be applied; colours taken as sRGB")
        return image
    notes.append("colour profile converted to sRGB")
    return converted


def pad(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x [B, C, H, W] or [C, H, W] with its last row and column repeated until both sides are multiples of `multiple`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The top left [..., height, width] of x: undoes `pad`."""
    return x[..., :height, :width]


def to_output(x: torch.Tensor, output_type: str = "pil"):
    """x [B, 3, H, W] in [-1, 1] as a list of 8-bit images ("pil"), or in [0, 1]: [B, H, W, 3] ("np"), [B, 3, H, W] ("pt")."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type is {output_type!r}, permitted are 'pil', 'np' and 'pt'")
    x = (x.detach().float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    x = x.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return x
    return [Image.fromarray(sample) for sample in np.rint(x * 255).astype(np.uint8)]


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Both pictures in one, with a white gap between them."""
    canvas = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas
