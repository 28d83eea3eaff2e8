"""From x_t where a stream ends to the picture."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.realism import dial
from diffusers_compress.format.container import Header

RECONSTRUCTIONS = ("flow", "ancestral", "denoised")


class Finish(NamedTuple):
    """Those arguments of `decompress` that decide the picture. `generator`: one for all pictures, or a list."""

    reconstruction: str = "flow"
    realism: float = 1.0
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    generator: torch.Generator | list[torch.Generator] | None = None


def finished(
    pipe: DiffusionPipeline,
    ends: list[tuple[Tensor, int]],
    headers: list[Header],
    prompts: list[str],
    how: Finish,
    output_type: str = "pil",
    watch: Callable | None = None,
) -> list:
    """Of each end, x_t [1, C, h, w] and t, the picture."""
    noise, steps = pipe.noise_schedule(), how.num_inference_steps
    if how.reconstruction == "ancestral":
        draws = how.generator if isinstance(how.generator, list) else [how.generator] * len(ends)
        walks = [solvers.ancestral(x_t, t, steps, noise, draw) for (x_t, t), draw in zip(ends, draws)]
    else:
        walks = [solvers.solve(x_t, t, steps, noise, pipe.scheduler) for x_t, t in ends]
    realism = 0.0 if how.reconstruction == "denoised" else how.realism
    x_0 = pipe.run([dial(walk, realism, noise) for walk in walks], prompts, how.guidance_scale, watch)
    return pipe.pictures_of(pipe.decode_latent(torch.cat(x_0)), headers, output_type)
