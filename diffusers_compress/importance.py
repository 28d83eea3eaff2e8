"""Where a picture matters most: what users give as `importance`, as one map for each picture.

A map is a tensor [H, W] in [0, 1]: 1 where the bits are wanted most, 0 in the background.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers_compress import images

SALIENCY = "saliency"
SIDE = 64  # of the reduced picture in `saliency`
SHARE = 0.1  # of the picture that `saliency` finds most important

Importance = Any  # a map, boxes, a name or a function, or a list of these: see `maps_of`


def maps_of(importance: Importance, pictures: Sequence[Tensor]) -> list[Tensor | None]:
    """The map of each picture [3, H, W] in [-1, 1], its largest value 1. None: all of the picture matters alike.

    Args:
        importance: for all pictures, or a list with one for each of them:
            a picture of the same size, as a mask: PIL, an array [H, W] or a tensor [H, W], of truth values, uint8, or floats in [0, 1];
            a list of boxes (left, top, right, bottom) in pixels;
            "saliency", or "MODEL:LABEL+LABEL", what a segmentation model of transformers finds, see `segmenter`;
            a function that makes one of these from a PIL picture.

    Raises:
        ValueError: for anything else, a map of another size or number, or a box outside the picture.
    """
    each = importance if isinstance(importance, list) and not are_boxes(importance) else [importance] * len(pictures)
    if len(each) != len(pictures):
        raise ValueError(f"{len(each)} importance maps were given for {len(pictures)} pictures")
    functions = {name: named(name) for name in each if isinstance(name, str)}
    return [map_of(functions.get(own, own) if isinstance(own, str) else own, x) for own, x in zip(each, pictures)]


def map_of(importance: Importance, x: Tensor) -> Tensor | None:
    if callable(importance):
        importance = importance(images.to_output(x[None])[0])
    if importance is None:
        return None
    height, width = x.shape[-2:]
    values = boxes_map(importance, height, width) if are_boxes(importance) else mask_values(importance)
    if values.shape != (height, width):
        raise ValueError(f"the importance map has {values.shape[1]}x{values.shape[0]} pixels, the picture {width}x{height}")
    return values / values.max() if values.max() > 0 else None


def are_boxes(importance: Importance) -> bool:
    def is_box(box):
        return isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(side, (int, float)) for side in box)

    return isinstance(importance, (list, tuple)) and all(map(is_box, importance))


def boxes_map(boxes: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    values = torch.zeros(height, width)
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"box {(left, top, right, bottom)} is empty or not within the picture of {width}x{height} pixels")
        values[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = 1
    return values


def mask_values(mask: Any) -> Tensor:
    """A mask of any kind as [H, W] in [0, 1]; colours count by their mean."""
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy()
    if isinstance(mask, np.ndarray):
        mask = mask.astype(np.float32) if mask.dtype == bool else mask
        if mask.ndim != 2:
            raise ValueError(f"an importance map has the shape [H, W], not {list(mask.shape)}")
    if not isinstance(mask, (Image.Image, np.ndarray)):
        raise ValueError(f"importance is a {type(mask).__name__}, permitted are maps, boxes, names and functions")
    return images.to_tensor(mask)[0].mean(0) / 2 + 0.5


def on_latent(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [H, W] of a padded picture on the grid of its latent, [h, w]: the largest value within each position."""
    return F.adaptive_max_pool2d(values[None, None], size)[0, 0]


# ------------------------------------------------------------------------------------------------------------- what finds maps


def named(name: str) -> Callable:
    """What a name stands for: "saliency", or a segmenter."""
    return saliency if name == SALIENCY else segmenter(name)


def saliency(image: Image.Image) -> Tensor:
    """What stands out, found without weights: spectral residual.  Hou & Zhang 2007, "Saliency detection: a spectral residual approach".

    What is usual in a picture makes the smooth part of its log amplitude spectrum; the rest, taken back, shows where it is unusual.
    """
    x = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
    height, width = x.shape[1:]
    scale = SIDE / max(height, width)
    small = F.interpolate(x[None], [max(1, round(side * scale)) for side in (height, width)], mode="area")[0]
    spectrum = torch.fft.fft2(small)
    log_amplitude = spectrum.abs().clamp(min=1e-6).log()
    residual = log_amplitude - smoothed(log_amplitude, 3, "circular")
    residual[:, 0, 0] = -math.inf  # nor the mean colour
    unusual = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs().square().sum(0, keepdim=True)
    for _ in range(3):  # nearly a Gaussian
        unusual = smoothed(unusual, 5, "replicate")
    values = unusual / unusual.flatten().quantile(1 - SHARE).clamp(min=1e-12)
    return F.interpolate(values[None].clamp(max=1), (height, width), mode="bilinear")[0, 0]


def smoothed(x: Tensor, side: int, mode: str) -> Tensor:
    """Means over squares of this side, of x [C, h, w]."""
    reach = min(side // 2, *(length - 1 for length in x.shape[1:]))
    return F.avg_pool2d(F.pad(x[None], (reach,) * 4, mode=mode), 2 * reach + 1, 1)[0]


def segmenter(name: str, device: str = "cpu") -> Callable:
    """A function from a picture to the map of what a model finds there. name: "MODEL:LABEL+LABEL", with the folder or Hub id of a model that
    transformers runs for image segmentation, such as "facebook/mask2former-swin-tiny-coco-panoptic:person+dog".

    ValueError if it has no such labels.
    """
    model, _, labels = name.partition(":")
    if not labels:
        raise ValueError(
            f'importance is {name!r}, permitted names are "{SALIENCY}" and "MODEL:LABEL+LABEL" with a segmentation model'
        )
    from transformers import pipeline

    segment, wanted = pipeline("image-segmentation", model=model, device=device), set(labels.split("+"))
    known = set(segment.model.config.id2label.values())
    if missing := wanted - known:
        raise ValueError(f"{model} has no label {', '.join(sorted(missing))}; it has {', '.join(sorted(known))}")

    def found(image: Image.Image) -> np.ndarray:
        masks = [np.asarray(part["mask"]) for part in segment(image) if part["label"] in wanted]
        return np.max([np.zeros(image.size[::-1], np.uint8), *masks], axis=0)

    return found
