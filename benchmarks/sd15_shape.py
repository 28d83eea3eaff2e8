"""Where DiffC's time and memory go: VAE, network and channel, for a Stable Diffusion 1.5 of random weights or for a model folder.

    python benchmarks/sd15_shape.py --channels-last                                      # on a GPU: the whole shape in float16
    python benchmarks/sd15_shape.py --channels-last --compile --bpp 0.03 --steps 12
    python benchmarks/sd15_shape.py --channels-last --size 2048 2048 --tiling --bpp 0.03 --steps 12 --batch 1
    python benchmarks/sd15_shape.py --bpp 0.03 --batch 1                                 # on a CPU: a quarter of the width
    python benchmarks/sd15_shape.py --model FOLDER --photo PHOTO --bpp 0.05 --threads 2  # any model folder; "embedded" is ours

The shape is that of the public configuration: UNet 320/640/1280/1280 with cross-attention 768, text encoder CLIP ViT-L, VAE
128/256/512/512. On a CPU all widths are divided by --reduce, so these figures say nothing of Stable Diffusion's own speed.
The files have the sizes that --bpp asks for, and every step its network call, whatever the weights; but random weights predict
nothing, so the noise levels that the files reach, and the pictures, mean nothing.

Every row is measured in a fresh process, after an untimed round trip: on a GPU the same one, so that all that is timed was compiled before,
on a CPU one of a single step. Seconds are those of a whole batch (with several --repeats, of the median run), the device synchronised at
every border of a part; a part within another counts for itself alone. The parts: `vae` (encode_picture, decode_latent), `text`
(encode_prompt), `network` (predict), `channel` (encode, decode), `fingerprint`, `host`, which is the CPU's work on any device (pictures and
files read and written, rate control), and the rest, in which are the transforms and what a step's choice asks of the device. Calls are the
network's, each for all pictures of the batch that are still going. Peak memory is the most that the process allocated on the GPU, or on a
CPU the process's largest resident set, PyTorch itself included.
"""

import argparse
import multiprocessing
import platform
import resource
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.cli.terminal import quieten_libraries
from diffusers_compress.codecs.diffc.ends import Sender
from diffusers_compress.codecs.diffc.rate import RateControl
from diffusers_compress.coding.channels import CHANNELS, channel_of

PARTS = ("vae", "text", "network", "channel", "fingerprint", "host")
COLUMNS = ("size", "pictures", "bpp", "bytes each", "coded steps", "coder", "", "seconds", *PARTS, "rest", "calls", "peak GiB")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="time this model folder, or the embedded model, rather than random weights")
    parser.add_argument("--photo", type=Path, help="picture; default: synthetic ones of --size")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.03, 0.1])
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 12], help="coded steps")
    parser.add_argument("--decoding-steps", type=int, default=10, help="network calls that finish the picture")
    parser.add_argument("--channels", nargs="+", default=["trellis32"], choices=CHANNELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures at a time")
    parser.add_argument("--reduce", type=int, help="divide all widths by 1, 2 or 4; default: 1 on a GPU, 4 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--tiling", action="store_true", help="vae.enable_tiling()")
    parser.add_argument("--channels-last", action="store_true", help="memory format of UNet and VAE")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU seconds, for a busy machine")
    parser.add_argument("--repeats", type=int, help="default: 3 on a GPU, 1 on a CPU")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "float16")
    args.reduce = args.reduce or (4 if on_cpu else 1)
    args.repeats = args.repeats or (1 if on_cpu else 3)
    return args


# ------------------------------------------------------------------------------------------------------------------- models


def random_model(reduce, device):
    """Stable Diffusion 1.5 as its public configuration has it, all widths divided by `reduce`, with random weights."""
    torch.manual_seed(0)
    text = {"hidden_size": 768 // reduce, "intermediate_size": 3072 // reduce, "num_attention_heads": 12 // reduce}
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=[width // reduce for width in (320, 640, 1280, 1280)],
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768 // reduce,
            attention_head_dim=8,
            norm_num_groups=32 // reduce,
        )
        vae = AutoencoderKL(
            block_out_channels=[width // reduce for width in (128, 256, 512, 512)],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=32 // reduce,
            latent_channels=4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49_408, num_hidden_layers=12, **text)).eval()
    tokenizer = CLIPTokenizer.from_pretrained(embedded_model(), subfolder="tokenizer", model_max_length=77)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )
    return DiffCPipeline(scheduler, vae, text_encoder, tokenizer, unet)


def load(args):
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = embedded_model() if args.model == "embedded" else args.model
        pipe = DiffCPipeline.from_pretrained(model, dtype=dtype).to(args.device)
    else:
        pipe = random_model(args.reduce, args.device).to(args.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if args.tiling:
        pipe.vae.enable_tiling()
    if args.channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if args.compile:
        pipe.unet.compile()
    return pipe


def pictures(args, count):
    """The photo so many times, or as many synthetic pictures: smooth colours and noise."""
    if args.photo:
        return [images.open_image(args.photo)] * count
    width, height = args.size
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        made.append(Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)))
    return made


# ------------------------------------------------------------------------------------------------------------- measurements


def clock(args):
    """now() in seconds, at which the device has done all its work."""

    def now():
        if args.device != "cpu":
            torch.cuda.synchronize(args.device)
        return time.process_time() if args.cpu_time else time.perf_counter()

    return now


def watched(function, part, seconds, calls, within, now):
    """The function, which now adds to the seconds and calls of its part, less the seconds of other parts within it."""

    def run(*arguments, **options):
        within.append(0.0)
        start = now()
        result = function(*arguments, **options)
        spent = now() - start
        seconds[part] += spent - within.pop()
        calls[part] += 1
        if within:
            within[-1] += spent
        return result

    return run


def watch(pipe, channel, now):
    """Let pipeline, channel and rate control count: (seconds, calls) by part from now on."""
    counters = seconds, calls, _ = Counter(), Counter(), []
    parts = {
        "vae": [(pipe, "encode_picture"), (pipe, "decode_latent")],
        "text": [(pipe, "encode_prompt")],
        "network": [(pipe, "predict")],
        "fingerprint": [(pipe, "fingerprint")],
        "host": [(pipe, "read_goal"), (pipe, "read_files"), (pipe, "pictures_of"), (RateControl, "next_step"), (Sender, "file")],
    }
    for part, functions in parts.items():
        for owner, name in functions:
            setattr(owner, name, watched(getattr(owner, name), part, *counters, now))
    coder = channel_of(CHANNELS[channel].number)
    for name in ("encode", "decode"):
        vars(coder)[name] = watched(getattr(coder, name), "channel", *counters, now)  # a frozen object or a module
    return seconds, calls


def measure(args, bpp, steps, channel, batch):
    """({"encode": costs, "decode": costs} of a batch, costs being (seconds by part and in whole, calls), bytes of a file, peak GiB)."""
    torch.set_num_threads(args.threads)
    quieten_libraries()
    pipe, photos = load(args), pictures(args, batch)
    options = {"coder": channel, "batch_size": batch}
    first, last = (1, 1) if args.device == "cpu" else (steps, args.decoding_steps)
    sent = pipe.compress(photos, target_bpp=bpp, num_coding_steps=first, **options).bitstreams
    pipe.decompress(sent, num_inference_steps=last, batch_size=batch)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    now = clock(args)
    seconds, calls = watch(pipe, channel, now)
    runs = {"encode": [], "decode": []}

    def timed(direction, function):
        seconds.clear(), calls.clear()
        start = now()
        result = function()
        runs[direction].append(({**seconds, "all": now() - start}, calls["network"]))
        return result

    for _ in range(args.repeats):
        sent = timed("encode", lambda: pipe.compress(photos, target_bpp=bpp, num_coding_steps=steps, **options)).bitstreams
        timed("decode", lambda: pipe.decompress(sent, num_inference_steps=args.decoding_steps, batch_size=batch))
    if args.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB
    else:
        peak = torch.cuda.max_memory_allocated() / 2**30
    middle = {name: sorted(every, key=lambda run: run[0]["all"])[len(every) // 2] for name, every in runs.items()}
    return middle, sum(map(len, sent)) / batch, peak


# ------------------------------------------------------------------------------------------------------------------- tables


def conditions(args):
    """Device, versions and model in words."""
    device = torch.cuda.get_device_name(args.device) if args.device != "cpu" else f"CPU ({cpu_name()}, {args.threads} threads)"
    model = args.model or f"Stable Diffusion 1.5's shape, widths divided by {args.reduce}, random weights"
    flags = [name for name in ("tiling", "channels_last", "compile", "cpu_time") if getattr(args, name)]
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return ", ".join(
        [f"Device: {device}", versions, model, args.dtype, *flags, f"{args.decoding_steps} steps to finish a picture"]
    )


def cpu_name():
    """What Linux calls the processor, elsewhere its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main():
    args = parse_args()
    width, height = images.open_image(args.photo).size if args.photo else args.size
    print(f"{conditions(args)}.", flush=True)
    if args.device == "cpu":
        print("No GPU was used.")
    if not args.model:
        print("Random weights: sizes and calls are as they would be, the noise levels reached and the pictures mean nothing.")
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "|--" * len(COLUMNS) + "|", flush=True)
    for batch, bpp, steps, channel in product(args.batch, args.bpp, args.steps, args.channels):
        # A fresh process, so that its peak memory is that of this row alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            runs, size, peak = pool.submit(measure, args, bpp, steps, channel, batch).result()
        for direction, (seconds, calls) in runs.items():
            parts = [seconds.get(part, 0.0) for part in PARTS]
            split = " | ".join(f"{second:.2f}" for second in [*parts, seconds["all"] - sum(parts)])
            facts = f"{width}x{height} | {batch} | {bpp:g} | {size:,.0f} | {steps} | {channel} | {direction}"
            print(f"| {facts} | {seconds['all']:.2f} | {split} | {calls} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
