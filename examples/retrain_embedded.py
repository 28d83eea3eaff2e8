"""Make the embedded model anew, and in order all that depends on it.

    python examples/retrain_embedded.py --photos FOLDER --output RUN
    python examples/retrain_embedded.py --photos FOLDER --output RUN --start diffusers_compress/embedded    # each part goes on from this one

    RUN/model            train_embedded.py: autoencoder, prior, decoder
    RUN/variance_head    train_variance_head.py: calibration of the denoiser's error, variance head
    RUN/relic            train_relic.py: hyperprior
    RUN/perco-PRESET     train_perco.py
    RUN/text_sketch      train_sketch_controlnet.py
    RUN/refine           train_refine.py
    RUN/student          train_student.py
    RUN/embedded         the finished folders, as the package ships them; its cards are written by hand

A run that was stopped, anywhere, goes on when the same command is given again, so it may be cut into pieces: `timeout 590 python ...`.
Options that are not listed below go to train_embedded.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from train_common import split
from train_perco_data import SUFFIXES

SHARES = {
    "decoder": 0.15,
    "unet": 0.4,
    "texture": 0.03,
    "variance head": 0.04,
    "hyperprior": 0.08,
    "text_sketch": 0.1,
    "refine, estimator": 0.03,
    "refine": 0.1,
    "student": 0.07,
}  # of the minutes
WHOLE = "down_blocks.[01]|up_blocks.[12]|conv_norm_out|conv_out|time_embedding"  # modules whose differences are not of low rank
PERCO = (
    "--crop 256 --lr 5e-4 --schedule cosine --sketch-weight 1 --rank 16 --codebook-dim 16 --distance cosine "
    "--features 64 --caption-drop 0 --checkpoint-every 250"
)
PERCO_FROM_NOTHING = "--hyper-lr 1e-3 --warm-up 100 --ema 0.998"
PERCO_FROM_START = (
    "--hyper-lr 0 --warm-up 50 --ema 0.99 --searched --sketch-steps 0"  # the UNet alone, on the grids that a sender searches
)
# Options, and the share of the steps that train the hyper-encoder alone
PERCO_PRESETS = {
    "0.0019": (f"--width 64 --batch 8 --sigmas 0.3 2000 --whole {WHOLE.replace('[12]', '2')}", 3 / 4),
    "0.1250": (f"--width 48 --batch 4 --sigmas 0.1 2000 --whole {WHOLE}", 3 / 7),
}
REFINE = f"--draws 4 --rank 16 --whole {WHOLE}"
CURVE_POINTS = 8


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="RUN/embedded of an earlier run: each part goes on from it")
    parser.add_argument("--minutes", type=float, default=360, help="for all but PerCo, and but for encoding and calibrating")
    parser.add_argument("--perco-steps", type=int, default=4000, help="for each of two presets; 0: no PerCo")
    parser.add_argument("--mixed-precision", default="bf16", help="no: on a CPU without avx512_bf16, where bf16 is slow")
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    return parser.parse_known_args()


def commands(args, further):
    """(folder in RUN, script and its arguments) in order."""
    minutes = {name: share * args.minutes for name, share in SHARES.items()}
    common = ["--photos", args.photos, "--checkpoint-minutes", args.checkpoint_minutes]
    precision = ["--mixed-precision", args.mixed_precision]

    def start(*path):
        return ["--start", args.start.joinpath(*path)] if args.start else []

    stages = [word for name in ("decoder", "unet", "texture") for word in (f"--{name}-minutes", minutes[name])]
    yield "model", ["train_embedded.py", *common, *precision, *start("model"), *stages, *further]

    model = ["--model", args.output / "model" / "model"]
    latents = ["--latents", args.output / "latents.pt"]
    yield "variance_head", ["train_variance_head.py", *common, *model, *latents, "--minutes", minutes["variance head"]]

    model = ["--model", args.output / "variance_head" / "model"]
    stages = ["--stages", "hyperprior", "export", "--hyperprior-minutes", minutes["hyperprior"]]
    yield "relic", ["train_relic.py", *common, *model, *latents, *start("model", "hyperprior"), *stages]

    model = ["--model", args.output / "relic" / "model"]
    _, kept = split([path for path in args.photos.iterdir() if path.suffix.lower() in SUFFIXES])
    pictures = ["--pictures", args.photos, "--validation", len(kept), "--cache", args.output / "perco.pt"]
    for preset, (options, alone) in PERCO_PRESETS.items() if args.perco_steps else ():
        options = [*PERCO.split(), *options.split(), "--preset", preset, "--steps", args.perco_steps, *start("perco", preset)]
        options += (
            PERCO_FROM_START if args.start else f"{PERCO_FROM_NOTHING} --sketch-steps {round(alone * args.perco_steps)}"
        ).split()
        yield f"perco-{preset}", ["train_perco.py", *pictures, *model, *precision, *options]

    latents = ["--latents", args.output / "mirrored.pt"]
    options = [*start("text_sketch", "controlnet"), "--minutes", minutes["text_sketch"]]
    yield "text_sketch", ["train_sketch_controlnet.py", *common, *model, *latents, *precision, *options]

    options = ["--estimator-minutes", minutes["refine, estimator"], "--minutes", minutes["refine"], *REFINE.split()]
    yield "refine", ["train_refine.py", *common, *model, *precision, *start("refine"), *options]

    options = [*start("student"), "--minutes", minutes["student"]]
    yield "student", ["train_student.py", *common, *model, *latents, *precision, *options]


def assemble(run, folder):
    """The shipped layout, and its size."""
    shutil.copytree(run / "relic" / "model", folder / "model", dirs_exist_ok=True)
    finished = {f"perco-{preset}/adapter": f"perco/{preset}" for preset in PERCO_PRESETS}
    finished |= {"text_sketch/model": "text_sketch", "refine/adapter": "refine", "student/student": "student"}
    for source, part in finished.items():
        if (run / source).exists():
            shutil.copytree(run / source, folder / part, dirs_exist_ok=True)
            about = folder / part / "adapter.json"
            if about.exists():
                base = os.path.relpath(folder / "model", folder / part)
                about.write_text(json.dumps(json.loads(about.read_text()) | {"base": base}) + "\n")
    for path in folder.iterdir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"{path}: {size / 1e6:.2f} MB")


def curves(log):
    """Some lines of a log for each of its stages, as Markdown."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        lines = [row for row in rows if row["stage"] == stage]
        columns = [name for name in lines[0] if name != "stage"]
        yield f"\n| {stage}: " + " | ".join(columns) + " |\n" + "|--" * len(columns) + "|"
        for row in lines[:: -len(lines) // CURVE_POINTS][::-1]:
            yield "| " + " | ".join(str(row[name]) for name in columns) + " |"


def main():
    args, further = parse_args()
    for name, command in commands(args, further):
        done = args.output / name / "done"
        if not done.exists():
            script = [sys.executable, Path(__file__).with_name(command[0]), "--output", done.parent, *command[1:]]
            subprocess.run([str(word) for word in script], check=True)
            done.touch()
    assemble(args.output, args.output / "embedded")
    logs = [args.output / name / "log.jsonl" for name, _ in commands(args, further) if "perco" not in name]
    tables = [line for log in logs for line in curves(log)]
    (args.output / "curves.md").write_text("\n".join(tables) + "\n")
    print(f"wrote {args.output / 'embedded'}; the curves are in {args.output / 'curves.md'}")


if __name__ == "__main__":
    main()
