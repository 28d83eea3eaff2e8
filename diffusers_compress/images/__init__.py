"""Pictures of any kind <-> tensors [B, 3, H, W] in [-1, 1] in sRGB. docs/pictures.md is the table of what is read, and how."""

from diffusers_compress.images.reading import open_image, read_image
from diffusers_compress.images.tensors import as_list, crop, is_8_bit, pad, side_by_side, to_output, to_tensor

__all__ = ["as_list", "crop", "is_8_bit", "open_image", "pad", "read_image", "side_by_side", "to_output", "to_tensor"]
