"""Stable Diffusion that follows a file: token ids as they are, a sketch through a ControlNet, the colours of a thumbnail."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion

ABSENT = 0.5  # the colour that stands for no thumbnail


@dataclass(frozen=True)
class Painting:
    """How `decompress` was asked to paint. ValueError for an argument out of its range."""

    num_inference_steps: int
    guidance_scale: float
    controlnet_conditioning_scale: float
    control_guidance_end: float
    strength: float
    realism: float = 1.0

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if not 0 <= self.control_guidance_end <= 1:
            raise ValueError(f"control_guidance_end must be from 0 to 1, not {self.control_guidance_end}")


def enlarged(thumbnail: Tensor, height: int, width: int) -> Tensor:
    """Colours [3, rows, columns] as a picture [3, height, width]."""
    return F.interpolate(thumbnail[None], (height, width), mode="bicubic")[0]


def control_image(sketch: Tensor | None, colours: Tensor | None, channels: int, height: int, width: int) -> Tensor:
    """[channels, height, width] in [0, 1]: the sketch [1, height, width] in all of 3 channels, as ControlNets have it; in the first of 4,
    and the colours [3, height, width] in [-1, 1] in the others.

    ValueError for other numbers of channels.
    """
    if channels not in (3, 4):
        raise ValueError(f"the ControlNet takes pictures of {channels} channels; a sketch has 3, with colours 4")
    lines = torch.zeros(1, height, width) if sketch is None else sketch
    if channels == 3:
        return lines.expand(3, -1, -1)
    colours = torch.full((3, height, width), ABSENT) if colours is None else (colours / 2 + 0.5).clamp(0, 1)
    return torch.cat([lines, colours])


def recoloured(x: Tensor, thumbnail: Tensor) -> Tensor:
    """A picture [3, H, W] whose means over the thumbnail's cells are about the thumbnail's [3, rows, columns]."""
    means = F.interpolate(x[None], thumbnail.shape[1:], mode="area")[0]
    return x + enlarged(thumbnail - means, *x.shape[1:])


def conditioning_of(
    pipe: DiffusionPipeline, sketch: Tensor | None, colours: Tensor | None, size: tuple[int, int], painting: Painting
) -> dict[str, Tensor]:
    """What `ControlledStableDiffusion.predict` needs beside the prompt, for one picture; {} if the ControlNet would see nothing of it.

    sketch: [1, H, W] in [0, 1]; colours: [3, rows, columns] in [-1, 1].
    """
    channels = 0 if pipe.controlnet is None else pipe.controlnet.config.conditioning_channels
    if not channels or (sketch is None and (colours is None or channels == 3)):
        return {}
    image = control_image(sketch, None if colours is None else enlarged(colours, *size), channels, *size)
    end = (1 - painting.control_guidance_end) * pipe.scheduler.config.num_train_timesteps
    return {
        "control": pipe.pad(image)[None].to(pipe._execution_device, pipe.controlnet.dtype),
        "control_scale": torch.tensor([painting.controlnet_conditioning_scale]),
        "control_end": torch.tensor([end]),
    }


class ControlledStableDiffusion(StableDiffusion):
    """Stable Diffusion with a ControlNet (Zhang et al. 2023), or without; its prompts are lists of token ids."""

    optional = ("controlnet",)

    def encode_prompt(self, prompts) -> dict[str, Tensor]:
        """What `predict` needs of B lists of token ids, an empty one for no prompt: tensors [B, ...]."""
        tokenizer = self.pipe.tokenizer
        begin, end, filler = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [[begin, *ids, end] for ids in prompts]
        length = tokenizer.model_max_length
        ids = torch.tensor([row + [filler] * (length - len(row)) for row in rows], device=self.pipe._execution_device)
        return {"text": self.pipe.text_encoder(ids)[0].to(self.pipe.unet.dtype)}

    def predict(self, x_t: Tensor, timesteps: list[int], conditioning: dict[str, Tensor]) -> Tensor:
        """As its base's, with the ControlNet's features added. `conditioning` may hold a control image "control" [1, channels, H, W], its
        weight "control_scale" [1], and the timestep "control_end" [1] below which it is not asked."""
        if "control" not in conditioning or timesteps[0] < conditioning["control_end"][0]:
            return super().predict(x_t, timesteps, conditioning)
        t, unet, controlnet = torch.tensor(timesteps, device=x_t.device), self.pipe.unet, self.pipe.controlnet
        text, scale = conditioning["text"], conditioning["control_scale"].item()
        seen = x_t.to(controlnet.dtype), t, text.to(controlnet.dtype), conditioning["control"]
        down, middle = controlnet(*seen, conditioning_scale=scale, return_dict=False)
        added = [features.to(unet.dtype) for features in (middle, *down)]
        residuals = {"mid_block_additional_residual": added[0], "down_block_additional_residuals": added[1:]}
        x_t = x_t.to(getattr(unet, "input_dtype", None) or unet.dtype)
        return unet(x_t, t, text, return_dict=False, **residuals)[0].float()
