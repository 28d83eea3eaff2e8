"""One file, several pictures: the receiver chooses between the least error and the most natural look.

    python examples/realism.py PHOTO

Writes realism.png: Relic, then DiffC, at realism 0, 0.5 and 1; prints the PSNR of each.
"""

import argparse
from pathlib import Path

from PIL import Image

from diffusers_compress import DiffCPipeline, RelicPipeline, embedded_model, images
from diffusers_compress.metrics import distortion


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("realism.png"))
    args = parser.parse_args()

    photo = Image.open(args.photo).convert("RGB")
    relic, diffc = (pipeline.from_pretrained(args.model) for pipeline in (RelicPipeline, DiffCPipeline))
    files = [pipe.compress(photo, target_bpp=args.bpp).bitstreams[0] for pipe in (relic, diffc)]
    decoded = {
        f"{name}, realism {value:g}": pipe.decompress(data, realism=value).images[0]
        for name, pipe, data in zip(("relic", "diffc"), (relic, diffc), files)
        for value in (0, 0.5, 1)
    }

    strip = photo
    for name, image in decoded.items():
        x, x_hat = (images.to_tensor(each)[0] / 2 for each in (photo, image))  # samples in a range of 1
        print(f"{name:20} {distortion.psnr(x, x_hat):.2f} dB")
        strip = images.side_by_side(strip, image)
    strip.save(args.out)


if __name__ == "__main__":
    main()
