import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.models import adapter


@pytest.fixture
def unet(tiny_sd_folder):
    return UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")


def output(unet, x):
    with torch.no_grad():
        return unet(x, 500, torch.ones(1, 3, 16), return_dict=False)[0]


def test_a_widened_unet_ignores_its_new_channels(unet):
    x = torch.randn(1, 4, 8, 8)
    before = output(unet, x)
    adapter.widen(unet, 6)
    assert unet.config.in_channels == 10
    assert torch.allclose(output(unet, torch.cat([x, torch.randn(1, 6, 8, 8)], 1)), before, atol=1e-5)


def test_low_rank_differences_start_at_zero_and_merge(unet):
    x = torch.randn(1, 4, 8, 8)
    before = output(unet, x)
    adapter.choose_trained(unet, 2)
    assert torch.allclose(output(unet, x), before, atol=1e-6)
    names = set(adapter.changes(unet))
    assert {"conv_in.weight", "conv_in.bias", "mid_block.resnets.0.conv1.weight.up"} < names
    assert all(name.endswith((".up", ".down")) for name in names - {"conv_in.weight", "conv_in.bias"})
    with torch.no_grad():
        for tensor in adapter.changes(unet).values():
            tensor.normal_(std=0.1)
    changed = output(unet, x)
    adapter.merge(unet)
    assert not torch.allclose(changed, before, atol=1e-2) and torch.allclose(output(unet, x), changed, atol=1e-4)
    assert not any("parametrizations" in name for name in unet.state_dict())


@pytest.mark.parametrize(
    "rank, whole, some", [(None, "", "conv_out.bias"), (0, "down_blocks", "down_blocks.0.resnets.0.norm1.weight")]
)
def test_chosen_tensors_are_trained_whole(unet, rank, whole, some):
    adapter.choose_trained(unet, rank, whole)
    names = set(adapter.changes(unet))
    assert some in names and "conv_in.weight" in names
    everything = {name for name, _ in unet.named_parameters()}
    assert names == everything if rank is None else names == {n for n in everything if n.startswith(("conv_in", "down_blocks"))}


def test_an_adapter_makes_the_changed_unet_of_the_base(unet, tiny_sd_folder, tmp_path):
    adapter.widen(unet, 3)
    adapter.choose_trained(unet, 2, "down_blocks.0")
    with torch.no_grad():
        for tensor in adapter.changes(unet).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    adapter.save(adapter.changes(unet), tmp_path, tiny_sd_folder, torch.float32)
    base = UNet2DConditionModel.from_pretrained(adapter.base_of(tmp_path), subfolder="unet")
    adapter.apply(base, tmp_path)
    x = torch.randn(1, 7, 8, 8)
    assert torch.allclose(output(base, x), output(unet, x), atol=1e-4)


def test_every_type_has_the_signs_of_the_sum_in_float32(unet, tmp_path):
    """The base's weights are no numbers of float16 or bfloat16, and the differences leave next to nothing of them."""
    name = "mid_block.resnets.0.conv1.weight"
    weight = unet.get_parameter(name)
    up, down = torch.randn(len(weight), 2).half(), torch.randn(2, weight[0].numel()).half()
    weight.data = -(up.float() @ down.float()).view_as(weight) * (1 + 1e-5 * torch.randn_like(weight))
    unet.save_pretrained(tmp_path / "base")
    adapter.save({"conv_in.weight": unet.conv_in.weight, f"{name}.up": up, f"{name}.down": down}, tmp_path, "base")

    def changed(dtype, loaded):
        base = UNet2DConditionModel.from_pretrained(tmp_path / "base", torch_dtype=loaded)
        adapter.apply(base, tmp_path, dtype)
        assert base.dtype == dtype
        return fingerprint({"unet": base}, {})

    types = (torch.float32, torch.float16, torch.bfloat16)
    as_loaded = {adapter.with_float32({"dtype": dtype}, "unet")["dtype"]["unet"] for dtype in types}
    assert as_loaded == {torch.float32}
    expected = changed(torch.float32, torch.float32)
    assert [changed(dtype, torch.float32) == expected for dtype in types] == [True] * 3
    assert [changed(dtype, dtype) == expected for dtype in types] == [True, False, False]


def test_training_goes_on_from_all_tensors_of_an_adapter_or_is_refused(unet, tiny_sd_folder, tmp_path):
    again, others = copy.deepcopy(unet), [(None, ""), (2, ""), (1, "down_blocks.0"), (2, "down_blocks")]
    adapter.choose_trained(unet, 2, "down_blocks.0")
    with torch.no_grad():
        for tensor in adapter.changes(unet).values():
            tensor.normal_()
    adapter.save(adapter.changes(unet), tmp_path, tiny_sd_folder, torch.float32)
    for options in others:
        other = copy.deepcopy(again)
        adapter.choose_trained(other, *options)
        with pytest.raises(ValueError, match=r" has \w.*, which is not trained here: give the options that it was made with"):
            adapter.load_trained(other, tmp_path)
    adapter.choose_trained(again, 2, "down_blocks.0")
    adapter.load_trained(again, tmp_path)
    assert all(torch.equal(tensor, adapter.changes(unet)[name]) for name, tensor in adapter.changes(again).items())


def test_an_adapter_of_another_unet_is_refused(unet, tmp_path):
    adapter.save({"conv_in.weight": torch.zeros(8, 4, 3, 3), "other.weight": torch.zeros(3)}, tmp_path, "base")
    with pytest.raises(ValueError, match="other.weight of another UNet"):
        adapter.apply(unet, tmp_path)


def test_adapters_are_found_by_name_or_rate(tmp_path):
    for name in ("0.0019", "0.1250"):
        (tmp_path / name).mkdir()
        (tmp_path / name / adapter.ABOUT).write_text('{"base": "../../model"}')
    assert adapter.find(tmp_path / "0.0019") == tmp_path / "0.0019"
    found = {preset: adapter.find(tmp_path, preset).name for preset in (None, 0, 0.001, 0.1, 0.2, 1, "0.1250")}
    assert found == {None: "0.0019", 0: "0.0019", 0.001: "0.0019", 0.1: "0.0019", 0.2: "0.1250", 1: "0.1250", "0.1250": "0.1250"}
    with pytest.raises(ValueError, match="preset is '0.5', .* has 0.0019, 0.1250"):
        adapter.find(tmp_path, "0.5")


def test_what_is_no_adapter_is_left_to_others(tiny_sd_folder):
    assert adapter.find(tiny_sd_folder) is None
    assert adapter.find("nobody/nothing", local_files_only=True) is None


def test_the_base_is_a_folder_beside_it_or_a_hub_id(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    for base, expected in (("../model", str(tmp_path / "adapter" / "../model")), ("somebody/something", "somebody/something")):
        (tmp_path / "adapter" / adapter.ABOUT).write_text(f'{{"base": "{base}"}}')
        assert adapter.base_of(tmp_path / "adapter") == expected
