"""The published weights of CDC (Yang & Mandt 2023), or your own of that code, as a folder that `CDCPipeline` loads.

    python examples/convert_cdc.py CHECKPOINT.pt OUT
    python examples/convert_cdc.py CHECKPOINT.pt OUT --weights raw

The prediction type follows from the tensors' shapes: models that predict x_0 have 64 channels of finest context, those that predict
the noise 3. LPIPS's own weights, which are in the file of a model that was trained with it, are left out. What tables of the range
coder follow from is put on a grid (`CDCContextModel.settle`), and the prior of the side information becomes the nearest logistic
distribution of each channel.
"""

import argparse
import re
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress import CDCContextModel, CDCPipeline, CDCScheduler, CDCUNet
from diffusers_compress.coding import logistic
from diffusers_compress.models.hyperprior import LARGEST_INDEX, ONE

BLOCK = {
    "block1.block.0": "conv1",
    "block1.block.1": "norm1",
    "block2.block.0": "conv2",
    "block2.block.1": "norm2",
    "res_conv": "shortcut",
    "mlp.1": "embed.1",
}
ATTENTION = {"fn.fn.to_qkv": "to_qkv", "fn.fn.to_out": "to_out", "fn.norm": "norm"}
LEAVES = {"g": "weight", "b": "bias"}  # of the norms
SCHEDULERS = {
    "sample": CDCScheduler(),
    "epsilon": CDCScheduler(20000, "linear", "epsilon", clip_sample=False),
}
REACH = 400  # of side information, for the fit of its distribution


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--weights", choices=["averaged", "raw"], help="default: averaged, if the file has them")
    return parser.parse_args()


def read_checkpoint(path: Path, weights: str | None = None) -> dict[str, Tensor]:
    """The tensors of both networks by their published names. ValueError for another file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if weights != "raw" and "ema" in state:
            tensors = {name.removeprefix("ema_model."): t for name, t in state["ema"].items() if name.startswith("ema_model.")}
        elif weights != "averaged":
            tensors = state["model"]
        else:
            raise KeyError("ema")
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"this one names {found[1]}" if found else "this is no such file"
        raise ValueError(f"{path}: a checkpoint of CDC holds tensors and numbers alone, {what}; nothing of it was run") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not laid out as a checkpoint of CDC ({type(error).__name__}: {error})") from error
    return {name: t for name, t in tensors.items() if name.startswith(("context_fn.", "denoise_fn."))}


def context_name(name: str) -> str | None:
    """Of a tensor of the context model; None for the prior's, which are not taken over as they are. ValueError if there is none."""
    if name.startswith("prior."):
        return None
    place, _, leaf = name.rpartition(".")
    leaf = LEAVES.get(leaf, leaf)
    if found := re.fullmatch(r"(enc|dec)\.(\d+)\.(?:0\.(.+)|[12]\.conv)", place):
        side, number, layer = found.groups()
        layer = f"block.{BLOCK[layer]}" if layer else "scale"
        return f"{side}oder.{number}.{layer}.{leaf}"
    if found := re.fullmatch(r"hyper_(enc|dec)\.(\d+)\.0", place):
        return f"hyper_{found[1]}oder.{found[2]}.{leaf}"
    raise ValueError(f"context_fn.{name} is no tensor of CDC's context model")


def unet_name(name: str) -> str:
    """Of a tensor of the denoiser. ValueError if there is none."""
    place, _, leaf = name.rpartition(".")
    leaf = LEAVES.get(leaf, leaf)
    if found := re.fullmatch(r"(downs|ups)\.(\d+)\.([0123])\.(.+)", place):
        side, number, part, layer = found.groups()
        layer = {"2": f"attention.{ATTENTION.get(layer)}", "3": "scale"}.get(part, f"blocks.{part}.{BLOCK.get(layer)}")
        return f"{side}.{number}.{layer}.{leaf}"
    if found := re.fullmatch(r"mid_block([12])\.(.+)", place):
        return f"middle.{int(found[1]) - 1}.{BLOCK.get(found[2])}.{leaf}"
    if found := re.fullmatch(r"mid_attn\.(.+)", place):
        return f"middle_attention.{ATTENTION.get(found[1])}.{leaf}"
    places = {"time_mlp.0": "time_mlp.0", "time_mlp.2": "time_mlp.2", "final_conv.0": "norm_out", "final_conv.1": "conv_out"}
    if place in places:
        return f"{places[place]}.{leaf}"
    raise ValueError(f"denoise_fn.{name} is no tensor of CDC's denoiser")


def as_ours(name: str, tensor: Tensor) -> Tensor:
    """Norms have their numbers as [1, C, 1, 1] there."""
    return tensor.flatten() if "norm" in name else tensor


# ------------------------------------------------------------------------------------------------------------------- prior


def cumulative(prior: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of the side information's channels at x [Z, n], by the published prior: Balle et al. 2018, appendix 6.1."""
    h, layers = x[..., None], sum(name.endswith("weight") for name in prior)
    for i in range(layers):
        weight, bias = (prior[f"affine.{i}.{leaf}"].double().flatten(1, 2)[:, 0] for leaf in ("weight", "bias"))
        h = h @ F.softplus(weight) + bias
        if i < layers - 1:
            h = h + torch.tanh(prior[f"a.{i}"].double().flatten(1, 3)) * torch.tanh(h)
    return torch.sigmoid(h[..., 0])


def nearest_logistic(prior: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(means, tables of `logistic`) [Z]: of the tables around the published median the one that takes fewest bits."""
    median = prior["_medians"].double().flatten()
    k = torch.arange(-REACH, REACH + 1)
    edges = cumulative(prior, median[:, None] + torch.arange(-REACH, REACH + 2) - 0.5)
    probability = edges.diff(dim=1).numpy()
    lengths = logistic.code_length(k.numpy()[:, None], np.zeros(1, dtype=np.int64), np.arange(LARGEST_INDEX + 1))
    return median, torch.from_numpy((probability @ lengths).argmin(1))


# ------------------------------------------------------------------------------------------------------------------- model


def widths(tensors: dict[str, Tensor], pattern: str) -> list[int]:
    """First dimensions of the tensors with these names, the pattern's {} being 0, 1, ..."""
    found = []
    while pattern.format(len(found)) in tensors:
        found.append(len(tensors[pattern.format(len(found))]))
    return found


def convert(tensors: dict[str, Tensor]) -> CDCPipeline:
    """The pipeline of a checkpoint's tensors. ValueError for a tensor that it has no place for."""
    context = {n.removeprefix("context_fn."): t for n, t in tensors.items() if n.startswith("context_fn.")}
    denoise = {n.removeprefix("denoise_fn."): t for n, t in tensors.items() if n.startswith("denoise_fn.")}
    if not context or not denoise:
        raise ValueError("there are no tensors of CDC's two networks")
    prior = {name.removeprefix("prior."): tensor for name, tensor in context.items() if name.startswith("prior.")}
    ours = {new: as_ours(new, tensor) for name, tensor in context.items() if (new := context_name(name))}
    unet_ours = {unet_name(name): as_ours(unet_name(name), tensor) for name, tensor in denoise.items()}
    mean, index = nearest_logistic(prior)
    ours |= {"z_mean": mean.float(), "z_index": index.float() / ONE}

    context_widths = widths(ours, "encoder.{}.scale.weight")
    finest = ours[f"decoder.{len(context_widths) - 1}.scale.weight"].shape[1]
    context_model = CDCContextModel(
        widths=context_widths,
        hyper_widths=widths(ours, "hyper_encoder.{}.weight"),
        context_channels=finest,
        kernel=ours["encoder.0.block.conv1.weight"].shape[-1],
    )
    unet = CDCUNet(
        widths=widths(unet_ours, "downs.{}.blocks.0.conv1.weight"),
        context_widths=[finest, *context_widths[:-1]],
        kernel=unet_ours["conv_out.weight"].shape[-1],
    )
    context_model.load_state_dict(ours)
    unet.load_state_dict(unet_ours)
    context_model.settle()
    return CDCPipeline(context_model, unet, SCHEDULERS["epsilon" if finest == 3 else "sample"])


def main():
    args = parse_args()
    convert(read_checkpoint(args.checkpoint, args.weights)).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
