"""What several families need."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def config_of(pipe: DiffusionPipeline, component: str, class_name: str) -> FrozenDict | None:
    """The config of a component of this class or one derived from it, compiled or not; None if there is no such."""
    compiled = getattr(pipe, component, None)
    module: Any = getattr(compiled, "_orig_mod", compiled)
    return module.config if class_name in (base.__name__ for base in type(module).__mro__) else None


def mean_of(encoded: BaseOutput) -> Tensor:
    """The mean latent in the output of any autoencoder's `encode`."""
    if hasattr(encoded, "latent_dist"):  # AutoencoderKL
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent  # AutoencoderTiny, AutoencoderDC


def scale_factor_of(vae: ModelMixin | None) -> int:
    """Pixels along a side of a latent pixel; 1 without an autoencoder."""
    if vae is None:
        return 1
    names = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels", "dim_mult")
    widths = next(vae.config[name] for name in names if vae.config.get(name))
    return 2 ** (len(widths) - 1)


def flow_time(timesteps: list[int], device: torch.device) -> Tensor:
    """The time of level t as flow-matching networks take it: sigma_t T = t + 1."""
    return torch.tensor(timesteps, device=device, dtype=torch.float32) + 1


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] to one token for each 2x2 pixels, [B, h/2 w/2, 4C]."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """`pack` undone: [B, C, height, width]."""
    return F.pixel_shuffle(tokens.mT.unflatten(-1, (height // 2, width // 2)), 2)


def one_by_one(embed: Callable[[str], dict[str, Tensor]], prompts: list[str]) -> dict[str, Tensor]:
    """The conditioning on each prompt, together. In a batch a language model would round otherwise, and files would change."""
    found = [embed(prompt) for prompt in prompts]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def padded(texts: list[Tensor]) -> dict[str, Tensor]:
    """Texts [length, dim] of different lengths as a conditioning: `text` [B, L, dim] and `length` [B], the latter on the CPU."""
    return {"text": pad_sequence(texts, batch_first=True), "length": torch.tensor([len(text) for text in texts])}


def by_length(predict: Callable, x_t: Tensor, timesteps: list[int], conditioning: dict[str, Tensor]) -> Tensor:
    """predict(x_t, timesteps, text [B, length, dim]) for those of a batch whose texts are alike in length.

    Without padding no picture's output depends on the prompts beside it.
    """
    lengths = conditioning["length"].tolist()
    output = torch.empty_like(x_t, dtype=torch.float32)
    for length in sorted(set(lengths)):
        rows = [i for i, own in enumerate(lengths) if own == length]
        output[rows] = predict(x_t[rows], [timesteps[i] for i in rows], conditioning["text"][rows, :length])
    return output
