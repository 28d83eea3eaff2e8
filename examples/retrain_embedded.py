"""Make all of diffusers_compress/embedded anew, in order: the model, what DiffC and Relic know of it, PerCo's parts.

    python examples/retrain_embedded.py --photos FOLDER --output RUN

    RUN/model            train_embedded.py: autoencoder, prior, decoder
    RUN/variance_head    train_variance_head.py: calibration of the denoiser's error, variance head
    RUN/relic            train_relic.py: hyperprior
    RUN/perco-PRESET     train_perco.py
    RUN/embedded         the finished folders `model` and `perco`, as the package ships them

A run that was stopped, anywhere, goes on when the same command is given again, so it may be cut into pieces: `timeout 590 python ...`.
Options that are not listed below go to train_embedded.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

SHARES = {
    "decoder": 0.25,
    "unet": 0.5,
    "texture": 0.05,
    "variance head": 0.06,
    "hyperprior": 0.14,
}  # of the minutes
PERCO = (
    "--crop 256 --lr 5e-4 --hyper-lr 1e-3 --warm-up 100 --schedule cosine --ema 0.998 "
    "--sketch-weight 1 --rank 16 --codebook-dim 16 --distance cosine --whole "
    "down_blocks.[01]|up_blocks.[12]|conv_norm_out|conv_out|time_embedding --features 64 --caption-drop 0 --checkpoint-every 250"
)
# Options, and the share of the steps that train the hyper-encoder alone
PERCO_PRESETS = {
    "0.0019": ("--width 64 --batch 8 --sigmas 0.3 2000", 3 / 4),
    "0.1250": ("--width 48 --batch 4 --sigmas 0.1 2000", 3 / 7),
}
CURVE_POINTS = 8


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=240, help="for all but PerCo, and but for encoding and calibrating")
    parser.add_argument("--perco-steps", type=int, default=4000, help="for each of two presets; 0: no PerCo")
    parser.add_argument("--mixed-precision", default="bf16", help="no: on a CPU without avx512_bf16, where bf16 is slow")
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    return parser.parse_known_args()


def commands(args, further):
    """(folder in RUN, script and its arguments) in order."""
    minutes = {name: share * args.minutes for name, share in SHARES.items()}
    common = ["--photos", args.photos, "--checkpoint-minutes", args.checkpoint_minutes]
    stages = [word for name in ("decoder", "unet", "texture") for word in (f"--{name}-minutes", minutes[name])]
    precision = ["--mixed-precision", args.mixed_precision]
    yield "model", ["train_embedded.py", *common, *precision, *stages, *further]

    model = ["--model", args.output / "model" / "model"]
    latents = ["--latents", args.output / "latents.pt"]
    yield "variance_head", ["train_variance_head.py", *common, *model, *latents, "--minutes", minutes["variance head"]]

    model = ["--model", args.output / "variance_head" / "model"]
    stages = ["--stages", "hyperprior", "export", "--hyperprior-minutes", minutes["hyperprior"]]
    yield "relic", ["train_relic.py", *common, *model, *latents, *stages]

    model = ["--model", args.output / "relic" / "model", "--cache", args.output / "perco.pt"]
    pictures = ["--pictures", args.photos, "--validation", 40]  # the same as in train_common.py
    for preset, (options, alone) in PERCO_PRESETS.items() if args.perco_steps else ():
        steps = ["--steps", args.perco_steps, "--sketch-steps", round(alone * args.perco_steps)]
        yield (
            f"perco-{preset}",
            ["train_perco.py", *pictures, *model, *precision, *PERCO.split(), *options.split(), "--preset", preset, *steps],
        )


def assemble(run, folder):
    """The shipped layout, and its size."""
    shutil.copytree(run / "relic" / "model", folder / "model", dirs_exist_ok=True)
    for preset in PERCO_PRESETS:
        if (run / f"perco-{preset}").exists():
            shutil.copytree(run / f"perco-{preset}" / "adapter", folder / "perco" / preset, dirs_exist_ok=True)
            (folder / "perco" / preset / "adapter.json").write_text(json.dumps({"base": "../../model"}) + "\n")
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
    tables = [line for name in ("model", "variance_head", "relic") for line in curves(args.output / name / "log.jsonl")]
    (args.output / "curves.md").write_text("\n".join(tables) + "\n")
    print(f"wrote {args.output / 'embedded'}; the curves are in {args.output / 'curves.md'}")


if __name__ == "__main__":
    main()
