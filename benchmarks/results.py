"""RESULTS.md: every codec of this package and today's codecs on Kodak and BSDS, with the embedded model.

    python benchmarks/results.py KODAK_FOLDER BSDS_FOLDER --jobs 2

Goes on where it was stopped, in the folder `--work`, which also holds the reports (HTML), files and decoded pictures.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from diffusers_compress import embedded_model, images, metrics
from diffusers_compress.contract import CODECS
from diffusers_compress.evaluation.baselines import BASELINES
from diffusers_compress.evaluation.codec import load_pipeline, parse_codec
from diffusers_compress.evaluation.report import (
    bd_rates,
    bd_table,
    cost_table,
    markdown,
    measured,
    quality_table,
    summarise,
    write_report,
)
from diffusers_compress.evaluation.rows import write_rows
from diffusers_compress.evaluation.run import evaluate
from diffusers_compress.evaluation.state import software
from diffusers_compress.evaluation.task import open_original
from diffusers_compress.files import find_files
from diffusers_compress.metrics import distortion

# Codecs and the bits per pixel not to exceed: PerCo's are those of its two models, and most codecs of today begin at 0.2.
MEASURED = [
    (["diffc", "diffc:decode.realism=0"], [0.02, 0.05, 0.1, 0.2, 0.4]),
    (["relic"], [0.05, 0.1, 0.3]),
    (["perco", "perco:decode.realism=0"], [0.004, 0.14]),
    (["cdc", "cdc:decode.gamma=0"], [0.1, 0.2, 0.4]),
    (list(BASELINES), [0.02, 0.05, 0.1, 0.2, 0.4]),
]
METRICS = (*metrics.WITHOUT_WEIGHTS, "lpips_alex", "dists")
ANCHOR = "jpeg2000"  # the one codec of today that reaches all rates
COMMAND = "python benchmarks/results.py KODAK_FOLDER BSDS_FOLDER --every {every} --jobs {jobs}"

# Kodak, full size, as others published it; none of it was measured here. "figure": read off a plot.
PEERS = [
    (
        "DiffC, SD 1.5, without prompt (Vonderfecht, Liu 2025)",
        ".0081 / .0189 / .089",
        "19.7 / 21.6 / 24.5",
        ".38 / .273 / .14",
        "figure",
    ),
    ("SD 1.5 autoencoder alone", "-", "25.65", ".078", "figure"),
    ("PerCo (SD 2.1) (Koerber et al. 2024)", ".0324 / .126", "19.53 / 22.79", ".297 / .143", "table of DiffEIC's repository"),
    ("DiffEIC (Li et al. 2024)", ".0201 / .0609 / .123", "19.57 / 22.52 / 24.44", ".319 / .171 / .106", "its repository's table"),
    ("RDEIC, 5 steps", ".0238 / .0436 / .120", "22.21 / 23.51 / 25.81", ".203 / .156 / .086", "table of DiffEIC's repository"),
    ("StableCodec (2025)", ".0108 / .0203 / .0341", "21.31 / 22.30 / 23.01", ".244 / .195 / .166", "its repository's table"),
    (
        "MS-ILLM (Muckley et al. 2023), a GAN",
        ".0447 / .0809 / .154",
        "24.73 / 25.92 / 27.53",
        ".158 / .110 / .073",
        "table of DiffEIC's repository",
    ),
    ("VTM (H.266)", ".0340 / .0952", "25.25 / 27.95", ".495 / .346", "table of DiffEIC's repository"),
    ("SD 2.1 autoencoder alone", "-", "26.65", ".0726", "table of DiffEIC's repository"),
]


def measure(folder, out, args):
    """Rows of our codecs and of today's."""
    rows = []
    for names, rates in MEASURED:
        codecs = [parse_codec(name, embedded_model(key) if (key := name.partition(":")[0]) in CODECS else "") for name in names]
        with Progress() as bar:
            task = bar.add_task(f"{folder.name}: {codecs[0].label}, ...", total=None)
            show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
            rows += evaluate(folder, out, codecs, rates, METRICS, args.device, every=args.every, jobs=args.jobs, progress=show)
    return rows


@torch.no_grad()
def autoencoder_psnr(folder, args):
    """Mean PSNR of the embedded model's autoencoder alone, which no codec made of it can pass by much."""
    pipe, found = load_pipeline("diffc", embedded_model(), args.device, "float32"), []
    for path in list(find_files(folder).files.values())[:: args.every]:
        image = open_original(path)
        x = images.pad(images.to_tensor(image)[0][None], pipe.vae_scale_factor).to(args.device)
        decoded = images.to_output(images.crop(pipe.decode_latent(pipe.encode_picture(x)), image.height, image.width))[0]
        found.append(distortion.psnr(distortion.samples(image), distortion.samples(decoded)))
    return np.mean(found)


def section(title, folder, out, args):
    """Measure one set: its part of RESULTS.md."""
    rows = measure(folder, out, args)
    write_rows(out, rows)
    write_report(folder, out, rows, COMMAND.format(every=args.every, jobs=args.jobs), anchor=ANCHOR)
    summary = summarise(rows)
    names = [name for name in measured(summary) if name != "hf_ratio"]
    over = sum(not row.get("reached") for row in rows if row["codec"].partition(":")[0] in CODECS)
    ours = sum(row["codec"].partition(":")[0] in CODECS for row in rows)
    missing = sorted({note for row in rows for note in row.get("note", "").split(" | ") if note})
    return [
        f"## {title}",
        f"{len({row['picture'] for row in rows})} pictures, means. The embedded model's autoencoder alone: "
        f"{autoencoder_psnr(folder, args):.2f} dB. Of the {ours} files of our codecs {over} exceed their target. A codec "
        'of today that cannot go as low as the target gives its smallest file, and "over target" says for how many pictures.',
        *(f"`{note}`" for note in missing),
        markdown(*quality_table(summary)),
        f"BD-rates (bits more or less for the same mean figure; in brackets the share of {ANCHOR}'s range compared):",
        markdown(*bd_table(bd_rates(summary, ANCHOR, names), ANCHOR, names)),
        "Wall seconds a picture; the rest of the total is channel coding and all else. Of codecs whose rate is searched for, one "
        "encoding at the rate found:",
        markdown(*cost_table(summary)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kodak", type=Path)
    parser.add_argument("bsds", type=Path)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=1, help="measure each n-th picture only")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each if there are several")
    parser.add_argument("--out", type=Path, default=Path("RESULTS.md"))
    args = parser.parse_args()

    parts = [
        "# Results",
        f"Made by `{COMMAND.format(every=args.every, jobs=args.jobs)}`. "
        "Every figure was taken on a file that was written, read back and decoded; "
        "bpp = 8 x bytes of the file / pixels of the original; PSNR, MS-SSIM and the rest are over 8-bit sRGB and are defined in "
        "`diffusers_compress/metrics`. The embedded model is small and was trained on two CPU cores: these figures tell of "
        "the codecs' machinery, not of what a large model reaches.",
        *section("Kodak", args.kodak, args.work / "kodak", args),
        *section("BSDS test pictures", args.bsds, args.work / "bsds", args),
        "## What others published (not measured here, large models)",
        "Kodak. Protocols differ between sources: a place to look, no comparison with the tables above.",
        markdown(["codec", "bpp", "PSNR, dB", "LPIPS (AlexNet)", "source"], [list(peer) for peer in PEERS]),
        "## Software",
        ", ".join(f"{name} {version}" for name, version in software().items()) + f"; {args.device}, {args.jobs} processes.",
    ]
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
