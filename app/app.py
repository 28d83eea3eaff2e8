"""The page as a Hugging Face Space. On your own machine: `diffusers-compress app`."""

import torch

from diffusers_compress.app import Engine, build, serve

device = "cuda" if torch.cuda.is_available() else "cpu"
page = build(Engine(device=device))

if __name__ == "__main__":
    serve(page)
