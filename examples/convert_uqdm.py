"""The published weights of UQDM (Yang, Will & Mandt 2025), or your own of that code, as a folder that `UQDMPipeline` loads.

    python examples/convert_uqdm.py FOLDER OUT --weights averaged

FOLDER holds `config.json` and either `checkpoint.pt`, as that code saves it, or the network's tensors alone as
`score_net.safetensors` and, for the averaged ones, `score_net_ema.safetensors`. The averaged weights code pictures in a few
percent fewer bits; that code itself loads the raw ones.
"""

import argparse
import json
import re
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusers_compress import UQDMNetwork, UQDMPipeline, UQDMScheduler

# What the published file holds beside tensors: a number of numpy, under the name that numpy 1 gave it.
SCALAR = np._core.multiarray.scalar
ALLOWED = [np.dtype, np.dtypes.Float64DType, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
ONLY = {
    "prior_type": "logistic",
    "learned_prior_scale": True,
    "base_prior_scale": "forward_kernel",
    "attention_everywhere": False,
    "use_fourier_features": True,
    "n_attention_heads": 1,
    "n_channels": 3,
    "vocab_size": 256,
}
BLOCK = {
    "net1.0": "norm1",
    "net1.2": "conv1",
    "net2.0": "norm2",
    "net2.2": "conv2",
    "skip_conv": "conv_shortcut",
    "cond_proj": "time_emb_proj",
}
LAYERS = {
    "conv_in": "conv_in",
    "conv_out.0": "conv_norm_out",
    "conv_out.2": "conv_out",
    "embed_conditioning.0": "time_embedding.linear_1",
    "embed_conditioning.2": "time_embedding.linear_2",
    "mid_attn_block.layers.0": "mid_block.attentions.0.group_norm",
    "mid_attn_block.layers.3": "mid_block.attentions.0.to_out.0",
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--weights", choices=["raw", "averaged"], default="averaged")
    parser.add_argument("--gamma-min", type=float, help="log noise-to-signal ratio of z_0; default: as the folder says")
    parser.add_argument("--size", type=int, default=64, help="side in pixels of the pictures that it was trained on")
    return parser.parse_args()


def read_checkpoint(path: Path, averaged: bool) -> tuple[dict[str, Tensor], float | None]:
    """The network's tensors by name, and the learned width of the range of gamma if the file tells. ValueError for another
    file."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location="cpu", weights_only=True)
        tensors, width = dict(state["model"]), None
        if averaged:
            *shadow, width = state["ema"]["shadow_params"]  # in the order of the parameters, gamma's last
            tensors, width = dict(zip(tensors, shadow, strict=True)), abs(float(width))
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"this one names {found[1]}" if found else "this is no such file"
        raise ValueError(f"{path}: a checkpoint of UQDM holds tensors and numbers alone, {what}; nothing of it was run") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not laid out as a checkpoint of UQDM ({type(error).__name__}: {error})") from error
    return tensors, width


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of diffusers. ValueError for a tensor that has none."""
    found = {}
    for name, tensor in tensors.items():
        place, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)\.resnet_block|mid_resnet_block_([12]))\.(.+)", place)
        if place == "mid_attn_block.layers.1":
            for letter, part in zip("qkv", tensor.chunk(3)):
                found[f"mid_block.attentions.0.to_{letter}.{leaf}"] = part.flatten(1) if part.ndim > 1 else part
        elif block and block[4] in BLOCK:
            side, number, middle, layer = block.groups()
            where = f"mid_block.resnets.{int(middle) - 1}" if middle else f"{side}_blocks.0.resnets.{number}"
            found[f"{where}.{BLOCK[layer]}.{leaf}"] = tensor
            if layer == "cond_proj":  # which has no bias there
                found[f"{where}.{BLOCK[layer]}.bias"] = tensor.new_zeros(len(tensor))
        elif place in LAYERS:
            found[f"{LAYERS[place]}.{leaf}"] = tensor.flatten(1) if place.startswith("mid_attn") and tensor.ndim > 1 else tensor
        else:
            raise ValueError(f"{name} is no tensor of UQDM's network")
    return found


def convert(folder: Path, averaged: bool, gamma_min: float | None = None, size: int = 64) -> UQDMPipeline:
    """The pipeline of a folder. ValueError if it is not UQDM's."""
    config = json.loads((folder / "config.json").read_text())["model"]
    for name, only in ONLY.items():
        if config.get(name) != only:
            raise ValueError(f"{folder}: {name} is {config.get(name)!r}, only {only!r} is supported")
    width = None
    if (folder / "checkpoint.pt").exists():
        tensors, width = read_checkpoint(folder / "checkpoint.pt", averaged)
    else:
        tensors = load_file(folder / ("score_net_ema.safetensors" if averaged else "score_net.safetensors"))
    origin, high = config["gamma_min"], config["gamma_max"]
    if gamma_min is None:
        gamma_min = origin if width is None else high - width
    network = UQDMNetwork(
        sample_size=size,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(config["embedding_dim"],),
        layers_per_block=config["n_blocks"],
        norm_num_groups=config["norm_groups"],
        attention_head_dim=config["embedding_dim"],
    )
    network.load_state_dict(converted(tensors))
    return UQDMPipeline(network, UQDMScheduler(config["n_timesteps"], gamma_min, high, gamma_origin=origin))


def main():
    args = parse_args()
    convert(args.folder, args.weights == "averaged", args.gamma_min, args.size).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
