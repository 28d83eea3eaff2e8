"""What several families need."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from torch import Tensor


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
    widths = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return 2 ** (len(widths) - 1)


def flow_time(timesteps: list[int], device: torch.device) -> Tensor:
    """The time of level t as flow-matching networks take it: sigma_t T = t + 1."""
    return torch.tensor(timesteps, device=device, dtype=torch.float32) + 1
