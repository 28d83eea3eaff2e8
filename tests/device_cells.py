"""A process of its own with the device of simulated_device.py. Run by test_simulated_device.py; prints a line of JSON.

"equal": cell -> whether the device gave the same files and the same pictures as the CPU; its arithmetic is the same.
"counts": part of DiffC -> [launches, copies] without the network's: of a coded step at 256x256 and 400 bits, of the same step for each
further picture of a batch, and of a fingerprint. With "kernels" the coder's search is that of a GPU, each of Triton's kernels a launch.
"""

import json
import sys
from dataclasses import replace

import accelerate
import numpy as np
import simulated_device
import tiny_models
import torch
from golden import make

from diffusers_compress import DiffCPipeline
from diffusers_compress.codecs import describe
from diffusers_compress.coding.channels import trellis

STEPS, BYTES = 2, 50  # a step has 400 bits
FEW = {"num_inference_steps": 2}
# Every codec, coder and way to decode: codec, model, options of compress, options of decompress
CELLS = {
    "diffc": ("diffc", "epsilon", {"max_bytes": 60, "num_coding_steps": 3, "prompt": "a house"}, FEW | {"guidance_scale": 2.0}),
    "diffc, preview": ("diffc", "v_prediction", {"fidelity": 0.3, "num_coding_steps": 2}, {"reconstruction": "denoised"}),
    "diffc, trellis": ("diffc", "epsilon", {"max_bytes": 35, "coder": "trellis"}, FEW),
    "diffc, poisson": ("diffc", "epsilon", {"max_bytes": 30, "coder": "poisson"}, FEW),
    "relic": ("relic", "epsilon", {"max_bytes": 100, "entropy_model": "adaptive"}, FEW | {"realism": 0.5}),
    "relic, hyperprior": ("relic", "v_prediction", {"max_bytes": 100}, FEW),
    "perco": ("perco", "epsilon", {"prompt": "a house"}, FEW | {"num_images_per_prompt": 2}),
    "text-sketch": ("text-sketch", "epsilon", {"prompt": "a house", "threshold": 0.1}, FEW | {"guidance_scale": 2.0}),
    "text-sketch, colours": ("text-sketch", "v_prediction", {}, FEW),
    "refine, jpeg": ("refine", "epsilon", {"fidelity": 0.1}, FEW | {"realism": 0.5}),
    "refine, webp": ("refine", "v_prediction", {"max_bytes": 250, "base": "webp"}, FEW),
    "uqdm": ("uqdm", "epsilon", {"num_coding_steps": 2}, {"reconstruction": "denoised"}),
    "uqdm, lossless": ("uqdm", "v_prediction", {"lossless": True}, {}),
}


def split(pipe):
    """The autoencoder on the device, the rest on the CPU, as device_map="balanced" has them on two."""
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            accelerate.dispatch_model(module, {"": simulated_device.DEVICE if name == "vae" else "cpu"}, force_hooks=True)


def same(pipe, pictures, encoding, decoding, place=lambda pipe: pipe.to(simulated_device.DEVICE)):
    """Whether files and pictures are those of the CPU."""

    def coded():
        files = pipe.compress(pictures, **encoding).bitstreams
        return files, np.stack(pipe.decompress(files, **decoding, output_type="np").images).tolist()

    pipe.set_progress_bar_config(disable=True)
    expected = coded()
    place(pipe)
    return coded() == expected


def equal():
    pictures = [make.picture(24, 16)] * 2
    cells = {name: same(make.pipeline(codec, model), pictures, *options) for name, (codec, model, *options) in CELLS.items()}
    for name in ("diffc", "relic, hyperprior"):
        codec, model, *options = CELLS[name]
        cells[f"{name}, on two devices"] = same(make.pipeline(codec, model), pictures, *options, split)
    for family in tiny_models.FAMILIES:
        pipe = DiffCPipeline.from_pipe(tiny_models.FAMILIES[family](), dtype=torch.float32)
        cells[family] = same(pipe, pictures, {"max_bytes": 100, "num_coding_steps": 3, "tune": "ms-ssim"}, FEW)
    return cells


def total():
    return np.array([simulated_device.launches.total(), simulated_device.copies.total()])


class Kernel:
    """In place of one of Triton's: a launch, after which the message is of zeros."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        simulated_device.launches["kernel"] += 1
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int16, torch.int32):
                tensor.held.zero_()


def search_with_kernels():
    from diffusers_compress.coding.channels import search, search_triton

    search_triton.viterbi_kernel = search_triton.m_algorithm_kernel = Kernel()
    search.on = lambda device: (search_triton.follow, search_triton.survivors)


def step_counts():
    pipe = make.pipeline("diffc", "embedded").to(simulated_device.DEVICE)
    predict, of_network = pipe.predict, np.zeros(2, int)

    def network(*arguments):
        nonlocal of_network
        before = total()
        output = predict(*arguments)
        of_network += total() - before
        return output

    pipe.predict = network

    def spent(function, *arguments, **options):
        trellis._shared.cache_clear()  # as for a size that is new
        before = total() - of_network
        return function(*arguments, **options), total() - of_network - before

    picture = make.picture(256, 256)
    pipe.decompress(
        pipe.compress(picture, max_bytes=20 + BYTES, num_coding_steps=1).bitstreams, num_inference_steps=1
    )  # what is made once
    costs, rng = {}, np.random.default_rng(0)
    for count in (1, 3):
        pictures = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(count)]
        for steps in (STEPS, 2 * STEPS):
            size = {"max_bytes": 20 + BYTES * steps, "num_coding_steps": steps}
            sent, costs["compress", count, steps] = spent(pipe.compress, pictures, **size)
            assert all(describe(file)["steps"] == steps for file in sent.bitstreams)
            costs["decompress", count, steps] = spent(pipe.decompress, sent.bitstreams, num_inference_steps=1)[1]
    found = {}
    for part in ("compress", "decompress"):
        one, three = ((costs[part, count, 2 * STEPS] - costs[part, count, STEPS]) / STEPS for count in (1, 3))
        found[part] = one.tolist()
        found[f"{part}, further picture"] = ((three - one) / 2).tolist()
    found["fingerprint"] = spent(pipe.fingerprint)[1].tolist()
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    trellis.TRELLIS32 = replace(trellis.TRELLIS32, survivors=2**8)  # enough here, and quick
    simulated_device.narrow = "narrow" in sys.argv
    if "kernels" in sys.argv:
        search_with_kernels()
    print(json.dumps(step_counts() if "counts" in sys.argv else equal()))
