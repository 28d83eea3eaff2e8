"""A LoRA in the loop: a model that was taught a style or a subject codes with what it learnt, and its files are its own.

    python examples/lora.py PHOTO --model stable-diffusion-v1-5/stable-diffusion-v1-5 --lora FOLDER_OR_FILE

Encodes the photo without and with the LoRA, and decodes it. A file decodes with the LoRA that made it, in its scale, and with no other:
the fingerprint follows the weights that are active. Needs peft.
"""

import argparse
from pathlib import Path

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.errors import WrongModel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument(
        "--lora", required=True, help="file or folder of Stable Diffusion's LoRA weights, or Hub id, as in diffusers"
    )
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--scale", type=float, default=1.0, help="of the LoRA")
    parser.add_argument("--bpp", type=float, default=0.1)
    args = parser.parse_args()

    photo = Image.open(args.photo).convert("RGB")
    pipe = DiffCPipeline.from_pretrained(args.model)
    plain = pipe.compress(photo, target_bpp=args.bpp).bitstreams[0]
    print(f"model {pipe.fingerprint().hex()}: {len(plain)} bytes")

    weights, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(args.lora, use_safetensors=True)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(weights, alphas, pipe.unet, adapter_name="lora")
    pipe.unet.set_adapters("lora", args.scale)
    data = pipe.compress(photo, target_bpp=args.bpp).bitstreams[0]
    print(f"model {pipe.fingerprint().hex()}, with the LoRA: {len(data)} bytes")
    pipe.decompress(data).images[0].save("decoded.png")
    try:
        pipe.decompress(plain)
    except WrongModel as error:
        print(f"WrongModel: {error}")


if __name__ == "__main__":
    main()
