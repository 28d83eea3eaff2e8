"""Train what `RelicPipeline` can learn over a frozen Stable-Diffusion folder: its entropy model and its quantization parameters.

    python examples/train_relic.py --photos FOLDER --output RUN

Stages, each limited by wall-clock minutes:
    hyperprior   the law of the quantized latents, one model for all rates
    quantizer    of files with dither: step widths and shifts of the channels, and the timestep, from the latent and the rate
    export       RUN/model: the folder with all of it added
A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from train_common import Stage, add_parts, batch_of_crops, encode_photos, load_photos, log_uniform, make_once, split, train_once

from diffusers_compress import RelicPipeline, calibration, embedded_model
from diffusers_compress.codecs.relic import quantizer
from diffusers_compress.codecs.relic.rate import CONTEXT
from diffusers_compress.coding.context_model import units_of
from diffusers_compress.coding.logistic import UNIT
from diffusers_compress.diffusion import equations, schedule
from diffusers_compress.models.hyperprior import HyperPrior, ParameterNetwork

STAGES = ("hyperprior", "quantizer", "export")
STEP_WIDTHS = (0.06, 12.0)  # log-uniform in training
SHARES = (0.1, 2.0)  # log-uniform in training with dither: channels below such a share of the quantization noise are not coded
VALIDATION_STEPS = (0.25, 1.0, 4.0)
DITHERED = 0.2  # share of the training steps
TEXTURE_WEIGHT = 8


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least 256 pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument(
        "--latents", type=Path, help="keep the photos' latents in this file, or take them from it; default: RUN/latents.pt"
    )
    parser.add_argument("--start", type=Path, help="folder of a `HyperPrior` to go on from")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--hyperprior-minutes", type=float, default=20)
    parser.add_argument("--quantizer-minutes", type=float, default=6)
    parser.add_argument("--batch", type=int, default=8, help="latents of 32x32 a step")
    parser.add_argument("--hyperprior-lr", type=float, default=1.6e-3)
    parser.add_argument("--quantizer-lr", type=float, default=2e-3)
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def quantized(y, step, units, dithered, generator):
    """v [B, C, h, w] int64, in parts of the step, of latents y less their means. Universal quantization if `dithered`."""
    dither = (2 * torch.randint(UNIT // 2, y.shape, generator=generator) - UNIT // 2 + 1).to(y.device) * dithered
    return (y / step + dither / UNIT + 0.5).floor().long() * UNIT - dither


def train_hyperprior(accelerator, latents, validation, statistics, args):
    mean = torch.tensor(statistics["mean"])[:, None, None]
    model = HyperPrior.from_pretrained(args.start) if args.start else HyperPrior(len(mean))
    stage = Stage(accelerator, "hyperprior", model, args.hyperprior_lr, args.hyperprior_minutes, args)
    generator, device = stage.generator, accelerator.device

    def bits_per_position(model, y, step, dithered, share):
        """With dither, without the channels whose variance is below this share of the quantization noise."""
        units = torch.tensor(units_of(statistics["std"], [step] * len(mean), [True] * len(mean)), device=device)
        units = units * (12 * units**2 > share * UNIT**2) if dithered else units
        v = quantized((y - mean).to(device), step, units, dithered, generator)
        return model(v, units, dithered).sum() / y[:, 0].numel()

    def loss_of(model):
        indices = torch.randint(len(latents), (args.batch,), generator=generator).tolist()
        dithered = bool(torch.rand((), generator=generator) < DITHERED)
        y = batch_of_crops(latents, indices, 32, generator)
        step, share = log_uniform(STEP_WIDTHS, generator), log_uniform(SHARES, generator)
        return (1 + bits_per_position(model, y, step, dithered, share)).log()  # a percent is a percent at every rate

    held_out = torch.stack([z[:, :32, :32] for z in validation])

    def validate(model):
        found = {step: bits_per_position(model, held_out, step, False, 1.0) for step in VALIDATION_STEPS}
        return {f"bits_{step}": round(float(bits), 4) for step, bits in found.items()}

    model = stage.run(loss_of, validate)
    model.settle()
    return model


def noise_gain(decode, y, std):
    """Mean square by which a picture changes per mean square of noise in each channel of its latent y, those of much power counting."""
    noise = std[:, None, None] * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device) / 10
    return float((decode(y + noise) - decode(y)).square().mean() / noise.square().sum(1).mean())


def train_quantizer(accelerator, pipe, latents, validation, statistics, args):
    """Rate, error of the denoised picture and its texture together, through the frozen model; the rate is that of Gaussian parts.

    With noise of variance N = D^2 / 12 a bit is worth 2 ln 2 N where there is much power, which makes D itself the trade-off.
    """
    mean, std = (torch.tensor(statistics[name], device=accelerator.device) for name in ("mean", "std"))
    stage = Stage(accelerator, "quantizer", ParameterNetwork(len(mean)), args.quantizer_lr, args.quantizer_minutes, args)
    generator, noise = stage.generator, schedule.from_scheduler(pipe.scheduler)
    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    empty = {name: rows.detach() for name, rows in pipe.encode_prompt([""]).items()}

    def denoise(x, sigma):
        """One call of the network for x = x_0 + sigma eps [1, C, h, w]; sigma may carry a gradient."""
        t, alpha = schedule.timestep_at(noise, 1 / float(sigma)), (1 + sigma**2) ** -0.5
        output = pipe.predict(alpha * x, [t], empty)
        return equations.predict_x0(output, alpha * x, alpha, sigma * alpha, noise.prediction_type)

    def pixels(y):
        return pipe.decode_latent(y + mean[:, None, None])

    def losses(model, y, step, dither):
        """Error in units of what N makes of it in pixels, rate in the same, and texture lost, of latents y [1, C, h, w] less their means."""
        scale, shift, level = model(y, std, torch.full((1,), step, device=y.device))
        steps = (step * 2 ** scale[0])[:, None, None]
        power = F.avg_pool2d(y.square(), quantizer.BLOCK) + 1e-12
        bits = CONTEXT * (1 + 12 * power / steps**2).log2().mean((0, 2, 3)) / 2
        coded = quantizer.worth_coding(power[0].flatten(1), step)[0]
        idle = (1 - 12 * (std[:, None, None] / steps) ** 2).clamp(min=0).sqrt() * dither + shift[0, :, None, None]
        y_hat = torch.where(coded[:, None, None], y + steps * dither, steps * idle)
        sigma = (steps.square().mean() / 12).sqrt() * 2 ** level[0]
        x = y_hat + mean[:, None, None]
        x_0_hat = denoise(x, sigma)
        x_0_hat = denoise(x_0_hat + (x - x_0_hat) / 2, sigma / 2) - mean[:, None, None]  # on along the ODE, Song et al. 2021
        picture, wanted = pixels(x_0_hat), pixels(y)
        error = (picture - wanted).square().mean() / (gain * step**2 / 12)
        rate = 2 * math.log(2) * (bits * coded).sum()
        lost = (calibration.texture(picture) / calibration.texture(wanted)).log()
        return error, rate, TEXTURE_WEIGHT * lost.square()

    def loss_of(model):
        y = batch_of_crops(latents, torch.randint(len(latents), (1,), generator=generator).tolist(), 32, generator)
        dither = torch.rand(y.shape, generator=generator) - 0.5
        y, dither = (y - mean.cpu()[:, None, None]).to(mean.device), dither.to(mean.device)
        error, rate, texture = losses(model, y, log_uniform(STEP_WIDTHS, generator), dither)
        return error + rate + texture

    held_out = [z[None, :, :32, :32].to(mean.device) - mean[:, None, None] for z in validation[:8]]
    with torch.no_grad():
        gain = sum(noise_gain(pixels, y, std) for y in held_out) / len(held_out)
    dithers = torch.rand(8, *held_out[0].shape, generator=torch.Generator().manual_seed(1)) - 0.5

    def validate(model):
        figures = {}
        for step in VALIDATION_STEPS:
            rows = [losses(model, y, step, dither.to(y.device)) for y, dither in zip(held_out, dithers)]
            figures[f"loss_{step}"] = [round(float(sum(column)) / len(rows), 4) for column in zip(*rows)]
        return figures

    return stage.run(loss_of, validate)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    set_seed(args.seed)
    pipe = RelicPipeline.from_pretrained(args.model, dtype=torch.float32).to(accelerator.device)

    photos, validation_photos = split(load_photos(args.photos))
    path = make_once(args.latents or args.output / "latents.pt", lambda path: torch.save(encode_photos(pipe, photos), path))
    latents = [view for views in torch.load(path, weights_only=True) for view in views]
    validation = [view for views in encode_photos(pipe, validation_photos) for view in views]
    statistics = calibration.latent_statistics(latents)

    if "hyperprior" in args.stages:
        train_once(args.output / "hyperprior", lambda: train_hyperprior(accelerator, latents, validation, statistics, args))
    if "quantizer" in args.stages:
        train_once(
            args.output / "parameter_network", lambda: train_quantizer(accelerator, pipe, latents, validation, statistics, args)
        )
    if "export" in args.stages:
        export(args, statistics)


def export(args, statistics):
    """The model's folder with what was trained; the integers of the hyperprior are exact in float16."""
    parts = {"hyperprior": HyperPrior, "parameter_network": ParameterNetwork}
    trained = {name: kind.from_pretrained(args.output / name) for name, kind in parts.items() if (args.output / name).exists()}
    add_parts(args.model, args.output / "model", {"latent": statistics}, **trained)


if __name__ == "__main__":
    main()
