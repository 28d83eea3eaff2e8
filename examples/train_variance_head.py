"""Calibrate DiffC for a Stable-Diffusion folder and train its variance head; the model itself stays as it is.

    python examples/train_variance_head.py --photos FOLDER --output RUN

First the denoiser's error is measured at each frequency, and how far its second guess is to be followed (`calibration`), then a
`VarianceHead` learns where in a picture the error is larger or smaller than that, by the Gaussian likelihood of the coefficients of
x_0 - x_0_hat. RUN/model is the folder with all that added. A run that was stopped goes on from its last checkpoint when the same
command is given again.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from train_common import Stage, add_parts, batch_of_crops, encode_photos, load_photos, make_once, split

from diffusers_compress import DiffCPipeline, VarianceHead, calibration, embedded_model
from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding import dct
from diffusers_compress.diffusion import equations, schedule

MAX_RATIO = 9.0  # alpha/sigma


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least 256 pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument(
        "--latents", type=Path, help="keep the photos' latents in this file, or take them from it; default: RUN/latents.pt"
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--calibration-every", type=int, default=8, help="calibrate on each n-th training photo")
    parser.add_argument("--batch", type=int, default=8, help="latents of 32x32 a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def kept(path, measure, pipe, photos):
    """What was measured, kept in a file."""
    make_once(path, lambda path: path.write_text(json.dumps(measure(pipe, photos))))
    return json.loads(path.read_text())


def train(accelerator, pipe, spectrum, latents, validation, args):
    noise, channels = schedule.from_scheduler(pipe.scheduler), pipe.family.channels
    stage = Stage(accelerator, "variance_head", VarianceHead(channels), args.lr, args.minutes, args)
    is_mean = reference.bands(32, 32) >= reference.AC_BANDS
    table = torch.stack([reference.error_variance(spectrum, float(snr), (channels, 32, 32)).log() for snr in noise.snr])

    def nats(model, x_0, t, eps):
        """Mean nats of a coefficient beyond those of unit variance: without the head, and with it."""
        alpha, sigma = (level[t].float().to(x_0.device)[:, None, None, None] for level in (noise.alpha, noise.sigma))
        x_t = alpha * x_0 + sigma * eps
        with torch.no_grad():
            output = pipe.predict(x_t, t, pipe.encode_prompt([""] * len(t)))
        levels = [noise.level(i) for i in t]
        predicted = [
            equations.predict_x0(o, x, *level, noise.prediction_type)
            for o, x, level in zip(output.split(1), x_t.split(1), levels)
        ]
        x_0_hat = torch.cat(predicted)
        squared = dct.transform(x_0 - x_0_hat).square()
        calibrated = table[t].to(x_0.device)
        learned = calibrated + model(x_0_hat, (x_t - alpha * x_0_hat) / sigma, noise.snr[t].log1p().to(x_0.device))
        both = torch.stack([log_variance + squared * (-log_variance).exp() for log_variance in (calibrated, learned)])
        return both[..., ~is_mean].mean((1, 2, 3)) / 2

    def batch_at(arrays, indices, generator):
        ratios = MAX_RATIO * torch.rand(len(indices), generator=generator) ** 2
        t = [schedule.timestep_at(noise, float(ratio)) for ratio in ratios]
        x_0 = batch_of_crops(arrays, indices, 32, generator)
        return x_0.to(accelerator.device), t, torch.randn(x_0.shape, generator=generator).to(accelerator.device)

    def loss_of(model):
        indices = torch.randint(len(latents), (args.batch,), generator=stage.generator).tolist()
        return nats(model, *batch_at(latents, indices, stage.generator))[1]

    def validate(model):
        held_out = batch_at(validation, range(len(validation)), torch.Generator().manual_seed(1))
        return dict(zip(("calibrated_nats", "head_nats"), (round(x, 4) for x in nats(model, *held_out).tolist())))

    return stage.run(loss_of, validate)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    set_seed(args.seed)
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(accelerator.device)
    pipe.unet.requires_grad_(False)

    photos, validation_photos = split(load_photos(args.photos))
    few = photos[:: args.calibration_every]
    spectrum = kept(args.output / "error.json", calibration.calibrate_error, pipe, few)
    second_guess = kept(args.output / "second_guess.json", calibration.calibrate_second_guess, pipe, few)
    path = make_once(args.latents or args.output / "latents.pt", lambda path: torch.save(encode_photos(pipe, photos), path))
    latents = [view for views in torch.load(path, weights_only=True) for view in views]
    validation = [view for view, _ in encode_photos(pipe, validation_photos)]
    head = train(accelerator, pipe, spectrum, latents, validation, args)
    add_parts(args.model, args.output / "model", {"error": spectrum, "second_guess": second_guess}, variance_head=head)


if __name__ == "__main__":
    main()
