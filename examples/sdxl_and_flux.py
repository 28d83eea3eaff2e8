"""The same codec on any family of models; what they need of memory is told by options of diffusers.

    python examples/sdxl_and_flux.py PHOTO
    python examples/sdxl_and_flux.py PHOTO --model stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 --offload
    python examples/sdxl_and_flux.py PHOTO --model black-forest-labs/FLUX.1-schnell --dtype bfloat16 --offload

Writes decoded.png. The two large models need a GPU; neither was tried here.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the component that is running")
    parser.add_argument("--bpp", type=float, default=0.05)
    parser.add_argument("--prompt", default="", help="what the picture shows; stored in the file")
    parser.add_argument("--out", type=Path, default=Path("decoded.png"))
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    if pipe.vae is not None:
        pipe.vae.enable_tiling()
    if args.offload:
        pipe.enable_model_cpu_offload()
    elif torch.cuda.is_available():
        pipe.to("cuda")
    noise = pipe.noise_schedule()
    print(f"{type(pipe.family).__name__}: {noise.prediction_type}, latents of {pipe.family.channels} channels")
    both = pipe(Image.open(args.photo), target_bpp=args.bpp, prompt=args.prompt)
    print(f"{len(both.bitstreams[0])} bytes, {both.bpp[0]:.4f} bpp")
    both.images[0].save(args.out)


if __name__ == "__main__":
    main()
