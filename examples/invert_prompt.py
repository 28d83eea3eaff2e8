"""Find the prompt of a picture by inversion, and code the picture as Text+Sketch with it.

    python examples/invert_prompt.py photo.jpg photo.dfc --model stable-diffusion-v1-5/stable-diffusion-v1-5 --clip ViT-L-14/openai

Needs weights: a Stable-Diffusion model and the CLIP model of open_clip that is its text encoder, which are fetched or come from the cache,
and a GPU if it is not to take minutes. The tokenizers must number their tokens alike, as those of Stable Diffusion 1.x, 2.x and CLIP do.
"""

import argparse
from pathlib import Path

import torch
from diffusers import ControlNetModel
from PIL import Image

from diffusers_compress import TextSketchPipeline, inversion


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", required=True, help="Stable-Diffusion folder or Hub id")
    parser.add_argument("--controlnet", help="folder or Hub id, for lines or soft edges; default: no sketch")
    parser.add_argument("--clip", required=True, metavar="MODEL/WEIGHTS", help="of open_clip")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    controlnet = {"controlnet": ControlNetModel.from_pretrained(args.controlnet)} if args.controlnet else {}
    pipe = TextSketchPipeline.from_pretrained(args.model, **controlnet).to(args.device)
    invert = inversion.load_inverter(args.clip, args.device, args.tokens, args.steps)
    likeness = inversion.load_similarity(args.clip, args.device)
    picture = Image.open(args.picture).convert("RGB")
    ids = invert([picture])[0]
    print("prompt:", pipe.tokenizer.decode(ids))
    data = pipe.compress(picture, prompt=[ids], candidates=args.candidates, similarity=likeness).bitstreams[0]
    args.target.write_bytes(data)
    print(f"{args.target}: {len(data)} bytes, {8 * len(data) / (picture.width * picture.height):.5f} bpp")


if __name__ == "__main__":
    main()
