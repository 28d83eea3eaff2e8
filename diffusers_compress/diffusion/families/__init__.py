"""What differs between families of diffusion models: a small class for each, found from a pipeline's components.

A family is a denoiser with its latents: pictures to x_0 and back, the conditioning on a prompt, and its output for x_t at
timestep t, which `schedule` and `equations` turn into x_0_hat. All else is the same for all of them. A new family is one class more.
"""

from diffusers import DiffusionPipeline

from diffusers_compress.diffusion.families.flux import Flux
from diffusers_compress.diffusion.families.pixels import Pixels
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.diffusion.families.stable_diffusion_3 import StableDiffusion3
from diffusers_compress.diffusion.families.stable_diffusion_xl import StableDiffusionXL

FAMILIES = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Pixels)


def family_of(pipe: DiffusionPipeline) -> StableDiffusion:
    """The family that a pipeline's components belong to. ValueError if it is none of these, or components are missing."""
    family = next((family for family in FAMILIES if family.matches(pipe)), None)
    if family is None:
        networks = (getattr(pipe, name, None) for name in ("unet", "transformer"))
        found = ", ".join(type(network).__name__ for network in networks if network is not None) or "no network"
        raise ValueError(
            f"no family is known that has these components ({found}); supported are Stable Diffusion 1.x and 2.x, SDXL, Stable "
            "Diffusion 3, FLUX.1 and unconditional RGB models in pixel space, neither inpainting models nor refiners nor others with more "
            "inputs"
        )
    missing = [name for name in family.parts if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"a {family.__name__} model needs the components {', '.join(family.parts)}; missing: {', '.join(missing)}"
        )
    return family(pipe)
