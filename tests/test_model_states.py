"""Whatever state a model is in, a file is decoded to the sender's picture or refused: ROBUSTNESS.md, "States of a model"."""

import itertools
from functools import cache
from importlib.util import find_spec

import accelerate
import numpy as np
import pytest
import tiny_models
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache, apply_group_offloading, apply_layerwise_casting
from golden import make

from diffusers_compress import DiffCPipeline, WrongModel, embedded_model
from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.format.container import read_header

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
NETWORKS = ("unet", "vae", "text_encoder")


def plain():
    theirs = tiny_models.sd_epsilon()
    return DiffCPipeline(**{name: theirs.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")})


def lora(network, name="a", alpha=4, seed=0, init=0.4):
    """Add a LoRA of rank 4 with weights of this seed, whatever it is called."""
    targets = ["to_q", "to_k", "to_v", "conv1"] if hasattr(network, "conv_in") else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets)
    peft.inject_adapter_in_model(config, network, name)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in network.named_parameters():
        if f".{name}." in path:
            parameter.data.copy_(init * torch.randn(parameter.shape, generator=generator))


def with_lora(**options):
    pipe = plain()
    lora(pipe.unet, **options)
    return pipe


def two():
    pipe = with_lora()
    lora(pipe.unet, "b", seed=1)  # is active now
    return pipe


def after(pipe, change):
    change(pipe)
    return pipe


def sequentially_offloaded(pipe):
    """As enable_sequential_cpu_offload does it, with the CPU in the GPU's place."""
    for name in NETWORKS:
        accelerate.cpu_offload(getattr(pipe, name), CPU)


def disk_offloaded(pipe, folder):
    """As a device_map with the disk does it."""
    for name in NETWORKS:
        accelerate.disk_offload(getattr(pipe, name), str(folder / name), CPU)


def group_offloaded(pipe, folder=None):
    for name in NETWORKS:
        where = str(folder / name) if folder else None
        apply_group_offloading(
            getattr(pipe, name), onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=where
        )


def fused(pipe, scale=1.0):
    pipe.unet.fuse_lora(lora_scale=scale)


def fp8(pipe):
    apply_layerwise_casting(pipe.unet, torch.float8_e4m3fn, torch.float32)


def int8(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.unet, Int8WeightOnlyConfig())


# name: (what pictures it makes, the pipeline). A file of a state is decoded in those that make the same pictures, and nowhere else.
STATES = {
    "the model": ("base", lambda tmp: plain()),
    "in bfloat16": ("base", lambda tmp: plain().to(torch.bfloat16)),
    "model offloading": ("base", lambda tmp: after(plain(), lambda p: p.enable_model_cpu_offload(device="cpu"))),
    "sequential offloading": ("base", lambda tmp: after(plain(), sequentially_offloaded)),
    "sequential offloading to disk": ("base", lambda tmp: after(plain(), lambda p: disk_offloaded(p, tmp / "disk"))),
    "group offloading": ("base", lambda tmp: after(plain(), group_offloaded)),
    "group offloading to disk": ("base", lambda tmp: after(plain(), lambda p: group_offloaded(p, tmp / "base"))),
    "LoRA, disabled": ("base", lambda tmp: after(with_lora(), lambda p: p.unet.disable_lora())),
    "LoRA, weight 0": ("base", lambda tmp: after(with_lora(), lambda p: p.unet.set_adapters(["a"], [0.0]))),
    "LoRA, deleted": ("base", lambda tmp: after(with_lora(), lambda p: p.unet.unload_lora())),
    "LoRA": ("LoRA", lambda tmp: with_lora()),
    "LoRA under another name": ("LoRA", lambda tmp: with_lora(name="other")),
    "LoRA in bfloat16": ("LoRA", lambda tmp: with_lora().to(torch.bfloat16)),
    "LoRA, another one inactive": ("LoRA", lambda tmp: after(two(), lambda p: p.unet.set_adapters(["a"]))),
    "LoRA, model offloading": ("LoRA", lambda tmp: after(with_lora(), lambda p: p.enable_model_cpu_offload(device="cpu"))),
    "LoRA, sequential offloading": ("LoRA", lambda tmp: after(with_lora(), sequentially_offloaded)),
    "LoRA, group offloading to disk": ("LoRA", lambda tmp: after(with_lora(), lambda p: group_offloaded(p, tmp / "lora"))),
    "LoRA, weight 0.1": ("tenth", lambda tmp: after(with_lora(), lambda p: p.unet.set_adapters(["a"], [0.1]))),
    "LoRA, lora_alpha a tenth": ("tenth", lambda tmp: with_lora(alpha=0.4)),
    "another LoRA active": ("other", lambda tmp: after(two(), lambda p: p.unet.set_adapters(["b"]))),
    "both active": ("both", lambda tmp: after(two(), lambda p: p.unet.set_adapters(["a", "b"]))),
    "LoRA, fused": ("fused", lambda tmp: after(with_lora(), fused)),
    "LoRA, fused and deleted": ("fused", lambda tmp: after(after(with_lora(), fused), lambda p: p.unet.unload_lora())),
    "LoRA in the text encoder": ("text", lambda tmp: after(plain(), lambda p: lora(p.text_encoder))),
    "FreeU": ("FreeU", lambda tmp: after(plain(), lambda p: p.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6))),
    "layerwise casting to fp8": ("fp8", lambda tmp: after(plain(), fp8)),
}
if find_spec("torchao"):
    STATES["torchao's int8"] = "int8", lambda tmp: after(plain(), int8)
# What the active adapters would be if fused is known in the sender's type alone, and where the weights are at hand.
ALSO_DECODE_FUSED = {"LoRA", "LoRA under another name", "LoRA, another one inactive", "LoRA, model offloading"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, photo):
    """state -> (pipeline, its file of the photo, the picture that it decodes it to)"""
    folder = tmp_path_factory.mktemp("states")

    @cache
    def of(state):
        pipe = STATES[state][1](folder)
        pipe.set_progress_bar_config(disable=True)
        data = pipe.compress(photo, max_bytes=200, num_coding_steps=2, prompt="abc").bitstreams[0]
        return pipe, data, picture(pipe, data)

    return of


def picture(pipe, data, **options):
    return np.asarray(pipe.decompress(data, num_inference_steps=2, **options).images[0]).astype(float)


@pytest.mark.parametrize("receiver", STATES)
def test_a_file_is_decoded_to_the_same_picture_or_refused(world, receiver):
    pipe, own_file, _ = world(receiver)
    for kind in dict.fromkeys(kind for kind, _ in STATES.values()):
        sender = next(state for state, (of, _) in STATES.items() if of == kind)
        _, data, sent = world(sender)
        if kind == STATES[receiver][0] or kind == "fused" and receiver in ALSO_DECODE_FUSED:
            difference = np.sqrt(np.mean((picture(pipe, data) - sent) ** 2))
            assert difference < 1, (sender, difference)  # of 255 levels
        else:
            with pytest.raises(WrongModel):
                pipe.decompress(data)
                pytest.fail(f"decoded a file made with: {sender}")
        if kind == STATES[receiver][0]:  # so what holds for the one sender holds for this one
            assert read_header(own_file)[0].fingerprint == read_header(data)[0].fingerprint


def test_states_that_are_told_apart_make_other_pictures(world):
    """The refusals are for a reason: by how much the denoiser's output differs."""
    x_t, outputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    for state, (kind, _) in STATES.items():
        pipe = world(state)[0]
        with torch.no_grad():
            output = pipe.predict(x_t, [500], pipe.encode_prompt(["abc"]))
        error = (output - outputs.setdefault(kind, output)).square().mean().sqrt()
        assert error < 0.02 * output.std(), state  # bfloat16
    for one, other in itertools.combinations(outputs.values(), 2):
        same = (one - other).square().mean().sqrt()
        assert same > 1e-3 * one.std() or {id(one), id(other)} == {id(outputs["LoRA"]), id(outputs["fused"])}


OFFLOADED = {
    "sequential": lambda network, folder: accelerate.cpu_offload(network, CPU),
    "to disk": lambda network, folder: accelerate.disk_offload(network, folder, CPU),
    "groups to disk": lambda network, folder: apply_group_offloading(
        network, CPU, CPU, offload_type="leaf_level", offload_to_disk_path=folder
    ),
    "blocks to disk": lambda network, folder: apply_group_offloading(
        network, CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder
    ),
}
# Codecs with networks that they copy, read or call themselves, not by `forward` alone: options of `compress`
OWN = {"relic": {"max_bytes": 150}, "perco": {}, "uqdm": {"num_coding_steps": 2}}


@pytest.fixture(scope="module")
def untouched():
    """codec -> (its file of a small picture, what that is decoded to)"""

    @cache
    def of(codec):
        pipe = make.pipeline(codec, "epsilon")
        data = pipe.compress(make.picture(24, 16), **OWN[codec]).bitstreams[0]
        return data, picture(pipe, data)

    return of


def check_as_untouched(pipe, codec, untouched):
    data, expected = untouched(codec)
    assert pipe.compress(make.picture(24, 16), **OWN[codec]).bitstreams[0] == data
    assert np.abs(picture(pipe, data) - expected).max() <= 1


@pytest.mark.parametrize("state", OFFLOADED)
@pytest.mark.parametrize("codec", OWN)
def test_networks_that_a_codec_reads_itself_may_be_offloaded(codec, state, untouched, tmp_path):
    pipe = make.pipeline(codec, "epsilon")
    for name, network in pipe.components.items():
        if isinstance(network, torch.nn.Module) and not (name == "hyper_encoder" and state.endswith("s to disk")):  # see below
            OFFLOADED[state](network, str(tmp_path / name))
    check_as_untouched(pipe, codec, untouched)


@pytest.mark.parametrize("codec", OWN)
def test_a_pipeline_offloads_in_groups_what_can_be(codec, untouched, tmp_path):
    pipe = make.pipeline(codec, "epsilon")
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    check_as_untouched(pipe, codec, untouched)


def test_weights_that_group_offloading_never_reads_are_refused(untouched, photo, tmp_path):
    """diffusers reads them when `forward` is called; until then their memory holds anything."""
    perco = make.pipeline("perco", "epsilon")
    OFFLOADED["groups to disk"](perco.hyper_encoder, str(tmp_path / "groups"))
    deep = DiffCPipeline.from_pretrained(embedded_model())
    OFFLOADED["blocks to disk"](deep.vae, str(tmp_path / "blocks"))
    for call in (
        lambda: perco.compress(photo),
        lambda: perco.decompress(untouched("perco")[0]),
        lambda: deep.compress(photo, max_bytes=100),
    ):
        with pytest.raises(ValueError, match="other methods than forward"):
            call()


def test_states_of_a_network_that_is_copied(untouched):
    """UQDM computes a copy in float64: of the values that its network has now, or it says that it cannot."""
    data, _ = untouched("uqdm")
    narrow = make.pipeline("uqdm", "epsilon")
    apply_layerwise_casting(narrow.network, torch.float8_e4m3fn, torch.float32)
    own = narrow.compress(make.picture(24, 16), num_coding_steps=2).bitstreams[0]
    adapted = make.pipeline("uqdm", "epsilon")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv1"]), adapted.network)
    with pytest.raises(WrongModel):
        narrow.decompress(data)
    with pytest.raises(WrongModel):
        make.pipeline("uqdm", "epsilon").decompress(own)
    assert picture(narrow, own).shape == (16, 24, 3)
    with pytest.raises(ValueError, match="merge its adapters"):
        adapted.compress(make.picture(24, 16))


def test_a_change_in_place_is_seen():
    pipe = plain()
    before = pipe.fingerprint()
    weight = pipe.unet.conv_in.weight
    changes = [
        lambda: weight.data.neg_(),
        lambda: setattr(weight, "data", -weight.data),
        lambda: pipe.unet.load_state_dict(other),
    ]
    other = {name: -tensor for name, tensor in pipe.unet.state_dict().items()}
    for change in changes:
        change()
        assert pipe.fingerprint() != before
        before = pipe.fingerprint()


def test_what_group_offloading_reads_from_disk_is_what_counts(tmp_path):
    """diffusers takes a file that it finds there for its own, though another model may have left it."""
    wanted = plain()
    for parameter in wanted.unet.parameters():
        parameter.data.neg_()
    group_offloaded(wanted, tmp_path)
    other = plain()
    group_offloaded(other, tmp_path)
    assert other.fingerprint() == wanted.fingerprint() != plain().fingerprint()


def test_tied_weights_on_disk(tmp_path):
    """T5's embedding is in two groups; the second file holds what is left after the first was written."""
    encoder = tiny_models.t5(tiny_models.t5_tokenizer())
    apply_group_offloading(encoder, CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    with pytest.raises(ValueError, match="shared.weight is a tied weight"):
        fingerprint({"text_encoder_2": encoder}, {})


def add_word(pipe, word, vectors):
    """A textual inversion, as `load_textual_inversion` leaves it."""
    words = [word, *(f"{word}_{i}" for i in range(1, vectors))]
    pipe.tokenizer.add_tokens(words)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    generator = torch.Generator().manual_seed(0)
    embedding = pipe.text_encoder.get_input_embeddings().weight.data
    embedding[-vectors:] = torch.randn(vectors, embedding.shape[1], generator=generator)
    return pipe


def test_textual_inversion():
    """A word of several vectors is told to the network in full; the same vectors under another word are another model."""
    pipe = add_word(plain(), "<abc>", 3)
    first = pipe.tokenizer.convert_tokens_to_ids("<abc>")
    assert [first, first + 1, first + 2] == pipe.family.tokens("tokenizer", ["a <abc>"])[0, 2:5].tolist()
    names = [add_word(plain(), word, 3).fingerprint() for word in ("<abc>", "<abd>")]
    assert names[0] == pipe.fingerprint() and len({*names, plain().fingerprint()}) == 3


def test_what_cannot_be_told_is_refused(photo):
    transformer = tiny_models.flux().transformer
    apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="output depends on earlier calls"):
        fingerprint({"transformer": transformer}, {})

    packed = plain()
    packed.text_encoder = torch.ao.quantization.quantize_dynamic(packed.text_encoder, {torch.nn.Linear})
    with pytest.raises(ValueError, match="text_encoder.*quantize_dynamic"):
        packed.compress(photo, max_bytes=100)

    with_image_prompt = plain()
    with_image_prompt.unet.config.encoder_hid_dim_type = "ip_image_proj"  # as load_ip_adapter does
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        with_image_prompt.compress(photo, max_bytes=100)

    kept = plain()
    targets = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"])
    peft.inject_adapter_in_model(targets, kept.unet)
    with pytest.raises(ValueError, match="merge the adapter"):
        kept.compress(photo, max_bytes=100)
