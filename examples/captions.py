"""PerCo: a caption and a sketch of a few bytes; with a model that knows text, what the caption says shows in the picture.

    python examples/captions.py PHOTO "a harbour at dusk" "a harbour in winter"

It needs a model whose text encoder was trained: with the embedded model a caption is stored and changes nothing.
Writes captions.png: the photo, and for each caption what its file decodes to, from the same noise. `diffusers-compress encode
--codec perco --captioner MODEL` lets a model write the caption.
"""

import argparse
from pathlib import Path

from PIL import Image

from diffusers_compress import PerCoPipeline, embedded_model
from diffusers_compress.images import side_by_side


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--model", default=embedded_model("perco"), help="folder or Hub id of a model trained for PerCo")
    parser.add_argument("--out", type=Path, default=Path("captions.png"))
    args = parser.parse_args()

    pipe = PerCoPipeline.from_pretrained(args.model)
    strip = photo = Image.open(args.photo).convert("RGB")
    for caption in args.captions:
        data = pipe.compress(photo, prompt=caption).bitstreams[0]
        print(f"{len(data)} bytes: {caption}")
        strip = side_by_side(strip, pipe.decompress(data).images[0])
    strip.save(args.out)


if __name__ == "__main__":
    main()
