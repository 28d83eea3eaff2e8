import copy
import hashlib
import json
import re
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffusers_compress.fingerprint import SAMPLES, fingerprint

CONFIG = {"prediction_type": "epsilon", "beta_start": 0.00085, "beta_end": 0.012, "scaling_factor": 0.18215}


def tiny_modules():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    with torch.no_grad():  # values that underflow in float16 and round to zero in bfloat16's subnormals
        unet.conv_in.weight[0].mul_(1e-9)
        vae.decoder.conv_in.weight[0].mul_(1e-38)
    return {"unet": unet, "vae": vae}


@pytest.fixture(scope="module")
def modules():
    return tiny_modules()


def cast(modules, *dtypes):
    modules = copy.deepcopy(modules)
    for dtype in dtypes:
        modules = {name: module.to(dtype) for name, module in modules.items()}
    return modules


def test_the_hashed_bytes_are_those_of_the_format():
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0, 2.0, -0.0], [0.0, 5.0, -6.0]]))
        linear.bias.copy_(torch.tensor([1.0, -1.0]))
    tensors = [hashlib.blake2b(hashed, digest_size=16).digest() for hashed in (b"[[2]]\x40", b"[[2, 3]]\xa4")]
    hashed = b'{"a": "v", "b": 1.5}["net"]' + b"".join(sorted(tensors))
    assert fingerprint({"net": linear}, {"b": 1.5, "a": "v"}) == hashlib.blake2b(hashed, digest_size=4).digest()


def test_other_types_count_by_their_little_endian_elements():
    module = torch.nn.Module()
    values = {
        "a": torch.tensor([1, -2, 3], dtype=torch.int8),
        "b": torch.tensor([True, False, True]),
        "c": torch.tensor([-1, 258]),
    }
    for name, value in values.items():
        module.register_buffer(name, value)
    hashed = b"[[3]]\x01\xfe\x03", b"[[3]]\x01\x00\x01", b"[[2]]" + b"\xff" * 8 + b"\x02\x01" + bytes(6)
    tensors = b"".join(sorted(hashlib.blake2b(one, digest_size=16).digest() for one in hashed))
    assert fingerprint({"net": module}, {}) == hashlib.blake2b(b'{}["net"]' + tensors, digest_size=4).digest()


def test_names_and_tied_weights_do_not_count():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)
    wanted = fingerprint({"net": torch.nn.ModuleDict({"a": first, "b": second})}, {})
    assert fingerprint({"net": torch.nn.ModuleDict({"y": second, "x": first, "tied": second})}, {}) == wanted
    assert fingerprint({"net": first}, {}) != wanted


def test_the_check_value_of_the_format_description():
    """The digest of a DiffC model's configuration in FORMAT.md, which is that of Stable Diffusion 1.x."""
    text = (Path(__file__).parents[1] / "FORMAT.md").read_text(encoding="utf-8")
    config = re.search(r'^    (\{"beta_end".*\})$', text, re.MULTILINE)[1]
    digest = re.search(r"and the byte `60`: `([0-9a-f ]+)`", text)[1]
    unet = torch.nn.Linear(3, 1, bias=False)
    unet.weight.data = torch.tensor([[1, -2, -0.0]])
    assert fingerprint({"unet": unet}, json.loads(config)) == bytes.fromhex(digest)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16,),
        (torch.bfloat16,),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64,),
    ],
)
def test_the_same_in_every_dtype(modules, dtypes):
    assert fingerprint(cast(modules, *dtypes), CONFIG) == fingerprint(modules, CONFIG)


def test_signs_of_underflow_and_subnormals_are_kept():
    linear = torch.nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1e-45, 1e-45, -1e-40, -1e-30, -1e-8, -7e4]]))
    wanted = fingerprint({"net": linear}, {})
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            for dtype in (torch.float16, torch.bfloat16):
                assert fingerprint(cast({"net": linear}, dtype), {}) == wanted
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_after_saving_and_loading(modules, dtype, tmp_path):
    for name, module in cast(modules, dtype).items():
        module.save_pretrained(tmp_path / name)
    loaded = {name: type(module).from_pretrained(tmp_path / name) for name, module in modules.items()}
    assert fingerprint(loaded, CONFIG) == fingerprint(modules, CONFIG)


def test_the_same_when_compiled_or_in_another_memory_format(modules):
    wanted = fingerprint(modules, CONFIG)
    compiled = {"unet": torch.compile(modules["unet"]), "vae": modules["vae"]}
    assert fingerprint(compiled, CONFIG) == wanted
    channels_last = {name: module.to(memory_format=torch.channels_last) for name, module in cast(modules).items()}
    assert fingerprint(channels_last, CONFIG) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_on_a_gpu(modules, dtype):
    on_gpu = {name: module.cuda().to(dtype) for name, module in cast(modules).items()}
    assert fingerprint(on_gpu, CONFIG) == fingerprint(modules, CONFIG)


def test_the_same_under_sequential_offloading(modules):
    offloaded = {name: accelerate.cpu_offload(module, torch.device("cpu")) for name, module in cast(modules).items()}
    assert all(p.is_meta for p in offloaded["unet"].parameters())
    assert fingerprint(offloaded, CONFIG) == fingerprint(modules, CONFIG)


def test_quantized_weights_count_by_value():
    """As a library's own kind of tensor holds them, and apart from the same values that nobody quantized."""

    class Quantized(torch.Tensor):
        def dequantize(self):
            return self.as_subclass(torch.Tensor) - 3

    class Holder(torch.nn.Module):
        def __init__(self, *values):
            super().__init__()
            self.values = torch.tensor(values)

        def state_dict(self):
            return {"weight": self.values.as_subclass(Quantized)}

    wanted = fingerprint({"net": Holder(1.0, 2.0, 5.0)}, {})
    assert fingerprint({"net": Holder(1.0, 2.0, 4.0)}, {}) == wanted != fingerprint({"net": Holder(1.0, 4.0, 5.0)}, {})
    plain = torch.nn.Module()
    plain.register_buffer("weight", torch.tensor([-2.0, -1.0, 2.0]))
    assert fingerprint({"net": plain}, {}) != wanted


def test_other_weights_differ(modules):
    wanted = fingerprint(modules, CONFIG)
    for name in modules:
        changed = cast(modules)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in changed[name].parameters():  # as a fine-tune does, by a hundredth of the weights' size
                parameter.add_(0.01 * parameter.std(correction=0) * torch.randn_like(parameter))
        assert fingerprint(changed, CONFIG) != wanted


def test_one_sign_shapes_and_components_count(modules):
    wanted = fingerprint(modules, CONFIG)
    changed = cast(modules)
    with torch.no_grad():
        changed["vae"].post_quant_conv.weight.view(-1)[-1].neg_()
    assert fingerprint(changed, CONFIG) != wanted
    assert fingerprint({"unet": modules["unet"]}, CONFIG) != wanted
    assert fingerprint({"a": modules["unet"], "vae": modules["vae"]}, CONFIG) != wanted
    ones = [torch.nn.Linear(2, 8, bias=False), torch.nn.Linear(8, 2, bias=False)]
    for one in ones:
        torch.nn.init.ones_(one.weight)
    assert fingerprint({"net": ones[0]}, {}) != fingerprint({"net": ones[1]}, {})


def test_config_counts_but_not_its_order(modules):
    wanted = fingerprint(modules, CONFIG)
    assert fingerprint(modules, dict(reversed(CONFIG.items()))) == wanted
    assert fingerprint(dict(reversed(modules.items())), CONFIG) == wanted
    for change in ({"prediction_type": "v_prediction"}, {"scaling_factor": 0.18216}, {"extra": None}):
        assert fingerprint(modules, CONFIG | change) != wanted


def test_integer_weights_count_by_value():
    module = torch.nn.BatchNorm2d(2)
    wanted = fingerprint({"net": module}, {})
    module.num_batches_tracked += 1
    assert fingerprint({"net": module}, {}) != wanted


def test_large_tensors_are_thinned_out_evenly():
    # With 4 * SAMPLES elements the stride is 5: element 5 counts, elements 1 to 4 do not, whatever the shape.
    linear = torch.nn.Linear(SAMPLES // 64, 256, bias=False)
    torch.nn.init.ones_(linear.weight)
    wanted = fingerprint({"net": linear}, {})
    for index, seen in [(1, False), (4, False), (5, True), (4 * SAMPLES - 1, True)]:
        changed = copy.deepcopy(linear)
        changed.weight.data.view(-1)[index] = -1
        assert (fingerprint({"net": changed}, {}) != wanted) == seen


def test_meta_weights_and_odd_configs_are_refused(modules):
    with torch.device("meta"):
        linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="net.weight is on the meta device"):
        fingerprint({"net": linear}, {})
    for value in (torch.ones(1), float("nan")):
        with pytest.raises(ValueError):
            fingerprint(modules, {"value": value})
