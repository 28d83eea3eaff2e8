"""DiffC on a real model, measured and put beside what others published, on one page:

    python examples/prove_it.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --pictures KODAK --dtype float16

On a machine with the weights and, for large models, a GPU. Encodes every picture at several rates, decodes, measures and times; then decodes all
files once more in a process of its own, and says how far the pictures differ. `OUT/prove_it.html` is the page, `OUT/report.html` the whole
report with plots and pictures. A run that was stopped goes on. With `--calibrate-on FOLDER` the model is first measured on other pictures, and
`OUT/model` can be shared: `diffusers-compress push NAME/REPOSITORY --model OUT/model`.

Without --model it takes the embedded one, without --pictures the demo's photo, and runs offline.
"""

import argparse
import shlex
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.cli.loading import device_of, model_source
from diffusers_compress.evaluation import evaluate, parse_codec, set_figures, write_rows
from diffusers_compress.evaluation.report import (
    STYLE,
    cell,
    cost_table,
    html_table,
    notes_of,
    software_text,
    summarise,
    write_report,
)
from diffusers_compress.files import write_file

METRICS = ("psnr", "ms_ssim", "lpips_alex", "dists")
SETS = ("fid", "kid")
HERE, ONEDC, AEIC, COD, DIFFEIC = "abcde"
SOURCES = {
    HERE: "measured here",
    ONEDC: "read off rd_curve.png of OneDC's repository, about 5 %; the DiffC there was run by OneDC's authors, who do not say on which model",
    AEIC: "AEIC_SE.txt of AEIC's repository",
    COD: "read off RD.png of CoD-Lite's repository, about 5 %; Kodak at 512x512 pixels, FID over patches of 64x64",
    DIFFEIC: "table of DiffEIC's repository",
}
# Method, pictures, bits per pixel, PSNR in dB, LPIPS, DISTS, FID, source. None of it was measured here.
PUBLISHED = [
    ("DiffC", "Kodak", 0.0102, None, 0.362, 0.165, None, ONEDC),
    ("DiffC", "Kodak", 0.0155, None, 0.288, 0.139, None, ONEDC),
    ("DiffC", "Kodak", 0.0243, None, 0.224, 0.112, None, ONEDC),
    ("DiffC", "Kodak", 0.0423, None, 0.163, 0.087, None, ONEDC),
    ("DiffC", "Kodak", 0.0625, None, 0.130, 0.074, None, ONEDC),
    ("DiffC", "Kodak", 0.0795, None, 0.113, 0.065, None, ONEDC),
    ("DiffC", "CLIC2020", 0.0122, 24.05, None, None, 8.9, ONEDC),
    ("DiffC", "CLIC2020", 0.036, 26.75, None, None, 5.25, ONEDC),
    ("DiffC", "CLIC2020", 0.087, 28.75, None, None, 3.7, ONEDC),
    ("OneDC", "Kodak", 0.010, None, 0.22, 0.131, None, ONEDC),
    ("OneDC", "Kodak", 0.024, None, 0.155, 0.097, None, ONEDC),
    ("OneDC", "Kodak", 0.051, None, 0.115, 0.076, None, ONEDC),
    ("OneDC", "Kodak", 0.078, None, 0.096, 0.066, None, ONEDC),
    ("OneDC", "CLIC2020", 0.019, 25.2, None, None, 5.0, ONEDC),
    ("OneDC", "CLIC2020", 0.040, 26.9, None, None, 3.6, ONEDC),
    ("OneDC", "CLIC2020", 0.090, 28.6, None, None, 2.4, ONEDC),
    ("AEIC-SE", "Kodak", 0.0041, 18.99, 0.342, 0.155, None, AEIC),
    ("AEIC-SE", "Kodak", 0.0143, 21.30, 0.215, 0.108, None, AEIC),
    ("AEIC-SE", "Kodak", 0.0241, 22.16, 0.175, 0.0915, None, AEIC),
    ("AEIC-SE", "Kodak", 0.0370, 22.90, 0.147, 0.0815, None, AEIC),
    ("AEIC-SE", "CLIC2020", 0.0104, 23.91, 0.172, 0.079, 4.00, AEIC),
    ("AEIC-SE", "CLIC2020", 0.0282, 25.99, 0.115, 0.056, 2.45, AEIC),
    ("CoD-Lite", "Kodak", 0.0039, None, 0.338, 0.208, 51, COD),
    ("CoD-Lite", "Kodak", 0.0156, None, 0.224, 0.140, 38, COD),
    ("CoD-Lite", "Kodak", 0.031, None, 0.16, 0.112, 31.5, COD),
    ("CoD-Lite", "Kodak", 0.125, None, 0.097, 0.071, 24.5, COD),
    ("PerCo SD", "Kodak", 0.0324, 19.53, 0.297, None, None, DIFFEIC),
    ("PerCo SD", "Kodak", 0.126, 22.79, 0.143, None, None, DIFFEIC),
]
HEAD = ["codec", "pictures", "bits per pixel", "PSNR, dB ↑", "LPIPS ↓", "DISTS ↓", "FID ↓", "note"]
PROTOCOL = """Ours: bits per pixel are 8 x bytes of the file / pixels of the picture, at full size; LPIPS with AlexNet; FID over patches
of 256x256 pixels. Others may count, crop and average in other ways; LPIPS with another network and FID over other patches are other
figures. Compare what the notes say is alike. Means over pictures."""


def second_decoding(out, rows, model, args):
    """Every file decoded anew in a process of its own: {bits per pixel asked: (pictures, equal ones, largest difference in levels)}."""
    decoded = [row for row in rows if "decoded" in row]
    first = decoded[0]
    files = (out / first["file"]).parents[len(Path(first["picture"]).parts)]  # FILES/0.01/PICTURE.dfc
    words = [
        files,
        out / "again",
        "--decode",
        "--model",
        model,
        "--device",
        args.device,
        "--dtype",
        args.dtype,
        "--batch-size",
        1,
    ]
    command = [sys.executable, "-m", "diffusers_compress.cli", "batch", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for row in decoded:
        one = np.asarray(Image.open(out / row["decoded"])).astype(int)
        other = np.asarray(Image.open(out / "again" / (out / row["file"]).relative_to(files).with_suffix(".png")))
        found.setdefault(row["target_bpp"], []).append(int(np.abs(one - other).max()))
    return {bpp: (len(most), most.count(0), max(most)) for bpp, most in found.items()}


def page(model, rows, summary, again, notes, software, command):
    """The page, as HTML."""
    ours = [
        [
            f"{line['codec']}, ours",
            f"{line['pictures']} given",
            *(cell(line.get(name)) for name in ("bpp", "psnr", "lpips_alex", "dists", "fid")),
        ]
        for line in summary
    ]
    table = [[*values, HERE] for values in ours]
    table += [[method, pictures, *map(cell, values), source] for method, pictures, *values, source in PUBLISHED]
    table = [[value.replace("n/a", "–") for value in values] for values in table]
    missing = [note for note in notes if "not available" in note]
    second = [[f"{bpp:g}", str(count), str(equal), str(most)] for bpp, (count, equal, most) in again.items()]
    parts = [
        f"<h1>DiffC on {len({row['picture'] for row in rows})} pictures, beside what others published</h1>",
        f"<p>Ours with {escape(model)}. <a href='report.html'>Plots, and pictures at the same bytes</a>.</p>",
        html_table(HEAD, table),
        f"<p>{escape(PROTOCOL)}</p><p>",
        "<br>".join(f"{letter}: {escape(source)}" for letter, source in SOURCES.items()),
        "</p>",
        "<h2>Weights that were missing</h2><ul>",
        *(f"<li>{escape(note)}</li>" for note in missing or ["none"]),
        "</ul><h2>Decoded again, in another process</h2>",
        html_table(["target bpp", "pictures", "equal in every pixel", "largest difference, levels of 255"], second),
        "<h2>Time and memory</h2>",
        html_table(*cost_table(summary)),
        "<p>Wall seconds a picture, means.</p><h2>Notes</h2><ul>",
        *(f"<li>{escape(note)}</li>" for note in [note for note in notes if note not in missing] or ["none"]),
        f"</ul><h2>Made by</h2><pre>{escape(command)}\n\n{escape(software)}</pre>",
    ]
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DiffC, measured</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
    return head + "".join(parts) + "</body></html>"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hub id; default: the embedded model")
    parser.add_argument("--pictures", type=Path, help="folder; default: the demo's photo")
    parser.add_argument("--calibrate-on", type=Path, metavar="FOLDER", help="of other pictures")
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--out", type=Path, default=Path("prove_it"))
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    args.device = device_of(args.device)

    pictures, model = args.pictures, model_source(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    if pictures is None:
        pictures = args.out.with_name(args.out.name + "_pictures")
        pictures.mkdir(exist_ok=True)
        write_file(pictures / demo_photo().name, demo_photo().read_bytes(), overwrite=True)
    if args.calibrate_on:
        calibrated = args.out / "model"
        if not calibrated.exists():
            words = [
                "calibrate",
                args.calibrate_on,
                "--out",
                calibrated,
                "--model",
                model,
                "--device",
                args.device,
                "--dtype",
                args.dtype,
            ]
            subprocess.run([sys.executable, "-m", "diffusers_compress.cli", *map(str, words)], check=True)
        model = str(calibrated)

    codec = parse_codec("diffc", model)
    with Progress() as bar:
        task = bar.add_task("pictures", total=None)
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        rows = evaluate(pictures, args.out, [codec], args.bpp, METRICS, args.device, args.dtype, progress=show)
    write_rows(args.out, rows)
    figures = set_figures(pictures, args.out, rows, list(SETS))
    command = shlex.join(["python", "examples/prove_it.py", *sys.argv[1:]])
    write_report(pictures, args.out, rows, command, figures)
    again = second_decoding(args.out, rows, model, args)
    notes = notes_of(args.out, rows, figures)
    name = args.model or "the embedded model, which is small and for tests"
    html = page(name, rows, summarise(rows, figures), again, notes, software_text(args.out, rows), command)
    write_file(args.out / "prove_it.html", html.encode(), overwrite=True)
    print(args.out / "prove_it.html")
    if args.calibrate_on:
        print(f"to share it: diffusers-compress push NAME/REPOSITORY --model {model}")


if __name__ == "__main__":
    main()
