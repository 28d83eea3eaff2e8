"""What a Stable Diffusion 1.5 in float16 keeps in memory at most while it codes a picture, counted without a GPU.

    python benchmarks/sd15_memory.py --size 512 512
    python benchmarks/sd15_memory.py --size 2048 2048 --tiling

Every tensor counts from the operation that makes it until it is freed. VAE, text encoder and network are run on shapes alone (PyTorch's
fake tensors), with the pipeline's own calls and attention that never holds its matrix, as on a GPU; the channel codes real numbers. What
no count can know is left out: the CUDA context, working memory within a kernel, and what the allocator's rounding loses. Where a GPU is
at hand, `sd15_shape.py` measures all of it.
"""

import argparse
import math
import weakref

import torch
from sd15_shape import random_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_compress.coding.channels import CHANNELS, channel_of


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that storages made under this mode had together."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.known.update(dict.fromkeys(storages((arguments, options))))  # weights
        result = function(*arguments, **(options or {}))
        for storage in storages(result):
            if storage not in self.known:
                self.known[storage] = None
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, size):
        self.live -= size


def storages(values):
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def peak_of(function):
    with LiveBytes() as count:
        function()
    return count.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--bpp", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=12, help="coded steps")
    parser.add_argument("--tiling", action="store_true", help="vae.enable_tiling()")
    args = parser.parse_args()
    width, height = args.size
    h, w = height // 8, width // 8

    peaks = {}
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.float16)
        pipe = random_model(1, "cpu")
        torch.set_default_dtype(torch.float32)
        if args.tiling:
            pipe.vae.enable_tiling()
        modules = (pipe.vae, pipe.unet, pipe.text_encoder)
        weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        embeds = pipe.encode_prompt([""])
        peaks["text encoder"] = peak_of(lambda: pipe.encode_prompt([""]))
        peaks["VAE, encoding"] = peak_of(lambda: pipe.encode_picture(torch.zeros(1, 3, height, width)))
        peaks["network"] = peak_of(lambda: pipe.predict(torch.zeros(1, 4, h, w), [500], embeds))
        peaks["VAE, decoding"] = peak_of(lambda: pipe.family.decode_latent(torch.zeros(1, 4, h, w)))
    budget = math.ceil(args.bpp * width * height / args.steps)
    for name in ("trellis", "trellis32"):
        channel, n = channel_of(CHANNELS[name].number), 4 * h * w
        shift, rank = torch.randn(1, n), torch.zeros(1, n, dtype=torch.int64)
        shift *= math.sqrt(2 * math.log(2) * budget) / shift.norm()
        peaks[f"channel {name}"] = peak_of(lambda: channel.encode(shift, shift.square(), rank, budget, 1))
    print(f"{width}x{height}, float16, weights {weights / 2**30:.2f} GiB; with the weights at most:")
    for part, peak in peaks.items():
        print(f"{part:18} {(weights + peak) / 2**30:5.2f} GiB")


if __name__ == "__main__":
    main()
