"""Measure a model on pictures of yours, so that its files get smaller, and share the codec on the Hub with a card.

    python examples/calibrate_and_push.py FOLDER me/my-codec          # or --folder OUT instead of the Hub

The card has the licence of the model and a table of rates and PSNR, measured on the last pictures, which calibration does not see.
"""

import argparse
from pathlib import Path

from diffusers_compress import DiffCPipeline, embedded_model, hub, images
from diffusers_compress.calibration import calibrate_error, calibrate_latent
from diffusers_compress.files import find_files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("repository")
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--license", help="default: that of the model's card")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--held-out", type=int, default=4, help="pictures for the table")
    parser.add_argument("--folder", type=Path, help="write the repository here instead of pushing it")
    args = parser.parse_args()

    try:
        pictures = [images.open_image(path) for path in find_files(args.pictures).files.values()]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    count = len(pictures) - args.held_out
    if count < 1:
        parser.error(f"{args.pictures} has {len(pictures)} pictures, and {args.held_out} are for the table; lower --held-out")
    if not args.folder:
        hub.check_account()
    seen, held_out = pictures[:count], pictures[count:]
    pipe = DiffCPipeline.from_pretrained(args.model, variance_head=None)  # one was trained for another calibration
    pipe.register_to_config(calibration={"error": calibrate_error(pipe, seen), "latent": calibrate_latent(pipe, seen)})
    if args.folder:
        hub.write_repository(pipe, args.folder, args.repository, args.license, held_out, args.rates)
        print(args.folder)
    else:
        print(pipe.push_to_hub(args.repository, args.license, held_out, args.rates))


if __name__ == "__main__":
    main()
