"""Which timesteps the strides of a DiffC file lead to."""

from diffusers_compress.codecs.diffc.format import STRIDE_UNIT, Parameters
from diffusers_compress.diffusion import schedule
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.errors import Corrupt


def next_timestep(noise: NoiseSchedule, t: int, strides: list[int]) -> int:
    """Where the last of these steps ends, which starts at t: the level nearest in alpha/sigma, and at least one timestep on."""
    nearest_t = schedule.timestep_at(noise, float(noise.ratio[-1]) + sum(strides) / STRIDE_UNIT)
    return max(0, min(nearest_t, t - 1))


def timesteps_of(noise: NoiseSchedule, parameters: Parameters) -> list[int]:
    """The timesteps of a file, noisiest first: step j goes from entry j to entry j + 1."""
    timesteps = [noise.alpha.numel() - 1]
    for step in range(len(parameters.strides)):
        if timesteps[-1] == 0:
            raise Corrupt(f"the file holds {len(parameters.strides)} steps, this model's noise schedule has room for {step}")
        timesteps.append(next_timestep(noise, timesteps[-1], parameters.strides[: step + 1]))
    return timesteps
