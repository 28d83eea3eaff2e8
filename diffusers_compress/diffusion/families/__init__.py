"""What differs between families of diffusion models: a small class for each, found from a pipeline's components.

A family is a denoiser with its latents: pictures to x_0 and back, the conditioning on a prompt, and its output for x_t at
timestep t, which `schedule` and `equations` turn into x_0_hat. All else is the same for all of them. A new family is one class more.
"""

import inspect
from collections.abc import Collection, Mapping

import diffusers
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import config_of
from diffusers_compress.diffusion.families.flux import Flux
from diffusers_compress.diffusion.families.flux_2 import Flux2
from diffusers_compress.diffusion.families.hunyuan_dit import HunyuanDiT
from diffusers_compress.diffusion.families.kolors import Kolors
from diffusers_compress.diffusion.families.lumina_2 import Lumina2
from diffusers_compress.diffusion.families.pixart import PixArt
from diffusers_compress.diffusion.families.pixels import Pixels
from diffusers_compress.diffusion.families.qwen_image import QwenImage
from diffusers_compress.diffusion.families.sana import Sana
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.diffusion.families.stable_diffusion_3 import StableDiffusion3
from diffusers_compress.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from diffusers_compress.diffusion.families.z_image import ZImage

FAMILIES = (
    *(StableDiffusion, StableDiffusionXL, Kolors, StableDiffusion3, Flux, Flux2, Sana, PixArt, HunyuanDiT, Lumina2, QwenImage),
    *(ZImage, Pixels),
)
KNOWN = {family.network_class for family in FAMILIES}
NETWORKS = ("unet", "transformer")
VIDEO = ("3D", "Motion", "SpatioTemporal", "Video", "Temporal")


def family_of(pipe: DiffusionPipeline) -> StableDiffusion:
    """The family that a pipeline's components belong to. ValueError if it is none of these, or components are missing."""
    configs = ((family, config_of(pipe, family.network, family.network_class)) for family in FAMILIES)
    family = next((family for family, config in configs if config is not None and family.matches(config)), None)
    if family is None:
        networks = (getattr(pipe, name, None) for name in NETWORKS)
        raise unknown([type(network).__name__ for network in networks if network is not None])
    missing = [name for name in family.parts if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"a {family.__name__} model needs the components {', '.join(family.parts)}; missing: {', '.join(missing)}"
        )
    return family(pipe)


def check_index(index: Mapping, given: Collection[str]) -> dict[str, str]:
    """The names and classes of diffusers' networks in a folder's model_index.json, but for those that are given as arguments.
    ValueError if no family has such a network."""
    listed = {name: index[name] for name in NETWORKS if name in index and name not in given}
    names = {name: network for name, (library, network) in listed.items() if library == "diffusers"}
    unheard = [network for network in names.values() if network not in KNOWN]
    if unheard or not (listed or set(NETWORKS) & set(given)):
        raise unknown(unheard, f"{index.get('_class_name')}: ")
    return names


def check_config(network: str, config: Mapping, what: str) -> None:
    """ValueError if no family has a network of this class and config.json. what: the pipeline that it is of."""
    parameters = inspect.signature(getattr(diffusers, network).__init__).parameters
    whole = FrozenDict({name: parameter.default for name, parameter in parameters.items()} | dict(config))
    if not any(family.network_class == network and family.matches(whole) for family in FAMILIES):
        raise unknown([network], f"{what}: ")


def unknown(networks: list[str], what: str = "") -> ValueError:
    """The error for networks of these classes."""
    named = (f"{network} with other inputs" if network in KNOWN else network for network in networks)
    found = ", ".join(named) or f"no network named {' or '.join(NETWORKS)}"
    video = "a video model is not supported" if any(word in name for name in networks for word in VIDEO) else ""
    return ValueError(
        f"{what}{video or 'no family is known that has these components'} ({found}); supported are "
        f"{', '.join(family.models for family in FAMILIES)}, neither inpainting models nor refiners nor others with more inputs"
    )
