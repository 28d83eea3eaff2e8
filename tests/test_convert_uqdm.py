"""The converter of UQDM, on checkpoints laid out as the published ones, with the published names and shapes."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_compress import UQDMPipeline
from diffusers_compress.weights import portable

CONFIG = {
    "n_timesteps": 3,
    "prior_type": "logistic",
    "learned_prior_scale": True,
    "base_prior_scale": "forward_kernel",
    "gamma_min": -12.3,
    "gamma_max": 6.0,
    "attention_everywhere": False,
    "use_fourier_features": True,
    "n_attention_heads": 1,
    "n_channels": 3,
    "vocab_size": 256,
    "embedding_dim": 8,
    "n_blocks": 2,
    "norm_groups": 4,
}


def published(width=8, blocks=2):
    """Names -> tensors, in the order of the published state dictionary."""
    generator, shapes = torch.Generator().manual_seed(0), {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def block(name, n_in):
        layer(f"{name}.net1.0", n_in)
        layer(f"{name}.net1.2", width, n_in, 3, 3)
        layer(f"{name}.cond_proj", width, 4 * width, bias=False)
        layer(f"{name}.net2.0", width)
        layer(f"{name}.net2.2", width, width, 3, 3)
        if n_in != width:
            layer(f"{name}.skip_conv", width, n_in, 1, 1)

    layer("embed_conditioning.0", 4 * width, width)
    layer("embed_conditioning.2", 4 * width, 4 * width)
    layer("conv_in", width, 15, 3, 3)
    for i in range(blocks):
        block(f"down_blocks.{i}.resnet_block", width)
    block("mid_resnet_block_1", width)
    layer("mid_attn_block.layers.0", width)
    layer("mid_attn_block.layers.1", 3 * width, width, 1, 1)
    layer("mid_attn_block.layers.3", width, width, 1, 1)
    block("mid_resnet_block_2", width)
    for i in range(blocks + 1):
        block(f"up_blocks.{i}.resnet_block", 2 * width)
    layer("conv_out.0", width)
    layer("conv_out.2", 6, width, 3, 3)
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": CONFIG}))
    raw = published()
    shadow = [tensor / 2 for tensor in raw.values()] + [torch.tensor(17.5)]
    optimizer = {"lr": np.float64(0.0002)}  # a number of numpy, as in the published file
    torch.save({"model": raw, "ema": {"shadow_params": shadow}, "optimizer": optimizer, "step": 5}, tmp_path / "checkpoint.pt")
    return tmp_path


def expected(tensors, z, time):
    """The published network, written down from its layers: epsilon_hat and what the factor's softplus is of."""
    functional = torch.nn.functional

    def conv(name, x):
        weight = tensors[f"{name}.weight"]
        return functional.conv2d(x, weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        return functional.group_norm(x, 4, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(name, x):
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    silu = functional.silu
    rates = 10000 ** -(torch.arange(4) / 3)
    angles = 1000 * time[:, None] * rates
    told = silu(linear("embed_conditioning.2", silu(linear("embed_conditioning.0", torch.cat([angles.sin(), angles.cos()], 1)))))

    def block(name, x):
        h = conv(f"{name}.net1.2", silu(norm(f"{name}.net1.0", x))) + linear(f"{name}.cond_proj", told)[..., None, None]
        h = conv(f"{name}.net2.2", silu(norm(f"{name}.net2.0", h)))
        return h + (conv(f"{name}.skip_conv", x) if f"{name}.skip_conv.weight" in tensors else x)

    phases = torch.cat([2 * torch.pi * 2**power * z for power in (5, 6)], 1)
    h = conv("conv_in", torch.cat([z, phases.sin(), phases.cos()], 1))
    kept = [h]
    for i in range(2):
        h = block(f"down_blocks.{i}.resnet_block", h)
        kept.append(h)
    h = block("mid_resnet_block_1", h)
    q, k, v = conv("mid_attn_block.layers.1", norm("mid_attn_block.layers.0", h)).flatten(2).chunk(3, 1)
    attended = v @ (q.mT @ k / 8**0.5).softmax(-1).mT
    h = block("mid_resnet_block_2", h + conv("mid_attn_block.layers.3", attended.view_as(h)))
    for i in range(3):
        h = block(f"up_blocks.{i}.resnet_block", torch.cat([h, kept.pop()], 1))
    noise, factor = conv("conv_out.2", silu(norm("conv_out.0", h))).chunk(2, 1)
    return z + noise, factor


@pytest.mark.parametrize("averaged", [False, True])
def test_the_network_is_the_published_one(script, folder, averaged, tmp_path):
    script.convert(folder, averaged, size=16).save_pretrained(tmp_path / "out")
    pipe = UQDMPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.scheduler.config.num_steps, pipe.scheduler.config.gamma_origin) == (3, -12.3)
    assert pipe.scheduler.config.gamma_min == (6.0 - 17.5 if averaged else -12.3)
    z, time = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    tensors = {name: tensor.double() / (2 if averaged else 1) for name, tensor in published().items()}
    noise, factor = portable(pipe.network)(z, time, torch.ones(2))
    other_noise, other_factor = expected(tensors, z, time)
    assert torch.allclose(noise, other_noise, atol=1e-5, rtol=0)
    start = torch.tensor(1.0, dtype=torch.float64).expm1().log()
    assert torch.allclose(factor, torch.nn.functional.softplus(other_factor + start), atol=1e-5, rtol=0)


def test_a_folder_of_safetensors(script, folder, tmp_path):
    whole = script.convert(folder, False, size=16)
    (folder / "checkpoint.pt").unlink()
    save_file(published(), folder / "score_net.safetensors")
    assert script.convert(folder, False, size=16).fingerprint() == whole.fingerprint()
    save_file(published(), folder / "score_net_ema.safetensors")
    assert script.convert(folder, True, gamma_min=-11.5, size=16).scheduler.config.gamma_min == -11.5


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_pickles_are_refused_and_nothing_runs(script, folder, tmp_path):
    file = folder / "checkpoint.pt"
    torch.save({"model": {}, "extra": Harmful(tmp_path / "harm")}, file)
    with pytest.raises(ValueError, match="checkpoint.pt: .*mkdir.*nothing of it was run"):
        script.convert(folder, False)
    assert not (tmp_path / "harm").exists()
    file.write_bytes(b"no pickle at all")
    with pytest.raises(ValueError, match="checkpoint"):
        script.convert(folder, False)
    for state in ({"model": published()}, {"state": 1}, [1, 2]):
        torch.save(state, file)
        with pytest.raises(ValueError, match="not laid out as a checkpoint of UQDM"):
            script.convert(folder, True)


def test_other_models_are_refused_by_name(script, folder):
    (folder / "config.json").write_text(json.dumps({"model": CONFIG | {"prior_type": "normal"}}))
    with pytest.raises(ValueError, match="prior_type is 'normal'"):
        script.convert(folder, False)
    with pytest.raises(ValueError, match="attention.weight is no tensor"):
        script.converted({"attention.weight": torch.ones(1)})
