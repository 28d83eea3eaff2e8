"""Train a small ControlNet that paints along sketches, for `TextSketchPipeline`; the model under it stays as it is.

    python examples/train_sketch_controlnet.py --photos FOLDER --output RUN

Zhang et al. 2023 (ControlNet): a copy of the UNet's encoder half sees the sketch, and adds to the UNet's features by convolutions
that start at zero. Here it sees the thumbnail's colours too. Both are made as for a file, at random sizes and thresholds, and left out
now and then. A run that was stopped goes on from its last checkpoint when the same command is given again; RUN/model is what
`TextSketchPipeline.from_pretrained` takes.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ControlNetModel
from PIL import Image
from tqdm.auto import tqdm
from train_common import Stage, forget_paths, make_once, random_crop, split, target_of, to_model_range

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.codecs.text_sketch import control, edges, thumbnail
from diffusers_compress.codecs.text_sketch.format import grid_shape
from diffusers_compress.diffusion import schedule

SIDES = (64, 96, 128, 192)  # cells along the longer side of a sketch
HELD_OUT = 6  # batches for validation
LEAST = 0.25  # noise of training, as t / T
TIMES = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0)  # of validation


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least --size pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument(
        "--start", type=Path, help="ControlNet to go on from; default: the UNet's encoder half, as far as it fits"
    )
    parser.add_argument("--latents", type=Path, help="the photos' latents, [photos][2 mirrored], from or for other runs")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--size", type=int, default=256, help="side of the windows in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument(
        "--embedding", type=int, nargs="+", default=[8, 16, 24, 48], help="widths of the layers that shrink the sketch"
    )
    parser.add_argument("--drop-sketch", type=float, default=0.1, help="how often")
    parser.add_argument("--drop-thumbnail", type=float, default=0.25)
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_controlnet(unet, embedding):
    """One that fits the UNet: its encoder half without attention, and half of its middle."""
    config = unet.config
    controlnet = ControlNetModel(
        in_channels=config.out_channels,
        conditioning_channels=4,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        conditioning_embedding_out_channels=embedding,
    )
    state, own = unet.state_dict(), controlnet.state_dict()
    same = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    first = state["conv_in.weight"][:, : config.out_channels]  # a `WienerUNet` sees more than x_t
    controlnet.load_state_dict(own | same | {"conv_in.weight": first, "conv_in.bias": state["conv_in.bias"]})
    # zero here as well, it would take long until a gradient comes by
    controlnet.controlnet_cond_embedding.conv_out.reset_parameters()
    return controlnet


# -------------------------------------------------------------------------------------------------------------------- data


@torch.no_grad()
def read_photos(folder, pipe, latents):
    """Of each photo its latents [C, h, w] (itself, mirrored), the strengths of its edges on the grids of SIDES as bytes, and its thumbnail's
    colours [3, rows, columns] as a file gives them. `latents`: those of all photos if they are known."""
    found = []
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".webp", ".png", ".jpg", ".jpeg"})
    for number, path in enumerate(tqdm(paths, desc="reading photos")):
        with Image.open(path) as image:
            x = to_model_range(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        x = x[:, : x.shape[1] // 8 * 8, : x.shape[2] // 8 * 8]
        views = latents[number] if latents else [pipe.encode_picture(view[None])[0].cpu() for view in (x, x.flip(-1))]
        strengths = [(255 * edges.strengths(x, side)).astype(np.uint8) for side in SIDES]
        small = edges.reduced(x, grid_shape(*x.shape[1:], thumbnail.SIDE))
        found.append((views, strengths, thumbnail.dequantize(thumbnail.quantize(small))))
    return found


def window(photo, args, generator):
    """(x_0 [C, h, w], control image [4, 8 h, 8 w]) of a random window."""

    def chance(probability):
        return float(torch.rand((), generator=generator)) < probability

    (plain, mirrored), strengths, colours = photo
    height, width = (8 * side for side in plain.shape[1:])
    strength = strengths[int(torch.randint(len(strengths), (), generator=generator))]
    threshold = 0.2 + 0.4 * float(torch.rand((), generator=generator))
    grid = edges.quantized(strength / 255, threshold, 2)
    sketch = None if chance(args.drop_sketch) else edges.spread(grid, 2, height, width)
    colours = None if chance(args.drop_thumbnail) else control.enlarged(colours, height, width)
    image = control.control_image(sketch, colours, 4, height, width)
    flip = chance(0.5)
    x_0, image = (mirrored, image.flip(-1)) if flip else (plain, image)
    # one window of both: the image's pixels of a latent pixel as channels
    both = torch.cat([x_0, torch.nn.functional.pixel_unshuffle(image, 8)])
    both = random_crop(both, args.size // 8, generator)
    return both[: len(x_0)], torch.nn.functional.pixel_shuffle(both[len(x_0) :], 8)


# ---------------------------------------------------------------------------------------------------------------- training


def train(accelerator, pipe, photos, validation, args):
    noise, unet = schedule.from_scheduler(pipe.scheduler), pipe.unet.requires_grad_(False)
    controlnet = ControlNetModel.from_pretrained(args.start) if args.start else make_controlnet(unet, args.embedding)
    options = {"decay": args.ema, "weight_decay": 0.0}
    stage = Stage(accelerator, "controlnet", controlnet, args.lr, args.minutes, args, **options)
    text, last = pipe.encode_prompt([""])["text"].detach(), noise.alpha.numel() - 1

    def batch(photos, generator):
        chosen = torch.randint(len(photos), (args.batch,), generator=generator).tolist()
        windows = [window(photos[i], args, generator) for i in chosen]
        return [torch.stack(parts).to(accelerator.device) for parts in zip(*windows)]

    def errors(model, x_0, image, t, eps, scale=1.0):
        """Of the network's output, [B]."""
        alpha, sigma = (level[t].float().to(x_0.device)[:, None, None, None] for level in (noise.alpha, noise.sigma))
        x_t, times, texts = alpha * x_0 + sigma * eps, t.to(x_0.device), text.expand(len(x_0), -1, -1)
        with accelerator.autocast():
            down, middle = model(x_t, times, texts, image, scale, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            output = unet(x_t, times, texts, return_dict=False, **added)[0].float()
        return (output - target_of(x_0, eps, alpha, sigma, noise.prediction_type)).square().mean((1, 2, 3))

    sample = torch.Generator().manual_seed(1)
    held_out = [batch(validation, sample) for _ in range(HELD_OUT)]

    @torch.no_grad()
    def mean_error(model, t, scale):
        """On held-out windows, at one timestep."""
        found = []
        for x_0, image in held_out:
            eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)).to(x_0)
            found.append(errors(model, x_0, image, torch.full((len(x_0),), t), eps, scale).mean())
        return float(torch.stack(found).mean())

    grid = [round(last * i / 16) for i in range(17)]
    usual = np.interp(range(last + 1), grid, [mean_error(stage.bare_model, t, 0.0) for t in grid])

    def loss_of(model):
        """Errors over those without a ControlNet, so that all noise levels have their say."""
        x_0, image = batch(photos, stage.generator)
        # stratified; the sketch decides little where there is little noise
        places = (torch.arange(len(x_0)) + torch.rand(len(x_0), generator=stage.generator)) / len(x_0)
        t = (last * (LEAST + (1 - LEAST) * places)).round().long()
        eps = torch.randn(x_0.shape, generator=stage.generator).to(x_0)
        return (errors(model, x_0, image, t, eps) / torch.tensor(usual)[t].to(x_0)).mean()

    def validate(model):
        return {f"at {time}": round(mean_error(model, round(time * last), 1.0) / usual[round(time * last)], 4) for time in TIMES}

    return stage.run(loss_of, validate)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(accelerator.device)
    known = torch.load(args.latents, weights_only=True) if args.latents and args.latents.exists() else None
    photos = read_photos(args.photos, pipe, known)
    if args.latents and known is None:
        torch.save([views for views, *_ in photos], args.latents)
    photos, validation = split([photo for photo in photos if min(photo[0][0].shape[1:]) >= args.size // 8])

    def save(folder):
        train(accelerator, pipe, photos, validation, args).half().save_pretrained(folder / "controlnet")
        forget_paths(folder)
        base = os.path.relpath(args.model, args.output / "model") if Path(args.model).is_dir() else args.model
        (folder / "adapter.json").write_text(json.dumps({"base": base}, indent=2) + "\n")

    print(f"wrote {make_once(args.output / 'model', save)}")


if __name__ == "__main__":
    main()
