"""The converter of CDC, on state dictionaries with the published names and shapes, against the published forward passes."""

import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F

from diffusers_compress import CDCPipeline

SMALL = {"dim": 4, "unet": (1, 2, 3), "context": (1, 2), "hyper": (2, 2, 3)}
PUBLISHED = {"dim": 64, "unet": (1, 2, 3, 4, 5, 6), "context": (1, 2, 3, 4), "hyper": (4, 4, 4)}


def shapes(dim, unet, context, hyper, finest, between=1):
    """Names -> shapes of both networks; `between`: where the encoder's scalings stand, 2 in models that leave room for a rate."""
    found = {}

    def layer(name, *shape, bias=None):
        found[f"{name}.weight"] = shape
        if bias != 0:
            found[f"{name}.bias"] = (bias or shape[0],)

    def norm(name, n):
        found[f"{name}.g"] = found[f"{name}.b"] = (1, n, 1, 1)

    def block(name, n_in, n_out, told=0, kernel=3):
        if told:
            layer(f"{name}.mlp.1", n_out, told)
        for i, (n, k) in enumerate(((n_in, kernel), (n_out, 3)), 1):
            layer(f"{name}.block{i}.block.0", n_out, n, k, k)
            norm(f"{name}.block{i}.block.1", n_out)
        if n_in != n_out:
            layer(f"{name}.res_conv", n_out, n_in, 1, 1)

    def attention(name, n):
        layer(f"{name}.fn.fn.to_qkv", 3 * n, n, 1, 1, bias=0)
        layer(f"{name}.fn.fn.to_out", n, n, 1, 1)
        norm(f"{name}.fn.norm", n)

    c, z = [dim * m for m in context], [dim * m for m in hyper]
    for i, (n_in, n_out) in enumerate(zip([3, *c], c)):
        block(f"context_fn.enc.{i}.0", n_in, n_out, kernel=3 if i else 7)
        layer(f"context_fn.enc.{i}.{between}.conv", n_out, n_out, 3, 3)
    for i, (n_in, n_out) in enumerate(zip(c[::-1], [*c[-2::-1], finest])):
        last = i == len(c) - 1
        block(f"context_fn.dec.{i}.0", n_in, n_in if last else n_out)
        layer(f"context_fn.dec.{i}.{between}.conv", n_in if last else n_out, n_out, 4, 4, bias=n_out)
    for i, (n_in, n_out) in enumerate(zip([c[-1], *z], z)):
        layer(f"context_fn.hyper_enc.{i}.0", n_out, n_in, *((5, 5) if i else (3, 3)))
    for i, (n_in, n_out) in enumerate(zip(z[::-1], [*z[-2::-1], 2 * c[-1]])):
        up = i < len(z) - 1
        layer(f"context_fn.hyper_dec.{i}.0", *((n_in, n_out, 5, 5) if up else (n_out, n_in, 3, 3)), bias=n_out)
    for i, (n_in, n_out) in enumerate(zip((1, 3, 3, 3), (3, 3, 3, 1))):
        found[f"context_fn.prior.affine.{i}.weight"] = (z[-1], 1, 1, n_in, n_out)
        found[f"context_fn.prior.affine.{i}.bias"] = (z[-1], 1, 1, 1, n_out)
        if i < 3:
            found[f"context_fn.prior.a.{i}"] = (z[-1], 1, 1, 1, n_out)
    found["context_fn.prior._medians"] = (1, z[-1], 1, 1)

    u, seen = [dim * m for m in unet], [finest, *c[:-1]]
    layer("denoise_fn.time_mlp.0", 4 * dim, 1)
    layer("denoise_fn.time_mlp.2", dim, 4 * dim)
    for i, (n_in, n_out) in enumerate(zip([3, *u], u)):
        block(f"denoise_fn.downs.{i}.0", n_in + (seen[i] if i < len(seen) else 0), n_out, dim, 3 if i else 7)
        block(f"denoise_fn.downs.{i}.1", n_out, n_out, dim)
        attention(f"denoise_fn.downs.{i}.2", n_out)
        if i < len(u) - 1:
            layer(f"denoise_fn.downs.{i}.3.conv", n_out, n_out, 3, 3)
    for i in (1, 2):
        block(f"denoise_fn.mid_block{i}", u[-1], u[-1], dim)
    attention("denoise_fn.mid_attn", u[-1])
    for i, (n_in, n_out) in enumerate(zip(u[:0:-1], u[-2::-1])):
        block(f"denoise_fn.ups.{i}.0", 2 * n_in, n_out, dim)
        block(f"denoise_fn.ups.{i}.1", n_out, n_out, dim)
        attention(f"denoise_fn.ups.{i}.2", n_out)
        layer(f"denoise_fn.ups.{i}.3.conv", n_out, n_out, 4, 4)
    norm("denoise_fn.final_conv.0", dim)
    layer("denoise_fn.final_conv.1", 3, dim, 7, 7)
    return found


def state(finest=5, between=1):
    generator, found = torch.Generator().manual_seed(0), {}
    for name, shape in shapes(**SMALL, finest=finest, between=between).items():
        numbers = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "prior" not in name else 4
        found[name] = numbers / fan_in**0.5 + name.endswith(".g")
        if ".prior.affine" in name and name.endswith("weight"):
            found[name] = numbers / 10 + math.log(math.expm1(1 / 2 / shape[-1]))  # a spread of some steps
    return found


# ------------------------------------------------------------------------------------------------- the published networks


class Network:
    """The published forward passes, read off a state dictionary."""

    def __init__(self, tensors, prefix):
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def conv(self, name, x, **options):
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors.get(f"{name}.bias"), **({"padding": weight.shape[-1] // 2} | options))

    def up(self, name, x, **options):
        return F.conv_transpose2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], stride=2, **options)

    def norm(self, name, x):
        variance = x.var(1, unbiased=False, keepdim=True)
        x = (x - x.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x * self.tensors[f"{name}.g"] + self.tensors[f"{name}.b"]

    def linear(self, name, x):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def block(self, name, x, t=None):
        h = self.norm(f"{name}.block1.block.1", self.conv(f"{name}.block1.block.0", x)).relu()
        if t is not None:
            h = h + self.linear(f"{name}.mlp.1", F.leaky_relu(t, 0.2))[:, :, None, None]
        h = self.norm(f"{name}.block2.block.1", self.conv(f"{name}.block2.block.0", h)).relu()
        return h + (self.conv(f"{name}.res_conv", x) if f"{name}.res_conv.weight" in self.tensors else x)

    def attention(self, name, x):
        q, k, v = self.conv(f"{name}.fn.fn.to_qkv", self.norm(f"{name}.fn.norm", x)).flatten(2).chunk(3, 1)
        context = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
        out = torch.einsum("bde,bdn->ben", context, q * x.shape[1] ** -0.5)
        return x + self.conv(f"{name}.fn.fn.to_out", out.reshape(x.shape))

    def encode(self, x):
        for i in range(2):
            x = self.conv(f"enc.{i}.1.conv", self.block(f"enc.{i}.0", x), stride=2, padding=1)
        h = F.leaky_relu(self.conv("hyper_enc.0.0", x), 0.2)
        h = F.leaky_relu(self.conv("hyper_enc.1.0", h, stride=2), 0.2)
        return x, self.conv("hyper_enc.2.0", h, stride=2)

    def hyper_decode(self, z_hat):
        h = z_hat
        for i in (0, 1):
            h = F.leaky_relu(self.up(f"hyper_dec.{i}.0", h, padding=2, output_padding=1), 0.2)
        mean, scale = self.conv("hyper_dec.2.0", h).chunk(2, 1)
        return mean, scale.clamp(min=0.1)

    def decode(self, y_hat):
        output = []
        for i in range(2):
            y_hat = self.up(f"dec.{i}.1.conv", self.block(f"dec.{i}.0", y_hat), padding=1)
            output.append(y_hat)
        return output[::-1]

    def cumulative(self, x):
        h = x[..., None]
        for i in range(4):
            h = (
                h @ F.softplus(self.tensors[f"prior.affine.{i}.weight"][:, 0, 0])
                + self.tensors[f"prior.affine.{i}.bias"][:, 0, 0]
            )
            if i < 3:
                h = h + torch.tanh(self.tensors[f"prior.a.{i}"][:, 0, 0]) * torch.tanh(h)
        return h[..., 0].sigmoid()

    def denoise(self, x, time, context):
        t = self.linear("time_mlp.2", F.gelu(self.linear("time_mlp.0", time[:, None])))
        h = []
        for i in range(3):
            x = torch.cat([x, context[i]], 1) if i < len(context) else x
            x = self.attention(f"downs.{i}.2", self.block(f"downs.{i}.1", self.block(f"downs.{i}.0", x, t), t))
            h.append(x)
            x = self.conv(f"downs.{i}.3.conv", x, stride=2) if i < 2 else x
        x = self.block("mid_block2", self.attention("mid_attn", self.block("mid_block1", x, t)), t)
        for i in range(2):
            x = self.block(f"ups.{i}.1", self.block(f"ups.{i}.0", torch.cat([x, h.pop()], 1), t), t)
            x = self.up(f"ups.{i}.3.conv", self.attention(f"ups.{i}.2", x), padding=1)
        return self.conv("final_conv.1", self.norm("final_conv.0", x))


@torch.no_grad()
def test_the_converted_networks_compute_the_published_functions(script):
    tensors = state()
    pipe, context, denoiser = script.convert(tensors), Network(tensors, "context_fn."), Network(tensors, "denoise_fn.")
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.num_train_timesteps) == ("sample", 8193)
    x = 2 * torch.rand(2, 3, 32, 48) - 1
    y, z = context.encode(x)
    for ours, theirs in zip(pipe.context_model.analyse(x), (y, z)):
        assert torch.allclose(ours, theirs, atol=1e-4)
    pyramid = context.decode(y)
    for ours, theirs in zip(pipe.context_model.synthesise(y), pyramid, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    x_t, time = torch.randn(2, 3, 32, 48), torch.tensor([0.2, 0.9])
    assert torch.allclose(pipe.unet(x_t, time, pyramid), denoiser.denoise(x_t, time, pyramid), atol=1e-3)


@torch.no_grad()
def test_tables_are_near_the_published_probabilities(script):
    """Means and deviations within what eight bits of a weight make of them, and the prior's median and spread."""
    tensors = state()
    model, context = script.convert(tensors).context_model, Network(tensors, "context_fn.")
    median = tensors["context_fn.prior._medians"].flatten()
    z_mean, z_index = model.z_tables()
    assert torch.allclose(torch.from_numpy(z_mean) / 512, median, atol=0.01)
    for c, index in enumerate(z_index):
        # The half of the probability that lies in the middle is as wide as that of a logistic distribution, 2 log(3) scales
        places = torch.linspace(-60, 60, 24001).expand(len(median), -1) + median[:, None]
        inside = (context.cumulative(places)[c] - 0.5).abs() < 0.25
        assert abs(math.log2(float(inside.sum()) * 0.005 / (2 * math.log(3))) - (index - 20) / 4) < 0.75
    k = torch.randint(-3, 4, (len(median), 2, 3))
    mean, std = context.hyper_decode((k + median[:, None, None])[None])
    ours, index = model.tables(512 * k.numpy() + z_mean[:, None, None], 0, 8, 12)
    assert (torch.from_numpy(ours) / 512 - mean[0]).abs().max() < 0.03 * mean.abs().max()
    log2_scale = (std[0] * math.sqrt(3) / math.pi).log2()
    clear = std[0] > 0.3
    assert ((torch.from_numpy(index) - 20) / 4 - log2_scale)[clear].abs().max() < 0.5 and clear.any()


def test_a_file_is_written_and_read_with_converted_weights(script, photo, tmp_path):
    torch.save({"step": 1, "model": {}, "ema": {f"ema_model.{name}": t for name, t in state().items()}}, tmp_path / "c.pt")
    script.convert(script.read_checkpoint(tmp_path / "c.pt")).save_pretrained(tmp_path / "model")
    pipe = CDCPipeline.from_pretrained(tmp_path / "model", dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    data = pipe.compress(photo).bitstreams[0]
    whole = CDCPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(whole.read_symbols(*read(data)), pipe.read_symbols(*read(data)))
    assert whole.decompress(data, num_inference_steps=2).images[0].size == photo.size


def read(data):
    from diffusers_compress.codecs.cdc.format import read_file

    return read_file(data)


@pytest.mark.parametrize(("finest", "between", "kind", "steps"), [(64, 1, "sample", 8193), (3, 2, "epsilon", 20000)])
def test_all_published_names_and_shapes_have_a_place(script, finest, between, kind, steps, monkeypatch):
    """At full size, with numbers that take no memory."""
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes(**PUBLISHED, finest=finest, between=between).items()}
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", same_shapes)
    monkeypatch.setattr(script.CDCContextModel, "settle", lambda model: None)
    for kind_of_network in ("CDCContextModel", "CDCUNet"):
        monkeypatch.setattr(script, kind_of_network, functools.partial(on_meta, getattr(script, kind_of_network)))
    pipe = script.convert(tensors)
    config = pipe.scheduler.config
    assert (config.prediction_type, config.num_train_timesteps, pipe.multiple) == (kind, steps, 32)
    defaults = {name: pipe.unet.config[name] for name in ("widths", "blocks", "kernel", "attention", "patch")}
    assert defaults == {"widths": [64, 128, 192, 256, 320, 384], "blocks": 2, "kernel": 7, "attention": True, "patch": 1}


def on_meta(network, **options):
    with torch.device("meta"):
        return network(**options)


def same_shapes(module, tensors, *arguments, **options):
    assert {name: t.shape for name, t in module.state_dict().items()} == {name: t.shape for name, t in tensors.items()}


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_files_are_refused_and_nothing_runs(script, tmp_path):
    file = tmp_path / "c.pt"
    torch.save({"model": {}, "extra": Harmful(tmp_path / "harm")}, file)
    with pytest.raises(ValueError, match="c.pt: .*mkdir.*nothing of it was run"):
        script.read_checkpoint(file)
    assert not (tmp_path / "harm").exists()
    for found in ([1, 2], {"state": {}}):
        torch.save(found, file)
        with pytest.raises(ValueError, match="not laid out as a checkpoint of CDC"):
            script.read_checkpoint(file)
    torch.save({"model": state()}, file)
    assert set(script.read_checkpoint(file)) == set(state())
    with pytest.raises(ValueError, match="ema"):
        script.read_checkpoint(file, "averaged")
    for name in ("context_fn.other.weight", "denoise_fn.other.weight"):
        with pytest.raises(ValueError, match=f"{name} is no tensor"):
            script.convert(state() | {name: torch.ones(1)})
    with pytest.raises(ValueError, match="no tensors of CDC"):
        script.convert({})
