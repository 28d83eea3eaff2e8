"""DiffC's decoder with and without a finisher: what the last calls of the network bring, of files that were written and read back.

    python benchmarks/finishers.py KODAK --every 4

Each picture becomes a file at each rate (or is there already, from an earlier run). The file is read, its coding loop runs once, as in
`decompress`, and the picture is finished in several ways. Total calls are those of the loop and of the finish.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.codecs.diffc.ends import Receiver
from diffusers_compress.codecs.diffc.finish import Finish, finished
from diffusers_compress.codecs.diffc.format import read_file
from diffusers_compress.coding.channels import channel_of
from diffusers_compress.diffusion import schedule
from diffusers_compress.diffusion.finishers import finisher_of
from diffusers_compress.format.limits import DEFAULT_LIMITS
from diffusers_compress.metrics import PICTURE_METRICS, distortion

METRICS = ("wasserstein", "swd", "hf_ratio", "psnr", "ms_ssim")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--finisher", default="embedded", help="as `decompress` takes it")
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--calls", type=int, nargs="*", default=[1, 10], help="of the model alone")
    parser.add_argument("--realism", type=float, nargs="*", default=[], help="of the model alone, in the most of these calls")
    parser.add_argument("--student-calls", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--files", type=Path, default=Path("finishers"), help="folder of the files")
    parser.add_argument("--save", type=Path, help="folder for the decoded pictures")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    args.files.mkdir(parents=True, exist_ok=True)
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    student = finisher_of(pipe, args.finisher if args.student_calls else None)
    metrics = [PICTURE_METRICS[name].load() for name in METRICS]
    ways = [(f"{count} of the model", Finish(num_inference_steps=count)) for count in args.calls]
    ways += [(f"realism {a:g}", Finish(num_inference_steps=max(args.calls), realism=a)) for a in args.realism]
    for count in args.student_calls:
        own = min(count, 1) if student.last_call_only else count
        name = f"{own} of the student" if own == count else f"{count - own} of the model, {own} of the student"
        ways.append((name, Finish(num_inference_steps=count, finisher=student)))
    noise, rows = schedule.from_pure_noise(pipe.noise_schedule()), defaultdict(list)
    paths = sorted(path for path in args.pictures.iterdir() if path.suffix in {".png", ".webp", ".jpg"})[:: args.every]
    for bpp in args.bpp:
        for path in paths:
            image, file = Image.open(path).convert("RGB"), args.files / f"{path.stem}-{bpp:g}.dfc"
            if not file.exists():
                file.write_bytes(pipe.compress(image, target_bpp=bpp).bitstreams[0])
            header, parameters, payload, _ = read_file(file.read_bytes(), DEFAULT_LIMITS)
            pipe.check_model([header], allow_other_model=False)
            asked = []  # at which timesteps
            receivers, shape = [Receiver(noise, parameters, payload)], pipe.latent_shape(header.height, header.width)
            ends = pipe.reverse(noise, channel_of(parameters.channel), receivers, shape, [""], lambda *step: asked.append(step))
            for name, how in ways:
                last = []  # calls
                decoded = finished(pipe, ends, [header], [parameters.prompt], how, watch=lambda *step: last.append(step))[0]
                if args.save:
                    args.save.mkdir(parents=True, exist_ok=True)
                    decoded.save(args.save / f"{path.stem}-{bpp:g}-{name}.png".replace(",", "").replace(" ", "_"))
                x, x_hat = distortion.samples(image), distortion.samples(decoded)
                figures = [metric(x, x_hat, "") for metric in metrics]
                rows[bpp, name].append([len(asked) + len(last), ends[0][1], *figures])
                print(path.stem, bpp, name, *(f"{figure:.5g}" for figure in rows[bpp, name][-1]), flush=True)
    print(
        f"\nmeans of {len(paths)} pictures\n\n| bpp | last calls | all calls | {' | '.join(METRICS)} |\n|--|--|--|{'--|' * len(METRICS)}"
    )
    for (bpp, name), figures in rows.items():
        calls, _, *means = np.mean(figures, axis=0)
        print(f"| {bpp:g} | {name} | {calls:.1f} | {' | '.join(f'{mean:.4g}' for mean in means)} |")


if __name__ == "__main__":
    main()
