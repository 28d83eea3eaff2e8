"""What differs between families of diffusion models: a small class for each, found from a pipeline's components.

A family is a denoiser with its latents: pictures to x_0 and back, the conditioning on a prompt, and its output for x_t at
timestep t, which `schedule` and `equations` turn into x_0_hat. All else is the same for all of them. A new family is one class more.
"""

from collections.abc import Mapping

from diffusers import DiffusionPipeline

from diffusers_compress.diffusion.families.flux import Flux
from diffusers_compress.diffusion.families.flux_2 import Flux2
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
    *(StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2, Sana, PixArt, Lumina2, QwenImage, ZImage, Pixels),
)
NETWORKS = ("unet", "transformer")
VIDEO = ("3D", "Motion", "SpatioTemporal", "Video", "Temporal")


def family_of(pipe: DiffusionPipeline) -> StableDiffusion:
    """The family that a pipeline's components belong to. ValueError if it is none of these, or components are missing."""
    family = next((family for family in FAMILIES if family.matches(pipe)), None)
    if family is None:
        networks = (getattr(pipe, name, None) for name in NETWORKS)
        raise unknown([type(network).__name__ for network in networks if network is not None])
    missing = [name for name in family.parts if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"a {family.__name__} model needs the components {', '.join(family.parts)}; missing: {', '.join(missing)}"
        )
    return family(pipe)


def check_index(index: Mapping) -> None:
    """Look at what a folder's model_index.json lists, before any weights are fetched. ValueError if no family has such a network."""
    listed = [index[name] for name in NETWORKS if name in index]  # [None, None]: one that is given as an argument
    known = {family.network_class for family in FAMILIES}
    networks = [name for library, name in listed if library == "diffusers" and name not in known]
    if networks or not listed:
        raise unknown(networks, f"{index.get('_class_name')}: ")


def unknown(networks: list[str], what: str = "") -> ValueError:
    """The error for networks of these classes."""
    found = ", ".join(networks) or f"no network named {' or '.join(NETWORKS)}"
    video = "a video model is not supported" if any(word in name for name in networks for word in VIDEO) else ""
    return ValueError(
        f"{what}{video or 'no family is known that has these components'} ({found}); supported are "
        f"{', '.join(family.models for family in FAMILIES)}, neither inpainting models nor refiners nor others with more inputs"
    )
