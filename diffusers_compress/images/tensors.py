"""Pictures <-> tensors [B, 3, H, W] in [-1, 1]."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_compress.images.reading import samples_of, unit_range


def as_list(image) -> list:
    """The single pictures of a picture, a tensor [B, C, H, W] or an array [B, H, W, C], or a list of these."""
    pictures = []
    for item in image if isinstance(image, (list, tuple)) else [image]:
        pictures.extend(item if isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim == 4 else [item])
    if not pictures:
        raise ValueError("no picture given: the list is empty")
    return pictures


def to_tensor(image) -> tuple[torch.Tensor, list[str]]:
    """One picture as float32 [3, H, W] in [-1, 1] on the CPU, with notes in plain words of what that does not carry.

    Takes a PIL image of any mode, an array [H, W] or [H, W, C], or a tensor [C, H, W]: C of 1 or 3, one more for alpha; uint8,
    uint16, or floats in [0, 1] as in diffusers. EXIF orientation is applied, colours are converted to sRGB, transparency is shown
    on white. Mode I counts as 16 bits. docs/pictures.md has what is done with each kind of file. ValueError for anything else.
    """
    notes = []
    if isinstance(image, Image.Image):
        samples, notes = samples_of(image)
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
    if samples.dtype.kind == "u" and samples.dtype.itemsize <= 2:
        if samples.dtype.itemsize == 2:
            notes.append("16 bits per sample stored as 8")
        samples = unit_range(samples, np.iinfo(samples.dtype).max)
    elif samples.dtype.kind == "f":
        samples = unit_range(samples, 1)
    else:
        raise ValueError(f"samples are {samples.dtype}, permitted are uint8, uint16 and floats in [0, 1]")
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


def is_8_bit(x: torch.Tensor) -> bool:
    """Whether the samples of x, in [-1, 1], are multiples of 2/255, up to float32."""
    pixels = (x.double() + 1) * 127.5
    return bool((pixels - pixels.round()).abs().max() < 1e-3)


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
    samples = x.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return samples
    return [Image.fromarray(sample) for sample in np.rint(samples * 255).astype(np.uint8)]


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Both pictures in one, with a white gap between them."""
    canvas = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas
