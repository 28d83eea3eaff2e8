"""Rate-distortion and rate-realism curves of DiffC beside today's codecs, on a folder of pictures of yours.

    python examples/rd_curve.py FOLDER

Writes `rd_curve/report.html` with all plots, and prints the means. `diffusers-compress eval` does the same from a shell.
"""

import argparse
from pathlib import Path

from diffusers_compress import embedded_model
from diffusers_compress.evaluation.codec import parse_codec
from diffusers_compress.evaluation.report import markdown, quality_table, summarise, write_report
from diffusers_compress.evaluation.rows import write_rows
from diffusers_compress.evaluation.run import evaluate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="Stable-Diffusion folder or Hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("rd_curve"))
    args = parser.parse_args()

    codecs = [parse_codec("diffc", args.model)] + [parse_codec(name) for name in ("jpeg", "webp", "avif", "jpeg2000")]
    progress = lambda done, total: print(f"\r{done} of {total}", end="", flush=True)  # noqa: E731
    rows = evaluate(args.folder, args.out, codecs, [0.02, 0.05, 0.1, 0.2], device=args.device, progress=progress)
    write_rows(args.out, rows)
    page = write_report(args.folder, args.out, rows, f"python examples/rd_curve.py {args.folder}", anchor="jpeg2000")
    print(f"\n{markdown(*quality_table(summarise(rows)))}\n\n{page}")


if __name__ == "__main__":
    main()
