"""A picture that gets sharper while its file arrives: every beginning of a DiffC file decodes.

    python examples/progressive_preview.py PHOTO

Writes progressive.png: the picture after an eighth, a quarter, half and all of the bytes, from left to right.
"""

import argparse
from pathlib import Path

from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.format import container
from diffusers_compress.images import side_by_side


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=Path("progressive.png"))
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    data = pipe.compress(Image.open(args.photo), target_bpp=args.bpp, num_coding_steps=24).bitstreams[0]
    _, start = container.read_header(data)  # before that there is no picture
    strip = None
    for share in (1 / 8, 1 / 4, 1 / 2, 1):
        arrived = data[: max(start, round(share * len(data)))]
        reconstruction = "flow" if share == 1 else "denoised"  # a preview takes one network call
        image = pipe.decompress(arrived, reconstruction=reconstruction).images[0]
        print(f"{len(arrived)} of {len(data)} bytes")
        strip = image if strip is None else side_by_side(strip, image)
    strip.save(args.out)


if __name__ == "__main__":
    main()
