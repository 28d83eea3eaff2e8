"""Train CDC, a learned transform codec whose decoder is a diffusion model, which `CDCPipeline` codes pictures with.

    python examples/train_cdc.py --photos FOLDER --output RUN

    loss = beta bpp + |x - preview|^2 + (1 - rho) min(SNR, 5) |x - x_0_hat|^2 + rho texture(x, x_0_hat)

after Yang & Mandt 2023 (section 3, and their code's weights), where rho weighs LPIPS; here it weighs the error of local deviations,
which needs no weights. One model serves all rates: beta and what the networks are told of it differ from batch to batch. The
networks start as a transform by principal components. A run that was stopped goes on from its last checkpoint when the same
command is given again; RUN/model is the finished pipeline.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from train_common import Stage, batch_of_photos, forget_paths, load_photos, local_moments, make_once, split

from diffusers_compress import CDCContextModel, CDCPipeline, CDCScheduler, CDCUNet

VALIDATION_WINDOWS = 12
VALIDATION_RATES = (0.0, 0.5, 1.0)
VALIDATION_TIMES = (0.05, 0.5)  # of the noise, as t / T


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least --size pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--start", type=Path, help="model to go on from, of these widths, instead of principal components")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--size", type=int, default=128, help="side of the windows in pixels, a multiple of 64")
    parser.add_argument("--scales", type=float, nargs=2, default=(0.7, 2), help="photos are reduced by a factor between these")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--warm-up", type=int, default=100, help="steps")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument(
        "--betas", type=float, nargs=2, default=(0.12, 0.003), help="price of a bit, at the lowest and highest rate"
    )
    parser.add_argument("--rate-warm-up", type=float, default=0.02, help="part of the time in which the price rises from near 0")
    parser.add_argument(
        "--rho", type=float, default=0.3, help="weight of the texture's error, which comes in over a third of the time"
    )
    parser.add_argument("--time-power", type=float, default=2, help="times are uniform numbers to this power; published: 1")
    parser.add_argument("--levels", type=int, default=32, help="rates")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 96], help="of the context model")
    parser.add_argument("--hyper-widths", type=int, nargs=3, default=[48, 48, 32])
    parser.add_argument("--unet-widths", type=int, nargs="+", default=[64, 80, 96])
    parser.add_argument("--context-channels", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------------- model


def networks(args):
    context_model = CDCContextModel(
        widths=args.widths,
        hyper_widths=args.hyper_widths,
        context_channels=args.context_channels,
        kernel=3,
        patch=args.patch,
        levels=args.levels,
        log_scales=True,
        preview=True,
    )
    unet = CDCUNet(
        widths=args.unet_widths,
        context_widths=[args.context_channels, *args.widths[: len(args.unet_widths) - 1]],
        blocks=args.blocks,
        kernel=3,
        attention=False,
        patch=args.patch,
        rate_input=True,
        centred=True,
    )
    return context_model, unet


class CDC(nn.Module):
    """Both networks as one, so that accelerate sees one call."""

    def __init__(self, context_model, unet):
        super().__init__()
        self.context_model, self.unet = context_model, unet

    def forward(self, x, x_t, time, rate):
        """Windows and what noise left of them [B, 3, H, W], time and rate [B] -> (bpp [B], preview, x_0_hat)."""
        context, bits = self.context_model(x, rate)
        bpp = bits / x[0, 0].numel()
        return bpp, self.context_model.preview(context), self.unet(x_t, time, context, rate)


@torch.no_grad()
def start_from_components(context_model, unet, x, betas):
    """Let the linear path through the networks be a transform by principal components of 2 x 2 blocks of blocks, measured on x, and
    its inverse; residual branches and the denoiser add little at first."""
    for module in [*context_model.modules(), *unet.modules()]:
        if hasattr(module, "norm2"):
            module.norm2.weight.fill_(0.02)
    for layer in (unet.conv_out, context_model.hyper_decoder[-1]):
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    h = nn.functional.pixel_unshuffle(x, context_model.config.patch)
    bases = []
    for stage in context_model.encoder:
        identity(stage.block.shortcut)
        h = h[:, : stage.scale.in_channels]
        blocks = nn.functional.pixel_unshuffle(h, 2)
        moments = torch.einsum("bihw,bjhw->ij", blocks, blocks)
        basis = torch.linalg.eigh(moments)[1].flip(1).T[: stage.scale.out_channels]  # [components, 4 c]
        bases.append(basis.unflatten(1, (-1, 2, 2)))
        stage.scale.weight.zero_()
        stage.scale.weight[: len(basis), : h.shape[1], 1:, 1:] = bases[-1]
        stage.scale.bias.zero_()
        h = torch.einsum("ki,bihw->bkhw", basis, blocks)
    for stage, basis in zip(context_model.decoder, bases[::-1]):
        identity(stage.block.shortcut)
        weight = stage.scale.weight
        n_in, n_out = min(len(basis), weight.shape[0]), min(basis.shape[1], weight.shape[1])
        weight.mul_(0.1)[:, :n_out] = 0
        weight[:n_in, :n_out, 1:3, 1:3] = basis[:n_in, :n_out]
        stage.scale.bias.zero_()
    set_gains(context_model, betas)
    # A logistic distribution has the deviation pi / sqrt(3) times its scale
    log2_scale = (h.std((0, 2, 3)) * math.sqrt(3) / math.pi).log2()
    context_model.hyper_decoder[-1].bias[len(log2_scale) :] = log2_scale + context_model.log2_gain.mean(0)


@torch.no_grad()
def set_gains(context_model, betas):
    """Move the steps of the lowest and the highest rate to where these prices of a bit want them."""
    # At high rates |x - x_hat|^2 = step^2 / 12 and bpp falls by 3 for each octave of the step: beta = step^2 log(2) / 18
    for gain, beta in zip(context_model.log2_gain, betas):
        gain.add_(-math.log2(math.sqrt(18 * beta / math.log(2))) - gain.mean())


def identity(layer):
    """Of the first channels of a 1 x 1 convolution."""
    if isinstance(layer, nn.Conv2d):
        nn.init.dirac_(layer.weight)
        layer.bias.zero_()


# ---------------------------------------------------------------------------------------------------------------- training


def noised(x, time, scheduler, generator):
    """x_t for windows x [B, 3, H, W], at times t / T [B]; and the SNR [B] there."""
    alpha, sigma = (level.to(x)[:, None, None, None] for level in scheduler.levels_at(time))
    x_t = alpha * x + sigma * torch.randn(x.shape, generator=generator).to(x)
    return x_t, ((alpha / sigma) ** 2).flatten()


def mean_square(x):
    return x.square().flatten(1).mean(1)


def texture(x, x_hat):
    """Error of local standard deviations."""
    return sum((ours - theirs).abs().mean() for ours, theirs in zip(local_moments(x_hat), local_moments(x)))


def train(accelerator, photos, validation_photos, args):
    scheduler = CDCScheduler()
    if args.start:
        pipe = CDCPipeline.from_pretrained(args.start, torch_dtype=torch.float32)
        context_model, unet = pipe.context_model.train(), pipe.unet.train()
        set_gains(context_model, args.betas)
    else:
        context_model, unet = networks(args)
        sample = torch.Generator().manual_seed(3)
        windows = torch.cat([batch_of_photos(photos, args.size, 8, args.scales, sample) for _ in range(32)])
        start_from_components(context_model, unet, windows, args.betas)
    model = CDC(context_model, unet).to(memory_format=torch.channels_last)
    options = {"warm_up": args.warm_up, "decay": args.ema, "betas": (0.9, 0.99), "weight_decay": 0.0}
    stage = Stage(accelerator, "cdc", model, args.lr, args.minutes, args, **options)

    def batch(photos, count, generator):
        x = batch_of_photos(photos, args.size, count, args.scales, generator)
        return x.to(accelerator.device, memory_format=torch.channels_last)

    def loss_of(model):
        x = batch(photos, args.batch, stage.generator)
        rate, time = (torch.rand(len(x), generator=stage.generator).to(x.device) for _ in range(2))
        time = time**args.time_power  # what the context leaves open is small, and so is the noise that hides as much
        x_t, snr = noised(x, time, scheduler, stage.generator)
        bpp, preview, x_0_hat = model(x, x_t, time, rate)
        low, high = torch.tensor(args.betas).log()
        beta = torch.lerp(low, high, rate.cpu()).exp().to(x.device) * min(1, (stage.progress + 1e-3) / args.rate_warm_up)
        rho = args.rho * min(1, 3 * stage.progress)
        error = mean_square(x - x_0_hat) * snr.clamp(max=5)
        loss = beta * bpp + mean_square(x - preview) + (1 - rho) * error
        return loss.mean() + rho * texture(x, x_0_hat)

    held_out_generator = torch.Generator().manual_seed(1)
    held_out = [batch(validation_photos, 1, held_out_generator) for _ in range(VALIDATION_WINDOWS)]

    def validate(model):
        figures, x = {}, torch.cat(held_out)
        for rate in VALIDATION_RATES:
            row, rates = figures.setdefault(f"rate {rate}", {}), torch.full((len(x),), rate, device=x.device)
            for time in VALIDATION_TIMES:
                times = torch.full_like(rates, time)
                x_t, _ = noised(x, times, scheduler, torch.Generator().manual_seed(2))
                with accelerator.autocast(), torch.random.fork_rng():
                    torch.manual_seed(2)
                    bpp, preview, x_0_hat = model(x, x_t, times, rates)
                row |= {"bpp": round(float(bpp.mean()), 4), "preview": decibels(x, preview), f"at {time}": decibels(x, x_0_hat)}
                row[f"texture at {time}"] = round(float(texture(x, x_0_hat)), 4)
        return figures

    return stage.run(loss_of, validate)


def decibels(x, x_hat):
    return round(float(-10 * (mean_square(x - x_hat.clamp(-1, 1)) / 4).log10().mean()), 2)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    photos, validation_photos = split(load_photos(args.photos))

    def save(unfinished):
        model = train(accelerator, photos, validation_photos, args)
        model.context_model.settle()
        CDCPipeline(model.context_model.half(), model.unet.half(), CDCScheduler()).save_pretrained(unfinished)
        forget_paths(unfinished)

    print(f"wrote {make_once(args.output / 'model', save)}")


if __name__ == "__main__":
    main()
