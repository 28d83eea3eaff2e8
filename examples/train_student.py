"""Train a student that finishes a picture in one network call, as a LoRA over a model that stays as it is.

    python examples/train_student.py --photos FOLDER --output RUN

A decoder holds x_t = alpha_t x_0 + sigma_t eps where its file ends. The model's own single call gives the mean of all x_0, which is too
smooth. The student's call is to give a picture with the texture of photos, by matching moments, without a discriminator: the loss is the
Wasserstein distortion (Qiu et al. 2024, here of framelets, pooled over 16 pixels) between the decoded x_0_hat and the photo, plus a
share of the squared error, which keeps it near to the mean. It learns the noise levels at which files end, and no others.

A run that was stopped goes on from its last checkpoint when the same command is given again. RUN/student is what `finisher=` takes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline, TCDScheduler
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm
from train_common import Stage, load_photos, make_once, split, to_model_range

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.diffusion import equations, schedule, solvers
from diffusers_compress.diffusion.finishers import ABOUT, network_fingerprint
from diffusers_compress.metrics import wasserstein

LOG2_SIGMA = int(wasserstein.LOG2_SIGMA)
LEVELS = 5  # of noise, at which errors are measured before the training
HELD_OUT = 4  # batches for validation
TEACHER_CALLS = 10


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least --size pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished student go here")
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument(
        "--start", type=Path, help="a student of this rank, perhaps of a model that was trained anew, to go on from"
    )
    parser.add_argument("--latents", type=Path, help="the photos' latents, [photos][2 mirrored], from or for other runs")
    parser.add_argument("--ratios", type=float, nargs=2, default=[0.35, 6.0], help="of alpha and sigma: from noisy to clean")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--error", type=float, default=0.1, help="share of the squared error in the loss")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--size", type=int, default=128, help="side of the windows in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------------- data


@torch.no_grad()
def read_photos(args, pipe):
    """Of each photo the pixels, uint8 [3, H, W] with sides that are multiples of 8, and the latents [C, H/8, W/8] of itself and mirrored."""
    photos = [photo[:, : photo.shape[1] // 8 * 8, : photo.shape[2] // 8 * 8] for photo in load_photos(args.photos)]
    if args.latents and args.latents.exists():
        latents = torch.load(args.latents, weights_only=True)
    else:
        views = ((photo, photo.flip(-1)) for photo in tqdm(photos, desc="encoding photos"))
        latents = [[pipe.encode_picture(to_model_range(view)[None])[0].cpu() for view in both] for both in views]
        if args.latents:
            torch.save(latents, args.latents)
    return [(photo, both) for photo, both in zip(photos, latents) if min(photo.shape[1:]) >= args.size]


def batch_of(photos, args, generator):
    """Random windows: pictures [B, 3, size, size] in [-1, 1], and their x_0 [B, C, size/8, size/8]."""
    windows, side = [], args.size // 8
    for i in torch.randint(len(photos), (args.batch,), generator=generator).tolist():
        photo, both = photos[i]
        mirrored = int(torch.randint(2, (), generator=generator))
        x_0, photo = both[mirrored], photo.flip(-1) if mirrored else photo
        top, left = (int(torch.randint(extent - side + 1, (), generator=generator)) for extent in x_0.shape[1:])
        pixels = photo[:, 8 * top : 8 * (top + side), 8 * left : 8 * (left + side)]
        windows.append((to_model_range(pixels), x_0[:, top : top + side, left : left + side]))
    return [torch.stack(parts) for parts in zip(*windows)]


# -------------------------------------------------------------------------------------------------------------------- loss


def distortions(x, x_hat):
    """Of pictures [B, 3, H, W] in [-1, 1]: Wasserstein distortion pooled over 2^LOG2_SIGMA pixels, and squared error, [B] each."""
    texture = error = 0
    for y, y_hat in zip(*(wasserstein.framelets(pictures.flatten(0, 1)) for pictures in (x, x_hat))):
        levels = LOG2_SIGMA - (x.shape[-1] // y.shape[-1]).bit_length() + 1
        (mu, nu), (mu_hat, nu_hat) = (moments(maps, levels) for maps in (y, y_hat))
        # W_2^2 of two distributions known by mean and deviation
        texture = texture + ((mu - mu_hat).square() + (nu - nu_hat).square()).mean((1, 2)).view(len(x), -1).sum(1)
        error = error + (y - y_hat).square().mean((1, 2)).view(len(x), -1).sum(1)
    return texture / 3, error / 3


def moments(y, levels):
    """Local mean and standard deviation of y [C, H, W]; unlike `wasserstein.local_statistics` with a gradient where there is no texture."""
    mean, square = y, y.square()
    for _ in range(levels):
        mean, square = wasserstein.pool(mean), wasserstein.pool(square)
    return mean, (square - mean.square()).clamp(min=0).add(1e-8).sqrt()


# ---------------------------------------------------------------------------------------------------------------- training


def with_lora(unet, rank, start=None):
    """The UNet with a trainable difference of this rank, or that of the folder `start`, in every layer that multiplies by a matrix."""
    names = [name for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights="gaussian"))
    if start:
        lora, _ = StableDiffusionPipeline.lora_state_dict(start)
        lora = {name.removeprefix("unet."): tensor for name, tensor in lora.items()}
        unknown = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(lora)).unexpected_keys
        if unknown:
            raise ValueError(f"{start} has layers that the UNet has not: {', '.join(unknown[:3])} ...")
    return unet


def span_of(noise, ratios):
    """The least noisy and the noisiest timestep of the student."""
    return [schedule.timestep_at(noise, ratio) for ratio in ratios[::-1]]


def train(accelerator, pipe, photos, validation, args):
    noise, unet = schedule.from_scheduler(pipe.scheduler), pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    texts = pipe.encode_prompt([""] * args.batch)["text"].detach()
    low, high = span_of(noise, args.ratios)

    def picture_of(model, x_0, eps, t):
        """The picture [B, 3, H, W] of one call at timesteps t [B]."""
        alpha, sigma = (level[t].float().to(x_0.device)[:, None, None, None] for level in (noise.alpha, noise.sigma))
        x_t = alpha * x_0 + sigma * eps
        with accelerator.autocast():
            output = model(x_t, t.to(x_0.device), texts, return_dict=False)[0]
        x_0_hat = equations.predict_x0(output, x_t, alpha, sigma, noise.prediction_type)
        with accelerator.autocast():
            return pipe.decode_latent(x_0_hat)

    def batch(photos, generator):
        return [part.to(accelerator.device) for part in batch_of(photos, args, generator)]

    sample = torch.Generator().manual_seed(1)
    held_out = [batch(validation, sample) for _ in range(HELD_OUT)]
    held_out = [(x, x_0, torch.randn(x_0.shape, generator=sample).to(x_0)) for x, x_0 in held_out]

    @torch.no_grad()
    def measured(picture_at, t):
        """Both distortions of held-out windows whose pictures are picture_at(x_0, eps, t)."""
        found = [distortions(x, picture_at(x_0, eps, t)) for x, x_0, eps in held_out]
        return np.array([float(torch.cat(column).mean()) for column in zip(*found)])

    def one_call(model):
        return lambda x_0, eps, t: picture_of(model, x_0, eps, torch.full((len(x_0),), t))

    def ten_calls(x_0, eps, t):
        alpha, sigma = noise.level(t)
        walks = [solvers.solve(x_t, t, TEACHER_CALLS, noise, pipe.scheduler) for x_t in (alpha * x_0 + sigma * eps).split(1)]
        with accelerator.autocast():
            return pipe.decode_latent(torch.cat(solvers.run(walks, lambda x_t, t, _: pipe.predict(x_t, t, {"text": texts}))))

    grid = np.linspace(low, high, LEVELS).round().astype(int)
    usual = [measured(one_call(unet), t) @ (1, args.error) for t in grid]
    checked = [schedule.timestep_at(noise, ratio) for ratio in np.geomspace(*args.ratios, 3)]
    teacher = {t: measured(ten_calls, t) for t in checked}

    options = {"decay": args.ema, "weight_decay": 0.0, "warm_up": 30}
    stage = Stage(accelerator, "student", with_lora(unet, args.rank, args.start), args.lr, args.minutes, args, **options)
    ratios = noise.ratio[low : high + 1].flip(0).log().numpy()  # rising

    def loss_of(model):
        """Distortions over those of the model's own single call, so that all noise levels have their say."""
        x, x_0 = batch(photos, stage.generator)
        # stratified over log(alpha / sigma)
        places = (torch.arange(len(x)) + torch.rand(len(x), generator=stage.generator)) / len(x)
        wanted = ratios[0] + places.numpy() * (ratios[-1] - ratios[0])
        t = torch.from_numpy(high - np.interp(wanted, ratios, range(len(ratios)))).round().long()
        eps = torch.randn(x_0.shape, generator=stage.generator).to(x_0)
        texture, error = distortions(x, picture_of(model, x_0, eps, t))
        return ((texture + args.error * error) / torch.from_numpy(np.interp(t, grid, usual)).to(texture)).mean()

    def validate(model):
        """Wasserstein distortion and squared error over those of the model's ten calls, by alpha / sigma."""
        found = {t: measured(one_call(model), t) / teacher[t] for t in checked}
        return {f"{name} at {noise.ratio[t]:.2f}": round(found[t][i], 3) for i, name in enumerate(("wd", "mse")) for t in checked}

    return stage.run(loss_of, validate)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    network, (photos, validation) = network_fingerprint(pipe), split(read_photos(args, pipe))

    def save(folder):
        student = train(accelerator, pipe, photos, validation, args)
        lora = get_peft_model_state_dict(student)  # PEFT's names: diffusers mixes two kinds, and then reads one
        StableDiffusionPipeline.save_lora_weights(folder, {name: tensor.half() for name, tensor in lora.items()})
        # every timestep of the range is the student's
        about = {"last_call_only": True, "network": network, "timesteps": span_of(pipe.noise_schedule(), args.ratios)}
        (folder / ABOUT).write_text(json.dumps(about) + "\n")
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
        levels = {name: pipe.scheduler.config.get(name) for name in names}
        zero_snr = bool(pipe.scheduler.config.get("rescale_betas_zero_snr"))
        steps = {"original_inference_steps": levels["num_train_timesteps"]}
        TCDScheduler(**levels, **steps, rescale_betas_zero_snr=zero_snr).save_pretrained(folder)

    print(f"wrote {make_once(args.output / 'student', save)}")


if __name__ == "__main__":
    main()
