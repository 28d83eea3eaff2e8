"""PerCo: the contract of every codec, and what is its own."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import (
    Corrupt,
    HyperEncoder,
    LimitExceeded,
    PerCoPipeline,
    RelicPipeline,
    WrongModel,
    cli,
    contract,
    evaluation,
    images,
)
from diffusers_compress.codecs.perco.format import BYTES, WORDS, describe, read_file
from diffusers_compress.codecs.perco.payload import smallest_file
from diffusers_compress.errors import BitstreamError
from diffusers_compress.format import container
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits
from diffusers_compress.models import adapter

ROOT = Path(__file__).parents[1]
CAPTION = "a house, on a hill!"


def make(folder, stride=1, codebook_size=64, seed=0, **options):
    """PerCo over a Stable-Diffusion folder, with a hyper-encoder of random weights that the UNet does see."""
    pipe = PerCoPipeline.from_pretrained(folder, hyper_encoder=None, **options)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    hyper_encoder = HyperEncoder(4, stride, codebook_size, width=16, out_channels=8, codebook_dim=4).eval()
    # Codes that lie where the points do, so that the grid tells of the picture
    with torch.no_grad():
        points = hyper_encoder.analyse(torch.randn(1, 4, 16 * stride, 16 * stride)).flatten(0, 2)
        hyper_encoder.codebook.copy_(points[torch.randperm(len(points))[:codebook_size]])
        hyper_encoder.settle(torch.rand(codebook_size))
        adapter.widen(pipe.unet, 8)
        pipe.unet.conv_in.weight[:, 4:].normal_(std=0.5)
    pipe.register_modules(hyper_encoder=hyper_encoder)
    return pipe


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipe(request, tiny_sd_folders):
    return make(tiny_sd_folders[request.param])


# For tests of what no prediction type changes
epsilon_alone = pytest.mark.parametrize("pipe", ["epsilon"], indirect=True)


@pytest.fixture(scope="module")
def coded(pipe, photo):
    return pipe.compress(photo, prompt=CAPTION, seed=7).bitstreams[0]


def decoded(pipe, data, **options):
    return pipe.decompress(data, output_type="np", **{"num_inference_steps": 3, **options}).images[0]


def read(pipe, data, limits=DEFAULT_LIMITS):
    """(grid, caption) of a file."""
    header, parameters, payload = read_file(data)
    return pipe.read_payload(payload, parameters, pipe.latent_shape(header.height, header.width), limits)


@torch.no_grad()
def grid_of(pipe, picture):
    x = pipe.pad(images.to_tensor(picture)[0][None])
    return pipe.hyper_encoder.encode(pipe.encode_picture(x))[0]


# ---------------------------------------------------------------------------------------------------------- file and back


def test_round_trip_through_a_file(pipe, photo, coded, tmp_path):
    (tmp_path / "photo.dfc").write_bytes(coded)
    data = (tmp_path / "photo.dfc").read_bytes()
    grid, caption = read(pipe, data)
    assert torch.equal(grid, grid_of(pipe, photo)) and grid.unique().numel() > 4 and caption == CAPTION
    assert pipe.decompress(data, num_inference_steps=2).images[0].size == photo.size
    assert describe(data)["seed"] == 7 and describe(data)["preset"] == "0.0937"


@epsilon_alone
def test_compressing_twice_gives_the_same_bytes(pipe, photo, coded):
    out = pipe.compress(photo, prompt=CAPTION, seed=7)
    assert out.bitstreams[0] == coded and out.bpp == [8 * len(coded) / (96 * 64)]


def test_calling_the_pipeline_is_compress_and_decompress(pipe, photo, coded):
    both = pipe(photo, prompt=CAPTION, seed=7, num_inference_steps=2)
    assert both.bitstreams == [coded]
    assert np.abs(np.asarray(both.images[0]) / 255 - decoded(pipe, coded, num_inference_steps=2)).max() < 1.01 / 255
    assert pipe(photo, prompt=CAPTION, seed=7, num_inference_steps=1, return_dict=False)[1] == [coded]


@pytest.mark.parametrize("size", [(1, 1), (65, 65), (97, 12)])
@pytest.mark.parametrize("stride", [1, 8])
def test_any_size_comes_back(tiny_sd_folder, size, stride):
    pipe = make(tiny_sd_folder, stride)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    data = pipe.compress(picture).bitstreams[0]
    cells = [-(-side // (8 * stride)) for side in size]
    assert list(read(pipe, data)[0].shape) == cells[::-1]
    assert pipe.decompress(data, num_inference_steps=1).images[0].size == size


def test_lists_go_together_and_come_back_alone(pipe, photo, coded):
    small = photo.crop((0, 0, 40, 40))
    out = pipe.compress([photo, small, photo], prompt=[CAPTION, "", "clouds"], seed=7)
    assert out.bitstreams[0] == coded and [read(pipe, data)[1] for data in out.bitstreams] == [CAPTION, "", "clouds"]
    together = pipe.decompress(out.bitstreams, output_type="np", num_inference_steps=3).images
    assert [image.shape for image in together] == [(64, 96, 3), (40, 40, 3), (64, 96, 3)]
    for image, data in zip(together, out.bitstreams):
        assert np.abs(image - decoded(pipe, data)).max() < 0.01


def test_a_file_of_the_lowest_preset_has_at_most_115_bytes(tiny_sd_folder):
    """For 768x512 pixels: 12 x 8 cells of 8 bits, and 19 bytes around them, whatever the indices are."""
    pipe = make(tiny_sd_folder, 8, 256)
    header = container.Header(contract.PERCO, 768, 512, pipe.fingerprint(), b"")
    for seed in range(5):
        grid = np.random.default_rng(seed).integers(0, 256, (8, 12))
        data = smallest_file(header, grid, "", 0, pipe.hyper_encoder, pipe.tokenizer)
        assert len(data) <= 115
        assert torch.equal(read(pipe, data)[0], torch.from_numpy(grid))
    assert describe(data)["preset"] == "0.0019"
    assert len(smallest_file(header, np.full((8, 12), 3), "", 0, pipe.hyper_encoder, pipe.tokenizer)) < 40


@epsilon_alone
@pytest.mark.parametrize("rate", [{"max_bytes": 25}, {"target_bpp": 0.03}])
def test_a_file_that_exceeds_its_size_is_refused(pipe, photo, rate):
    with pytest.raises(ValueError, match="may take .* bytes here; with this model's grid of 12x8 cells"):
        pipe.compress(photo, **rate)
    assert len(pipe.compress(photo, max_bytes=200).bitstreams[0]) <= 200


@epsilon_alone
@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_bpp": 1, "max_bytes": 9}, "at most one"),
        ({"target_bpp": 0}, "above 0, not 0"),
        ({"seed": -1}, "seed must be"),
        ({"prompt": ["a", "b"]}, "2 prompts were given for 1"),
        ({"prompt": "x" * 5000}, "at most 4096 bytes, not 5000"),
        ({"prompt": "a", "captioner": list}, "not both"),
    ],
)
def test_wrong_arguments_are_named(pipe, photo, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.compress(photo, **options)


@epsilon_alone
def test_wrong_arguments_of_decompress_are_named(pipe, coded):
    for options in ({"num_images_per_prompt": 0}, {"num_inference_steps": 0}, {"output_type": "jpeg"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            pipe.decompress(coded, **options)


# ------------------------------------------------------------------------------------------------------ seed, grid, caption


def test_the_seed_decides_the_picture(pipe, photo, coded):
    other = pipe.compress(photo, prompt=CAPTION, seed=8).bitstreams[0]
    first, again, second = decoded(pipe, coded), decoded(pipe, coded), decoded(pipe, other)
    assert np.abs(first - again).max() < 1.01 / 255 and np.abs(first - second).max() > 0.02
    candidates = pipe.decompress([coded, other], num_images_per_prompt=2, output_type="np", num_inference_steps=3).images
    for image, expected in zip(candidates, [first, second, second]):
        assert np.abs(image - expected).max() < 0.01
    assert len(candidates) == 4


def test_the_last_seed_is_followed_by_the_first(pipe, photo):
    last, first = (pipe.compress(photo, seed=seed).bitstreams[0] for seed in (2**32 - 1, 0))
    assert len(last) == len(first) + 5
    candidates = pipe.decompress(last, num_images_per_prompt=2, output_type="np", num_inference_steps=3).images
    assert np.abs(candidates[1] - decoded(pipe, first)).max() < 0.01


def test_the_picture_follows_the_grid(pipe, photo):
    data = pipe.compress(photo).bitstreams[0]
    header, parameters, payload = read_file(data)
    grid = (read(pipe, data)[0].numpy() + 31) % 64
    other = smallest_file(header, grid, "", 0, pipe.hyper_encoder, pipe.tokenizer)
    assert np.abs(decoded(pipe, data) - decoded(pipe, other)).max() > 0.02


def test_guidance_follows_the_caption_and_keeps_the_grid(pipe, photo, coded, monkeypatch):
    seen = []
    predict = PerCoPipeline.predict
    monkeypatch.setattr(PerCoPipeline, "predict", lambda self, x, t, e: seen.append((x, e)) or predict(self, x, t, e))
    guided, plain = decoded(pipe, coded, guidance_scale=3.0), decoded(pipe, coded, guidance_scale=1.0)
    assert np.abs(guided - plain).max() > 1.01 / 255 and len(seen) == 6 + 3
    for (x, embeds), (x_empty, empty) in zip(seen[0:6:2], seen[1:6:2]):
        assert torch.equal(x, x_empty) and x[:, 4:].abs().max() > 0 and not torch.equal(embeds["text"], empty["text"])
    seen.clear()
    decoded(pipe, pipe.compress(photo).bitstreams[0])
    assert len(seen) == 3  # without a caption there is nothing to guide towards


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_any_ode_solver_paints(tiny_sd_folders, photo, name):
    pipe = make(tiny_sd_folders["v_prediction"])
    data = pipe.compress(photo).bitstreams[0]
    before = decoded(pipe, data, num_inference_steps=50)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert np.abs(before - decoded(pipe, data, num_inference_steps=50)).mean() < 0.02


@epsilon_alone
def test_a_captioner_is_asked_for_all_pictures(pipe, photo):
    asked = []
    out = pipe.compress([photo, photo], captioner=lambda pictures: asked.extend(pictures) or ["a dog", "Ein Häuschen"])
    assert [read(pipe, data)[1] for data in out.bitstreams] == ["a dog", "Ein Häuschen"]
    assert [picture.size for picture in asked] == [photo.size] * 2


# ------------------------------------------------------------------------------------------------------------- bad files


@epsilon_alone
def test_any_flipped_bit_is_found(pipe, coded):
    for bit in range(8 * len(coded)):
        broken = bytearray(coded)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            pipe.decompress(bytes(broken), num_inference_steps=1)


@epsilon_alone
def test_a_cut_file_is_corrupt(pipe, coded):
    for length in range(1, len(coded)):
        with pytest.raises(Corrupt):
            pipe.decompress(coded[:length])


@epsilon_alone
def test_payloads_that_no_encoder_writes(pipe, photo, coded):
    """Whatever stands in a payload: a grid and a caption, or an error of a file, never anything else."""
    header, parameters, payload = read_file(coded)
    shape, rng = pipe.latent_shape(64, 96), np.random.default_rng(0)
    for way in (WORDS, BYTES):
        for _ in range(100):
            parameters.caption, parameters.modelled = way, bool(rng.integers(2))
            noise = rng.bytes(int(rng.integers(200)))
            try:
                grid, caption = pipe.read_payload(noise, parameters, shape, DEFAULT_LIMITS)
            except BitstreamError:
                continue
            assert grid.shape == (8, 12) and 0 <= grid.min() and grid.max() < 64 and len(caption.encode()) <= 4096


@epsilon_alone
def test_a_caption_may_be_no_longer_than_the_limit(pipe, photo):
    data = pipe.compress(photo, prompt="a" * 200).bitstreams[0]
    with pytest.raises(LimitExceeded, match="Limits.prompt_bytes"):
        pipe.decompress(data, limits=Limits(prompt_bytes=100))


def test_other_models_are_refused(pipe, tiny_sd_folder, photo, coded):
    other = make(tiny_sd_folder, seed=1)
    with pytest.raises(WrongModel, match="allow_other_model"):
        other.decompress(coded)
    assert other.decompress(coded, allow_other_model=True, num_inference_steps=1).images[0].size == photo.size
    coarser = make(tiny_sd_folder, stride=2)
    with pytest.raises(WrongModel, match="preset 0.0937"):
        coarser.decompress(coded, allow_other_model=True)


def test_another_tokenizer_is_refused(tiny_sd_folder, photo):
    pipe = make(tiny_sd_folder)
    data = pipe.compress(photo, prompt="e a s t w e s t").bitstreams[0]
    grid, caption = read(pipe, data)
    pipe.tokenizer.add_tokens(["hill"])
    with pytest.raises(WrongModel):
        pipe.decompress(data)
    assert describe(data)["caption"] == "in letters" and read(pipe, data)[1] == caption


@epsilon_alone
def test_files_of_other_codecs_are_refused(pipe, coded, tiny_sd_folder, photo):
    relic = RelicPipeline.from_pretrained(tiny_sd_folder)
    with pytest.raises(WrongModel, match="PerCoPipeline"):
        relic.decompress(coded)
    with pytest.raises(WrongModel, match="RelicPipeline"):
        pipe.decompress(relic.compress(photo, fidelity=0.5).bitstreams[0])


# ---------------------------------------------------------------------------------------------------------- loading, saving


def test_a_plain_folder_is_refused_with_what_to_do(tiny_sd_folder, photo):
    with pytest.raises(ValueError, match="examples/train_perco.py .* examples/convert_perco.py"):
        PerCoPipeline.from_pretrained(tiny_sd_folder)
    untrained = PerCoPipeline.from_pretrained(tiny_sd_folder, hyper_encoder=None)
    with pytest.raises(ValueError, match="examples/train_perco.py"):
        untrained.compress(photo)


def test_a_saved_pipeline_loads_in_both_ways(pipe, photo, coded, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    pipe.save_pretrained(tmp_path / "model")
    trust = {"trust_remote_code": True}
    for loader, options in (
        (PerCoPipeline, {}),
        (diffusers.DiffusionPipeline, trust),
        (diffusers.DiffusionPipeline, {"custom_pipeline": str(ROOT / "pipelines" / "perco.py"), **trust}),
    ):
        loaded = loader.from_pretrained(tmp_path / "model", **options)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded).__name__ == "PerCoPipeline" and type(loaded.hyper_encoder) is HyperEncoder
        assert loaded.compress(photo, prompt=CAPTION, seed=7).bitstreams[0] == coded
        assert np.abs(decoded(loaded, coded) - decoded(pipe, coded)).max() < 1.01 / 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_decodes_in_narrower_types(pipe, coded, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    narrow = PerCoPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert narrow.fingerprint() == pipe.fingerprint()
    (grid, caption), (narrow_grid, narrow_caption) = read(pipe, coded), read(narrow, coded)
    assert torch.equal(grid, narrow_grid) and caption == narrow_caption


def test_decoding_in_another_process(tiny_sd_folder, photo, tmp_path, python):
    pipe = make(tiny_sd_folder)
    data = pipe.compress(photo, prompt=CAPTION).bitstreams[0]
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "photo.dfc").write_bytes(data)
    command = ["-m", "diffusers_compress.cli", "decode", "photo.dfc", "photo.png", "--model", "model", "--steps", "2"]
    python.run(command, check=True, cwd=tmp_path)
    with Image.open(tmp_path / "photo.png") as image:
        assert np.abs(np.asarray(image) / 255 - decoded(pipe, data, num_inference_steps=2)).max() < 2.01 / 255


@epsilon_alone
def test_offloading_runs_every_component(pipe, photo, coded, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = PerCoPipeline.from_pretrained(tmp_path)
    loaded.enable_model_cpu_offload(device="cpu")
    assert loaded.compress(photo, prompt=CAPTION, seed=7).bitstreams[0] == coded
    assert np.abs(decoded(loaded, coded) - decoded(pipe, coded)).max() < 1.01 / 255


@epsilon_alone
def test_the_command_line(pipe, photo, coded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    photo.save("photo.png")
    perco = ["--codec", "perco", "--model", "model", "--device", "cpu"]
    assert cli.main(["encode", "photo.png", "photo.dfc", *perco, "--prompt", CAPTION, "--seed", "7"]) == 0
    assert Path("photo.dfc").read_bytes() == coded
    assert cli.main(["info", "photo.dfc"]) == 0 and "preset      0.0937" in capsys.readouterr().out
    assert cli.main(["info", "photo.dfc", "--find", "."]) == 0 and "made with  model" in capsys.readouterr().out
    assert cli.main(["decode", "photo.dfc", "again.png", "--model", "model", "--device", "cpu", "--steps", "2"]) == 0
    with Image.open("again.png") as image:
        assert np.abs(np.asarray(image) / 255 - decoded(pipe, coded, num_inference_steps=2)).max() < 2.01 / 255
    assert cli.main(["encode", "photo.png", "other.dfc", *perco, "--fidelity", "0.5"]) == 2
    assert "--fidelity: perco has no such option" in capsys.readouterr().err


@epsilon_alone
def test_whole_datasets(pipe, photo, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "photo.png")
    perco = ["--codec", "perco", "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert cli.main(["batch", str(tmp_path / "photos"), str(tmp_path / "coded"), *perco, "--option", "seed=7"]) == 0
    data = (tmp_path / "coded" / "photo.dfc").read_bytes()
    assert data == pipe.compress(photo, seed=7).bitstreams[0]
    options = ["--decode", "--option", "num_inference_steps=1"]
    assert cli.main(["batch", str(tmp_path / "coded"), str(tmp_path / "decoded"), *perco, *options]) == 0
    assert Image.open(tmp_path / "decoded" / "photo.png").size == photo.size


@epsilon_alone
def test_the_evaluation_knows_rates_that_it_cannot_meet(pipe, photo, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "photo.png")
    codec = evaluation.parse_codec("perco:decode.num_inference_steps=1", str(tmp_path / "model"))
    rows = evaluation.evaluate(tmp_path / "photos", tmp_path / "out", [codec], [1.0, 0.01], ("psnr",))
    assert rows[0]["reached"] and rows[0]["psnr"] > 0
    assert "note" in rows[1] and "may take" in rows[1]["note"] and "bytes" not in rows[1]
