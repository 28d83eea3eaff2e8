"""What several families need."""

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor


def config_of(pipe: DiffusionPipeline, component: str, class_name: str) -> FrozenDict | None:
    """The config of a component of this class, compiled or not; None if there is no such."""
    module = getattr(pipe, component, None)
    module = getattr(module, "_orig_mod", module)
    return module.config if type(module).__name__ == class_name else None


def flow_time(timesteps: list[int], device: torch.device) -> Tensor:
    """What flow-matching networks are told of level t: sigma_t T = t + 1."""
    return torch.tensor(timesteps, device=device, dtype=torch.float32) + 1
