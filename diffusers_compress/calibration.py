"""What a codec should know of a model beforehand, measured on a few pictures and kept in the pipeline's config."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress import images
from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding import dct
from diffusers_compress.diffusion import equations, schedule
from diffusers_compress.diffusion.realism import after_one_step

# alpha/sigma, where the denoiser's error is measured
RATIOS = (0, 0.09, 0.15, 0.22, 0.3, 0.4, 0.5, 0.75, 1, 1.4, 2, 2.8, 4, 6, 9, 14)
CROP = 512  # pixels of a picture's side that are used at most


def latent_statistics(latents: list[Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel over scaled latents [C, h, w], to four digits: `calibration["latent"]`."""
    if not latents:
        raise ValueError("no latent given: at least one is needed")
    values = torch.cat([z.flatten(1) for z in latents], 1).double()
    statistics = {"mean": values.mean(1), "std": values.std(1, unbiased=False)}
    return {name: [float(f"{x:.4g}") for x in column.tolist()] for name, column in statistics.items()}


@torch.no_grad()
def calibrate_latent(pipe: DiffusionPipeline, pictures: list) -> dict[str, list[float]]:
    """`calibration["latent"]` for a codec's pipeline, from pictures of any kind that it takes: their `latent_statistics`."""
    tensors = [pipe.pad(images.to_tensor(picture)[0][None]) for picture in pictures]
    statistics = latent_statistics([pipe.encode_picture(x)[0].cpu() for x in tensors])
    pipe.maybe_free_model_hooks()
    return statistics


def texture(x: Tensor) -> Tensor:
    """Power of pictures [B, 3, H, W] above an eighth of a cycle a pixel, in brightness: a scalar."""
    y = x.mean(1) - x.mean((1, 2, 3), keepdim=True)[:, 0]
    y = y * torch.hann_window(y.shape[-2], device=y.device)[:, None] * torch.hann_window(y.shape[-1], device=y.device)
    rows, columns = (torch.fft.fftfreq(side, device=y.device) for side in y.shape[-2:])
    return (torch.fft.fft2(y).abs().square() * (rows[:, None] ** 2 + columns**2 > 1 / 64)).sum()


@torch.no_grad()
def calibrate_error(pipe: DiffusionPipeline, pictures: list, seed: int = 0) -> dict:
    """The denoiser's error, frequency by frequency: `calibration["error"]`, which `reference.error_variance` reads.

    Returns the noise levels {"ratio": [levels], in alpha/sigma; "log2_variance": [levels][channels][bands], log2 of the mean square
    of the coefficients of x_0 - x_0_hat, to two digits behind the point}. One network call for each picture and level, all levels of
    a picture at once; pictures of any kind that the pipeline takes, of which the middle 512 x 512 pixels count.
    """
    noise = schedule.from_pure_noise(pipe.noise_schedule())
    timesteps = sorted({schedule.timestep_at(noise, ratio) for ratio in RATIOS}, reverse=True)
    sums = torch.zeros(len(timesteps), pipe.family.channels, reference.BANDS, dtype=torch.float64)
    counts = torch.zeros(reference.BANDS, dtype=torch.float64)
    for x_0, x_t, outputs in _denoised(pipe, pictures, noise, timesteps, seed):
        band = reference.bands(*x_0.shape[-2:]).flatten()
        counts.index_add_(0, band, torch.ones(len(band), dtype=torch.float64))
        for total, x, output, t in zip(sums, x_t.split(1), outputs.split(1), timesteps):
            predicted = equations.predict_x0(output, x, *noise.level(t), noise.prediction_type)
            x_0_hat = predicted if noise.knows(t) else torch.zeros_like(x)
            error = dct.transform(x_0 - x_0_hat)[0].flatten(1).cpu().double()
            total.index_add_(1, band, error.square())
    measured = counts.nonzero().squeeze(1)  # small pictures lack the lowest frequencies
    nearest = measured[(torch.arange(reference.BANDS)[:, None] - measured).abs().argmin(1)]
    log2_variance = (sums / counts.clamp(min=1))[..., nearest].clamp(min=2**-40).log2()
    return {
        "ratio": [round(float(noise.ratio[t]), 4) for t in timesteps],
        "log2_variance": [[[round(x, 2) for x in row] for row in level] for level in log2_variance.tolist()],
    }


@torch.no_grad()
def calibrate_second_guess(pipe: DiffusionPipeline, pictures: list, seed: int = 0) -> dict[str, list[float]]:
    """How far the mean lies from the denoiser's first guess of x_0 to its second: `calibration["second_guess"]`, which `realism.dial` reads.

    Returns the noise levels {"ratio": in alpha/sigma; "share": of the way, by least squares over all coefficients, from 0 to 1}. 0 for an
    exact denoiser, whose first guess is the mean already. Two network calls for each picture and level; pictures as for `calibrate_error`.
    """
    noise = pipe.noise_schedule()
    timesteps = sorted({schedule.timestep_at(noise, ratio) for ratio in RATIOS[1:]} - {0}, reverse=True)
    products, squares = torch.zeros(2, len(timesteps), dtype=torch.float64)
    conditioning = pipe.encode_prompt([""] * len(timesteps))
    for x_0, x_t, outputs in _denoised(pipe, pictures, noise, timesteps, seed):
        first = _x_0_hat(outputs, x_t, timesteps, noise)
        steps = [after_one_step(x, guess, t, noise) for x, guess, t in zip(x_t.split(1), first.split(1), timesteps)]
        x_s, later = torch.cat([x for x, _ in steps]), [s for _, s in steps]
        way = _x_0_hat(pipe.predict(x_s, later, conditioning), x_s, later, noise) - first
        products += (way * (x_0 - first)).flatten(1).sum(1).cpu().double()
        squares += way.square().flatten(1).sum(1).cpu().double()
    share = (products / squares.clamp(min=1e-12)).clamp(0, 1)
    return {"ratio": [round(float(noise.ratio[t]), 4) for t in timesteps], "share": [round(x, 3) for x in share.tolist()]}


def _denoised(pipe, pictures, noise, timesteps, seed):
    """Of each picture x_0 [1, C, h, w], x_t [levels, C, h, w] and the denoiser's output on it. ValueError without a picture."""
    if not pictures:
        raise ValueError("no picture given: at least one is needed")
    generator, conditioning = torch.Generator().manual_seed(seed), pipe.encode_prompt([""] * len(timesteps))
    for picture in pictures:
        x_0 = pipe.encode_picture(pipe.pad(_middle(images.to_tensor(picture)[0])[None]))
        eps = torch.randn(len(timesteps), *x_0.shape[1:], generator=generator).to(x_0.device)
        levels = [noise.level(t) for t in timesteps]
        x_t = torch.cat([alpha * x_0 + sigma * e for (alpha, sigma), e in zip(levels, eps.split(1))])
        yield x_0, x_t, pipe.predict(x_t, timesteps, conditioning)


def _x_0_hat(outputs: Tensor, x_t: Tensor, timesteps: list[int], noise: schedule.NoiseSchedule) -> Tensor:
    rows = zip(outputs.split(1), x_t.split(1), timesteps)
    return torch.cat([equations.predict_x0(output, x, *noise.level(t), noise.prediction_type) for output, x, t in rows])


def _middle(x: Tensor) -> Tensor:
    """The middle CROP x CROP pixels of a picture [3, H, W]."""
    top, left = (max(0, side - CROP) // 2 for side in x.shape[-2:])
    return x[:, top : top + CROP, left : left + CROP]
