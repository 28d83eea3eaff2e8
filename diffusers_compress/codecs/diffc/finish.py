"""From x_t where a stream ends to the picture."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.finishers import Finisher, calls_of
from diffusers_compress.format.container import Header

RECONSTRUCTIONS = ("flow", "ancestral", "denoised")
CALLS, LEAST = 10, 4  # of the network, from the noisier half of its schedule, and from near x_0


class Finish(NamedTuple):
    """Those arguments of `decompress` that decide the picture. `generator`: one for all pictures, or a list."""

    reconstruction: str = "flow"
    realism: float = 1.0
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    generator: torch.Generator | list[torch.Generator] | None = None
    finisher: Finisher | None = None


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
    noise, realism = pipe.noise_schedule(), how.realism
    usual = [CALLS if how.reconstruction == "ancestral" else enough_calls(t, noise.alpha.numel()) for _, t in ends]
    steps = [calls_of(how.num_inference_steps, calls, how.finisher) for calls in usual]
    if how.reconstruction == "denoised":  # the flow's one call gives x_0_hat
        steps, realism = [1] * len(ends), 1.0
    if how.reconstruction == "ancestral":
        draws = how.generator if isinstance(how.generator, list) else [how.generator] * len(ends)
        walks = [solvers.ancestral(x_t, t, calls, noise, draw) for (x_t, t), calls, draw in zip(ends, steps, draws)]
        walks = [pipe.dial(walk, realism, noise, t) for walk, (_, t) in zip(walks, ends)]
        x_0 = torch.cat(pipe.run(walks, prompts, how.guidance_scale, watch))
    else:
        x_0 = pipe.finish(ends, prompts, steps, realism, how.guidance_scale, watch, how.finisher)
    return pipe.pictures_of(pipe.decode_latent(x_0), headers, output_type)


def enough_calls(t: int, num_levels: int) -> int:
    """CALLS, or the number of those from timestep t on, if they began in the middle: timesteps fall with the square (`timesteps_to_zero`)."""
    return min(CALLS, max(LEAST, math.ceil(math.sqrt(2 * CALLS**2 * (t + 1) / num_levels))))
