"""Train UQDM, a diffusion model on pixels with uniform noise, which `UQDMPipeline` codes pictures with.

    python examples/train_uqdm.py --photos FOLDER --output RUN

The loss is the size of a file in bits per number (Yang, Will & Mandt 2025). Defaults are the published hyper-parameters of their
smallest model, but for the minutes. A run that was stopped goes on from its last checkpoint when the same command is given again;
RUN/model is the finished pipeline.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from train_common import Stage, batch_of_photos, load_photos, split, train_once

from diffusers_compress import UQDMNetwork, UQDMPipeline, UQDMScheduler
from diffusers_compress.diffusion import equations

VALIDATION_WINDOWS = 16


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least --size pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--size", type=int, default=64, help="side of the windows in pixels")
    parser.add_argument("--scales", type=float, nargs=2, default=(1, 4), help="photos are reduced by a factor between these")
    parser.add_argument("--batch", type=int, default=2, help="windows for each of the steps")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warm-up", type=int, default=1000, help="steps")
    parser.add_argument("--ema", type=float, default=0.9999)
    parser.add_argument("--widths", type=int, nargs="+", default=[32], help="channels of the UNet at each resolution")
    parser.add_argument("--layers", type=int, default=1, help="residual blocks at each resolution")
    parser.add_argument("--patch", type=int, default=1, help="side of the squares of pixels that the UNet sees as one")
    parser.add_argument("--preconditioned", action="store_true", help="see UQDMNetwork; for short trainings")
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def bits_of_steps(network, scheduler, x, steps, generator):
    """Bits per number [B] of one step for each of the pictures x [B, 3, h, w]: that which leaves its level."""

    def column(values):
        return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None, None]

    both = steps, [t - 1 for t in steps]
    level_t, level_s = ([column(part) for part in zip(*map(scheduler.level, levels))] for levels in both)
    width, scale = column([scheduler.width(t) for t in steps]), column([scheduler.scale(t) for t in steps])
    z_t = level_t[0] * x + level_t[1] * torch.randn(x.shape, generator=generator).to(x)
    times = torch.tensor([scheduler.time(t) for t in steps], device=x.device)
    noise, factor = network(z_t, times, level_t[1].flatten())
    x_hat = equations.predict_x0(noise, z_t, *level_t, "epsilon").clamp(-1, 1)
    # z_s less the mean of p(z_s | z_t), in widths of the uniform noise
    (mean_q, _), (mean_p, _) = (equations.posterior(z_t, x_0, *level_t, *level_s) for x_0 in (x, x_hat))
    offset = (mean_q - mean_p) / width + torch.rand(x.shape, generator=generator).to(x) - 0.5
    rate = width / (scale * factor)
    above, below = (offset + 0.5) * rate, (offset - 0.5) * rate
    # F(above) - F(below) = F(above) F(-below) (1 - exp(below - above)) for the logistic function F
    softplus = torch.nn.functional.softplus
    nats = softplus(-above) + softplus(below) - torch.log(-torch.expm1(-rate))
    return nats.flatten(1).mean(1) / math.log(2)


def train(accelerator, photos, validation_photos, args):
    levels = len(args.widths)
    scheduler = UQDMScheduler()
    steps = list(range(scheduler.config.num_steps, 0, -1))
    network = UQDMNetwork(
        patch=args.patch,
        preconditioned=args.preconditioned,
        sample_size=args.size,
        block_out_channels=args.widths,
        layers_per_block=args.layers,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=8,
        attention_head_dim=min(32, args.widths[-1]),
    )
    options = {"warm_up": args.warm_up, "decay": args.ema, "betas": (0.9, 0.999), "weight_decay": 0.0}
    stage = Stage(accelerator, "uqdm", network, args.lr, args.minutes, args, **options)

    def windows(photos, count, generator):
        """Random windows whose values are those of 8 bits: (2 k + 1) / 256 - 1."""
        x = batch_of_photos(photos, args.size, count, args.scales, generator)
        return (2 * ((x + 1) * 127.5).round() + 1) / 256 - 1

    def loss_of(model):
        """The file's size but for the pixels given z_0, which no weight changes; each step on windows of its own."""
        x = windows(photos, args.batch * len(steps), stage.generator).to(accelerator.device)
        return len(steps) * bits_of_steps(model, scheduler, x, args.batch * steps, stage.generator).mean()

    held_out_generator = torch.Generator().manual_seed(1)
    held_out = torch.cat([windows(validation_photos, 1, held_out_generator) for _ in range(VALIDATION_WINDOWS)])

    def validate(model):
        generator, x = torch.Generator().manual_seed(2), held_out.to(accelerator.device)
        bits = [float(bits_of_steps(model, scheduler, x, [t] * len(x), generator).mean()) for t in steps]
        return {"bits": round(sum(bits), 4), "steps": [round(b, 4) for b in bits]}

    return stage.run(loss_of, validate)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    set_seed(args.seed)
    photos, validation_photos = split(load_photos(args.photos))
    train_once(args.output / "network", lambda: train(accelerator, photos, validation_photos, args))
    # In float16, whose numbers every other type but bfloat16 holds too, so that files do not depend on the type it is loaded in
    network = UQDMNetwork.from_pretrained(args.output / "network").half()
    UQDMPipeline(network, UQDMScheduler()).save_pretrained(args.output / "model")
    print(f"wrote {args.output / 'model'}")


if __name__ == "__main__":
    main()
