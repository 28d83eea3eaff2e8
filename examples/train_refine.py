"""Train a decoder for refined files over any Stable-Diffusion folder: an estimator of the latent, and a UNet that sees what it says.

    accelerate launch examples/train_refine.py --photos FOLDER --output RUN --model FOLDER_OR_ID

`--form flow`: flow matching from the base's latent with noise to the picture's, 4 to 10 calls; `--form diffusion`: conditional diffusion
with a shifted noise schedule (HFD, Hoogeboom et al. 2023), which starts late (DIRAC, Ghouse et al. 2023). Both train the same denoiser at
other noise levels (`codecs/refine/trained.py`), and `--start` goes on from either.

Each photo is coded `--draws` times, by a base codec and at a quality that are drawn at random, with real encoders; `--latents` keeps the
latents for other runs. A run that was stopped goes on from its last checkpoint when the same command is given again. RUN/adapter is what
`RefinePipeline.from_pretrained` takes.
"""

import argparse
import json
import math
import os
import random
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from tqdm.auto import tqdm
from train_common import Stage, forget_paths, make_once, random_crop, split, target_of, train_once

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.codecs.refine import trained
from diffusers_compress.diffusion import schedule
from diffusers_compress.images import formats
from diffusers_compress.models import adapter
from diffusers_compress.models.base_estimator import BaseEstimator
from diffusers_compress.models.wiener_unet import WienerUNet

SMALLEST_ERROR = 2**-10
DIFFUSION_NOISE = 0.05, 4.0  # sigma / alpha over the estimate's rms deviation, of --form diffusion
PLACES = (1.0, 0.75, 0.5, 0.25)  # of validation: s
HELD_OUT = 24  # windows for validation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least --size pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the adapter go here")
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument("--form", default="flow", choices=list(trained.LATE_START))
    parser.add_argument("--bases", nargs="+", default=["jpeg", "avif"], choices=list(formats.FORMATS))
    parser.add_argument("--draws", type=int, default=5, help="base files of each photo")
    parser.add_argument("--latents", type=Path, help="file of all latents, from or for other runs")
    parser.add_argument(
        "--low-rates", type=float, default=0.0, help="a base is drawn as often as its place on its scale, 1 and up, to minus this"
    )
    parser.add_argument("--start", type=Path, help="an adapter that this script made with the same options, to go on from")
    parser.add_argument("--minutes", type=float, default=60, help="of the UNet")
    parser.add_argument("--estimator-minutes", type=float, default=15, help="0 with --start: it stays as it is")
    parser.add_argument("--size", type=int, default=256, help="side of the windows in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4, help="of the UNet")
    parser.add_argument("--estimator-lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=64, help="of the estimator")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--rank", type=int, help="train low-rank differences of this rank (0: none) instead of the whole UNet")
    parser.add_argument("--whole", default="", help="with --rank: modules of the UNet whose name matches are trained whole")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.estimator_minutes or args.start):
        parser.error("--estimator-minutes 0 leaves no estimator without --start")
    return args


# -------------------------------------------------------------------------------------------------------------------- data


@torch.no_grad()
def encode_pairs(pipe, args):
    """For each photo the latents [C, h, w] of it and of its mirror image, and of `draws` bases (which of the two, base codec, knob, latent)."""
    draw, found = random.Random(args.seed), []
    paths = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in {".webp", ".png", ".jpg", ".jpeg"})

    def latent_of(image):
        return pipe.encode_picture(pipe.pad(formats.as_stored(image))[None])[0].half().cpu()

    for path in tqdm(paths, desc="coding photos"):
        image = images.open_image(path).convert("RGB")
        views = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        bases = []
        for _ in range(args.draws):
            view, base = draw.randrange(2), draw.choice(args.bases)
            knobs = formats.FORMATS[base].knobs
            knob = int(len(knobs) * draw.random() ** 2)  # low rates are where there is something to paint
            file = formats.FORMATS[base].encode(views[view], knobs[knob])
            bases.append((view, base, knob, latent_of(formats.opened(base, file))))
        found.append(([latent_of(view) for view in views], bases))
    return found


def errors_of(x_0, y):
    return (y.float() - x_0.float()).square().mean((1, 2)).sqrt().clamp(min=SMALLEST_ERROR)


def window(x_0, y, args, cell, generator):
    """(x_0, y [C, s, s], errors [C]) of a random window of a photo and its base; the errors are those of the whole photo."""
    both = random_crop(torch.cat([x_0, y]), args.size // cell, generator).float()
    return *both.split(len(x_0)), errors_of(x_0, y)


# ---------------------------------------------------------------------------------------------------------------- training


def pairs_of(photos, args):
    """All (x_0, y), and how often each is drawn."""
    drawn = [(views[view], y, knob) for views, bases in photos for view, _, knob, y in bases]
    return [(x_0, y) for x_0, y, _ in drawn], torch.tensor([(1.0 + knob) ** -args.low_rates for *_, knob in drawn])


def batch_of(pairs, args, cell, device, generator):
    """x_0, y [B, C, s, s] and errors [B, C] of random windows."""
    pairs, weights = pairs
    chosen = torch.multinomial(weights, args.batch, replacement=True, generator=generator).tolist()
    windows = [window(*pairs[i], args, cell, generator) for i in chosen]
    return [torch.stack(parts).to(device) for parts in zip(*windows)]


def fixed_batches(pairs, args, cell, device):
    generator = torch.Generator().manual_seed(1)
    return [batch_of(pairs, args, cell, device, generator) for _ in range(-(-HELD_OUT // args.batch))]


def train_estimator(accelerator, pipe, pairs, validation, args):
    """By the likelihood of x_0."""
    cell, device = pipe.vae_scale_factor, accelerator.device
    estimator = BaseEstimator(pipe.vae.config.latent_channels, args.width)
    if args.start:
        estimator = BaseEstimator.from_pretrained(args.start / "estimator", dtype=torch.float32)
    stage = Stage(accelerator, "estimator", estimator, args.estimator_lr, args.estimator_minutes, args, decay=args.ema)
    held_out = fixed_batches(validation, args, cell, device)

    def nats(model, x_0, y, errors):
        """-log p(x_0) and the squared error of the mean, [B], over those of N(y, errors^2)."""
        with accelerator.autocast():
            mean, log2_deviation = model(y, errors)
        log_ratio = log2_deviation * math.log(2) - errors.log()[..., None, None]
        wrong = (x_0 - mean) / errors[..., None, None]
        likelihood = log_ratio + wrong.square() * (-2 * log_ratio).exp() / 2
        return likelihood.mean((1, 2, 3)), wrong.square().mean((1, 2, 3)) / ((x_0 - y) / errors[..., None, None]).square().mean(
            (1, 2, 3)
        )

    def loss(model):
        return nats(model, *batch_of(pairs, args, cell, device, stage.generator))[0].mean()

    def validate(model):
        likelihood, error = (torch.cat(parts) for parts in zip(*(nats(model, *batch) for batch in held_out)))
        return {"nats": round(float(likelihood.mean()), 4), "error of the mean": round(float(error.mean()), 4)}

    return stage.run(loss, validate)


def train_unet(accelerator, pipe, estimator, pairs, validation, args):
    """By the error of x_0_hat."""
    cell, device, noise = pipe.vae_scale_factor, accelerator.device, schedule.from_scheduler(pipe.scheduler)
    text = pipe.encode_prompt([""])["text"].detach()
    estimator = estimator.requires_grad_(False).to(device)
    stage = Stage(accelerator, "unet", prepared_unet(pipe, args), args.lr, args.minutes, args, decay=args.ema, weight_decay=0.0)
    held_out = fixed_batches(validation, args, cell, device)

    def errors_of_network(model, x_0, y, errors, places, generator):
        """Squared errors of x_0_hat [B], over those of the independent Gaussians that the estimator sees; `places`: sigma / (alpha d)."""
        seen = trained.seen_of(estimator, y, errors)
        ratios = [d * place for d, place in zip(trained.deviations(seen), places.tolist())]
        t = [schedule.timestep_at(noise, 1 / max(ratio, 1e-9)) for ratio in ratios]
        alpha, sigma = (level[t].float().to(device)[:, None, None, None] for level in (noise.alpha, noise.sigma))
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        x_t = alpha * x_0 + sigma * eps
        with accelerator.autocast():
            output = model(
                torch.cat([x_t, seen], 1), torch.tensor(t, device=device), text.expand(len(x_0), -1, -1), return_dict=False
            )[0]
        # the output's error is finite where alpha = 0, and that of x_0_hat but for a factor
        kind = noise.prediction_type
        wrong = output.float() - target_of(x_0, eps, alpha, sigma, kind)
        wrong = wrong * {"sample": 1.0, "v_prediction": sigma, "epsilon": sigma / alpha}[kind]
        power = seen.chunk(2, 1)[0].exp2().square()
        return (wrong.square() / (sigma**2 * power / (alpha**2 * power + sigma**2))).mean((1, 2, 3))

    def loss(model):
        place = torch.rand(args.batch, generator=stage.generator)
        low, high = DIFFUSION_NOISE
        places = low * (high / low) ** place if args.form == "diffusion" else place / (1 - place).clamp(min=1e-6)
        batch = batch_of(pairs, args, cell, device, stage.generator)
        return errors_of_network(model, *batch, places, stage.generator).mean()

    def validate(model):
        generator, figures = torch.Generator().manual_seed(2), {}
        for s in PLACES:
            places = torch.full((args.batch,), s / max(1 - s, 1e-6))
            found = [errors_of_network(model, *batch, places, generator) for batch in held_out]
            figures[f"error at s = {s}"] = round(float(torch.cat(found).mean()), 4)
        return figures

    return stage.run(loss, validate)


def prepared_unet(pipe, args):
    """The UNet, widened, its trained part chosen, and on its way."""
    unet = pipe.unet
    adapter.widen(unet, 2 * unet.config.out_channels)
    if isinstance(unet, WienerUNet):
        unet.centre_on_estimate(scaled=True)
    adapter.choose_trained(unet, args.rank, args.whole)
    if args.start:
        adapter.load_trained(unet, args.start)
    return unet


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(accelerator.device)
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    latents = args.latents or args.output / "latents.pt"
    with accelerator.main_process_first():
        make_once(latents, lambda unfinished: torch.save(encode_pairs(pipe, args), unfinished))
    pairs, validation = (pairs_of(part, args) for part in split(torch.load(latents, weights_only=True)))
    folder = args.output / "adapter"
    folder.mkdir(exist_ok=True)
    if args.estimator_minutes:
        train_once(folder / "estimator", lambda: train_estimator(accelerator, pipe, pairs, validation, args).half())
    elif accelerator.is_main_process:
        shutil.copytree(args.start / "estimator", folder / "estimator", dirs_exist_ok=True)
    accelerator.wait_for_everyone()
    estimator = BaseEstimator.from_pretrained(folder / "estimator", dtype=torch.float32)
    unet = train_unet(accelerator, pipe, estimator, pairs, validation, args)
    if accelerator.is_main_process:
        export(unet, folder, args)


def export(unet, folder, args):
    base = os.path.relpath(args.model, folder) if Path(args.model).is_dir() else args.model
    adapter.save(adapter.changes(unet), folder, base)
    about = json.loads((folder / adapter.ABOUT).read_text()) | {"form": args.form}
    (folder / adapter.ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    forget_paths(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
