"""The converter, on state dictionaries with the names and shapes that the published code saves (hyper_encoder.py of PerCo (SD))."""

import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffusers_compress import PerCoPipeline


def shapes_of(latent_channels, n, m, size, codebook_size, dim):
    """Published names -> shapes, for a grid of size x size over 64 x 64 latents: written down from the published layers."""
    found = {}

    def conv(name, n_in, n_out, kernel):
        found[f"{name}.weight"], found[f"{name}.bias"] = (n_out, n_in, kernel, kernel), (n_out,)

    def bottleneck(name, channels):
        for place, n_in, n_out, kernel in (
            (0, channels, channels // 2, 1),
            (2, *2 * [channels // 2], 3),
            (4, channels // 2, channels, 1),
        ):
            conv(f"{name}.{place}", n_in, n_out, kernel)

    def attention(name, channels):
        for branch in "ab":
            for unit in range(3):
                bottleneck(f"{name}.conv_{branch}.{unit}.conv", channels)
        conv(f"{name}.conv_b.3", channels, channels, 1)

    conv("backbone.0", latent_channels, n, 1 if size >= 16 else 5)
    conv("backbone.4", n, n, 1 if size >= 32 else 5)
    conv("backbone.9", n, n, 1 if size == 64 else 5)
    conv("backbone.13", n, m, 1)
    for place in (1, 2, 3, 5, 6, 7, 10, 11, 12):
        bottleneck(f"backbone.{place}.layers", n)
    attention("backbone.8", n)
    attention("backbone.14", m)
    found |= {"quantizer.project_in.weight": (dim, m), "quantizer.project_in.bias": (dim,)}
    found |= {"quantizer.project_out.weight": (m, dim), "quantizer.project_out.bias": (m,)}
    codebook = {
        "initted": (1,),
        "cluster_size": (1, codebook_size),
        "embed_avg": (1, codebook_size, dim),
        "embed": (1, codebook_size, dim),
    }
    return found | {f"quantizer._codebook.{name}": shape for name, shape in codebook.items()}


def weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("size, codebook_size, count", [(64, 256, 4_080_128), (8, 256, 5_868_032), (32, 8196, None)])
def test_published_shapes_make_a_hyper_encoder(script, size, codebook_size, count):
    """With the numbers of parameters that its authors give for the backbone."""
    shapes = shapes_of(4, 192, 320, size, codebook_size, 32)
    state = weights(shapes)
    hyper_encoder = script.convert_hyper_encoder(state)
    assert hyper_encoder.config.stride == 64 // size and hyper_encoder.probability_model().size == codebook_size
    backbone = sum(parameter.numel() for name, parameter in hyper_encoder.named_parameters() if name.startswith("backbone"))
    assert count is None or backbone == count
    assert backbone == sum(tensor.numel() for name, tensor in state.items() if name.startswith("backbone"))

    # The published quantizer: nearest code by Euclidean distance in few dimensions
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    points = (
        hyper_encoder.backbone(x).movedim(1, -1) @ state["quantizer.project_in.weight"].T + state["quantizer.project_in.bias"]
    )
    indices = hyper_encoder.encode(x)
    assert indices.shape == (1, size // 4, size // 4)
    distances = torch.cdist(points.flatten(0, 2).double(), state["quantizer._codebook.embed"][0].double())
    chosen = distances.gather(1, indices.flatten()[:, None])[:, 0]
    assert (chosen <= distances.min(1).values + 1e-3).all()  # floats decide between codes that are as near


def test_a_published_checkpoint_becomes_a_pipeline(script, tiny_sd_folder, photo, tmp_path, monkeypatch):
    unet = PerCoPipeline.from_pretrained(tiny_sd_folder, hyper_encoder=None).unet.state_dict()
    extended = 0.1 * torch.randn(8, 4 + 8, 3, 3)
    extended[:, :4] = unet["conv_in.weight"]
    (tmp_path / "published" / "hyper_enc").mkdir(parents=True)
    (tmp_path / "published" / "unet").mkdir()
    save_file(
        weights(shapes_of(4, 16, 8, 16, 64, 4)), tmp_path / "published" / "hyper_enc" / "diffusion_pytorch_model.safetensors"
    )
    state = unet | {"conv_in_extended.weight": extended, "conv_in_extended.bias": unet["conv_in.bias"]}
    torch.save(state, tmp_path / "published" / "unet" / "diffusion_pytorch_model.bin")

    command = ["convert_perco.py", "--checkpoint", str(tmp_path / "published"), "--base", tiny_sd_folder]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "model")])
    script.main()
    pipe = PerCoPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(pipe.unet.conv_in.weight, extended) and pipe.scheduler.config.prediction_type == "v_prediction"
    assert all(
        torch.equal(pipe.unet.state_dict()[name], tensor) for name, tensor in unet.items() if not name.startswith("conv_in")
    )
    data = pipe.compress(photo).bitstreams[0]
    assert pipe.decompress(data, num_inference_steps=1).images[0].size == photo.size


def test_a_folder_without_weights_is_named(script, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .safetensors"):
        script.read_weights(tmp_path)
