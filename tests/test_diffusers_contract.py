"""The properties that diffusers' common pipeline tests ask of any pipeline, as far as they apply to a codec: diffusers_tests.md."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_perco import make as perco

from diffusers_compress import DiffCPipeline, PerCoPipeline, RelicPipeline, WrongModel
from diffusers_compress.outputs import DecompressOutput

CLASSES = {"diffc": DiffCPipeline, "relic": RelicPipeline, "perco": PerCoPipeline}
OPTIONS = {"diffc": {"max_bytes": 80, "num_coding_steps": 2}, "relic": {"max_bytes": 80}, "perco": {}}


@pytest.fixture(scope="module", params=CLASSES)
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(codec, tiny_sd_folder):
    pipe = perco(tiny_sd_folder) if codec == "perco" else CLASSES[codec].from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def coded(codec, pipe, photo):
    return pipe.compress(photo, **OPTIONS[codec]).bitstreams[0]


def picture(pipe, data):
    return pipe.decompress(data, num_inference_steps=2, output_type="np").images[0]


def assert_same(a, b, tolerance=1.01 / 255):
    assert np.abs(a - b).max() < tolerance


def again(codec, folder, **options):
    pipe = CLASSES[codec].from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_signature_of_the_call(pipe):
    names = inspect.signature(pipe.__call__).parameters
    expected = {"image", "prompt", "num_inference_steps", "guidance_scale", "output_type", "return_dict", "callback_on_step_end"}
    assert expected | {"callback_on_step_end_tensor_inputs"} <= names.keys()


def test_outputs_as_dictionary_and_tuple(codec, pipe, photo):
    output = pipe(photo, **OPTIONS[codec], output_type="np")
    images, bitstreams, *_ = pipe(photo, **OPTIONS[codec], output_type="np", return_dict=False)
    assert output["images"] is output.images is output[0] and bitstreams == output.bitstreams
    assert_same(images[0], output.images[0])


def test_kinds_of_output_hold_the_same_picture(pipe, coded):
    as_np, as_pt, as_pil = (
        pipe.decompress(coded, num_inference_steps=2, output_type=kind).images for kind in ("np", "pt", "pil")
    )
    assert as_pt.shape == (1, 3, 64, 96) and as_np.shape == (1, 64, 96, 3) and isinstance(as_pil, list)
    as_np, as_pt, as_pil = as_np[0], as_pt[0], as_pil[0]
    assert_same(as_np, as_pt.permute(1, 2, 0).numpy())
    assert_same(as_np, np.asarray(as_pil) / 255)


def test_pictures_of_one_size_are_one_array():
    """As diffusers' own pipelines return them; of different sizes they are a list."""
    for zeros in (np.zeros, torch.zeros):
        equal, unequal = ([zeros((3, 4, 5)), zeros((3, 4, side))] for side in (5, 6))
        assert DecompressOutput(images=equal, notes=[]).images.shape == (2, 3, 4, 5)
        assert DecompressOutput(images=unequal, notes=[]).images is unequal
    assert DecompressOutput(images=[], notes=[]).images == []


def test_components_make_another_pipeline(codec, pipe, coded, photo):
    other = CLASSES[codec](**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet and other.compress(photo, **OPTIONS[codec]).bitstreams[0] == coded


def test_saved_and_loaded(codec, pipe, coded, photo, tmp_path):
    pipe.save_pretrained(tmp_path)
    other = again(codec, tmp_path)
    assert other.compress(photo, **OPTIONS[codec]).bitstreams[0] == coded
    assert_same(picture(other, coded), picture(pipe, coded))
    assert {name for name, part in other.components.items() if part is None} == {
        name for name, part in pipe.components.items() if part is None
    }


def test_variants(codec, pipe, coded, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not [path for path in tmp_path.rglob("*.safetensors") if ".fp16" not in path.name]
    assert_same(picture(again(codec, tmp_path, variant="fp16"), coded), picture(pipe, coded))
    with pytest.raises((ValueError, OSError), match="variant"):
        again(codec, tmp_path, variant="no")


def test_dtypes(codec, pipe, coded, photo, tmp_path):
    pipe.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        other = again(codec, tmp_path, dtype=dtype)
        assert {module.dtype for module in other.components.values() if isinstance(module, torch.nn.Module)} == {dtype}
        assert other.fingerprint() == pipe.fingerprint()
        assert np.isfinite(picture(other, other.compress(photo, **OPTIONS[codec]).bitstreams[0])).all()
        assert other.to(torch.float32).unet.dtype == torch.float32


def test_guidance_costs_nothing_without_a_prompt(pipe, coded):
    plain, guided = (
        pipe.decompress(coded, num_inference_steps=2, guidance_scale=scale, output_type="np").images[0] for scale in (1, 8)
    )
    assert_same(plain, guided)


def test_layerwise_casting(codec, pipe, coded, tmp_path):
    """Weights that are 8 bits between calls are other weights, and run."""
    pipe.save_pretrained(tmp_path)
    other = again(codec, tmp_path)
    other.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    image = other.decompress(coded, num_inference_steps=2, output_type="np", allow_other_model=True).images[0]
    assert np.isfinite(image).all()


def test_fused_projections_and_freeu(codec, pipe, coded, tmp_path):
    """What StableDiffusionPipeline does with its UNet, done with ours."""
    pipe.save_pretrained(tmp_path)
    other, expected = again(codec, tmp_path), picture(pipe, coded)
    other.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(WrongModel):  # it changes the picture
        other.decompress(coded)
    image = other.decompress(coded, num_inference_steps=2, output_type="np", allow_other_model=True).images[0]
    assert np.isfinite(image).all()
    other.unet.disable_freeu()
    other.unet.fuse_qkv_projections()
    image = other.decompress(coded, num_inference_steps=2, output_type="np", allow_other_model=True).images[0]
    assert_same(image, expected, 2.01 / 255)


def test_back_to_diffusers_own_pipeline(codec, pipe):
    if codec == "perco":
        pytest.skip("its UNet sees more than Stable Diffusion's")
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    theirs = StableDiffusionPipeline.from_pipe(pipe, dtype=pipe.dtype, **absent, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.unet is pipe.unet
    assert theirs("a house", num_inference_steps=1, height=32, width=32, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_list_in_the_docs():
    """Each test that it names is there."""
    root = Path(__file__).parents[1]
    text = (root / "tests" / "diffusers_tests.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (root / "tests" / f"{file}.py").read_text(encoding="utf-8"), test
