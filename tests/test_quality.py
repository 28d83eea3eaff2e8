"""Files as small as a wanted quality permits."""

import json

import pytest
from PIL import Image

from diffusers_compress import DiffCPipeline, RefinePipeline, RelicPipeline, cli, embedded_model, quality
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.images import open_image
from diffusers_compress.metrics import distortion, psnr

FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def cup():
    """64x64 pixels of the photo that comes with the package."""
    return open_image(demo_photo()).crop((300, 100, 428, 228)).resize((64, 64))


@pytest.fixture(scope="module")
def diffc():
    pipe = DiffCPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decibels(image, decoded):
    return psnr(distortion.samples(image), distortion.samples(decoded))


def found(wanted, figure, **options):
    """(what a search returns, the knobs that it tried)"""
    trial, tried = quality.search(wanted, **options), []
    knob = next(trial)
    try:
        while True:
            tried.append(knob)
            knob = trial.send(figure(knob))
    except StopIteration as end:
        return end.value, tried


@pytest.mark.parametrize("goal", [3.0, 17.0, 24.5, 39.9])
def test_a_search_ends_just_above_what_is_wanted(goal):
    wanted = quality.wanted(goal, None)
    knob, tried = found(wanted, lambda x: 40 * x**0.5, low=0.0, high=1.0, first=0.7, finest=1e-4)
    assert knob in tried and goal <= 40 * knob**0.5 <= goal + 0.15 and len(tried) <= 12


def test_a_metric_that_falls():
    wanted = quality.wanted(None, ("wd", 100.0))
    knob, _ = found(wanted, lambda x: 1000 * (1 - x), low=0.0, high=1.0, first=0.5, finest=1e-4)
    assert 98 <= 1000 * (1 - knob) <= 100


def test_what_cannot_be_reached_says_what_can():
    with pytest.raises(ValueError, match="^PSNR of 60 dB cannot be reached here; this model's best on this picture is 40"):
        found(quality.wanted(60, None), lambda x: 40 * x, low=0.0, high=1.0, first=0.7, finest=1e-4)
    with pytest.raises(ValueError, match=r"^Wasserstein distortion, framelets, 16 px of 1 cannot be reached here; .* is 10$"):
        found(quality.wanted(None, ("wd", 1)), lambda x: 10 / x, low=0.0, high=1.0, first=0.7, finest=1e-4)


def test_diffc_reaches_its_target_in_one_encoding(diffc, cup):
    """Also in a batch; the figure is that of the picture that the receiver will decode."""
    images, calls, coded = [cup, cup.transpose(Image.Transpose.FLIP_TOP_BOTTOM)], [], diffc.reverse
    diffc.reverse = lambda *arguments: calls.append(1) or coded(*arguments)
    try:
        files = {goal: diffc.compress(images, target_psnr=goal, decoding=FAST).bitstreams for goal in (19, 22)}
    finally:
        del diffc.reverse
    assert len(calls) == 2
    for goal, both in files.items():
        decoded = diffc.decompress(both, **FAST)
        assert all(goal <= decibels(*pair) <= goal + 0.3 for pair in zip(images, decoded.images))  # small files have few sizes
        assert decoded.notes == [[], []]
    assert len(files[19][0]) < len(files[22][0])


def test_too_much_is_refused(diffc, cup):
    with pytest.raises(ValueError, match=r"PSNR of 70 dB cannot be reached here; this model's best on this picture is \d\d\.\d"):
        diffc.compress(cup, target_psnr=70)
    with pytest.raises(ValueError, match="target_metric is 'beauty', permitted are psnr"):
        diffc.compress(cup, target_metric=("beauty", 1))
    with pytest.raises(ValueError, match="exactly one.*target_bpp, target_psnr"):
        diffc.compress(cup, target_psnr=20, target_bpp=0.1)


@pytest.mark.parametrize("codec", [RelicPipeline, RefinePipeline])
def test_the_others_search(codec, cup):
    pipe = codec.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    base = {"base": "webp"} if codec is RefinePipeline else {}
    data = pipe.compress(cup, target_psnr=25, decoding=FAST, **base).bitstreams[0]
    smaller = pipe.compress(cup, max_bytes=int(0.8 * len(data)), **base).bitstreams[0]
    reached, missed = (decibels(cup, pipe.decompress(file, **FAST).images[0]) for file in (data, smaller))
    assert missed < 25 <= reached < 26


def test_the_command_line(cup, tmp_path, capsys):
    cup.save(tmp_path / "cup.png")
    source, file, target = (str(tmp_path / name) for name in ("cup.png", "cup.dfc", "back.png"))
    assert cli.main(["encode", source, file, "--psnr", "20", "--device", "cpu"]) == 0
    assert cli.main(["decode", file, target, "--device", "cpu"]) == 0
    assert 20 <= decibels(cup, Image.open(target)) < 20.5
    assert cli.main(["encode", source, file, "--psnr", "20", "--bpp", "1"]) == 2
    assert cli.main(["encode", source, file, "--metric", "wd"]) == 2
    assert cli.main(["encode", source, file, "--force", "--psnr", "90", "--device", "cpu"]) == 1
    assert "cannot be reached here; this model's best" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    cup.save(tmp_path / "in" / "cup.png")
    assert cli.main(["batch", str(tmp_path / "in"), str(tmp_path / "coded"), "--psnr", "20", "--device", "cpu"]) == 0
    assert (tmp_path / "coded" / "cup.dfc").read_bytes() == (tmp_path / "cup.dfc").read_bytes()


def test_eval_measures_a_codec_at_a_target(cup, tmp_path, capsys):
    pytest.importorskip("bjontegaard")
    (tmp_path / "in").mkdir()
    cup.save(tmp_path / "in" / "cup.png")
    codecs = "relic:encode.target_metric=('wd',150),relic:encode.target_psnr=22"
    words = [
        "eval",
        tmp_path / "in",
        "--out",
        tmp_path / "report",
        "--codec",
        codecs,
        "--bpp",
        "1",
        "--metrics",
        "psnr,wasserstein",
    ]
    assert cli.main([*map(str, words), "--device", "cpu"]) == 0, capsys.readouterr().err
    by_distortion, by_psnr = map(json.loads, (tmp_path / "report" / "rows.jsonl").read_text().splitlines())
    assert 110 < by_distortion["wasserstein"] <= 150 and 22 <= by_psnr["psnr"] < 22.8
