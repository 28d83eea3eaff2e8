"""The examples run as they stand, with the embedded model, on small pictures."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_perco import make as perco

from diffusers_compress import DiffCPipeline, RelicPipeline, inversion
from diffusers_compress.codecs import describe

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(name, *arguments) in an empty folder -> what the example printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def pictures(photo, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        photo.rotate(180 * i).save(folder / f"{i}.png")
    return folder


def test_quickstart(run, pictures, tmp_path):
    assert "bpp" in run("quickstart.py", pictures / "0.png")
    assert (tmp_path / "photo.dfc").stat().st_size <= 0.1 * 96 * 64 / 8
    assert Image.open(tmp_path / "decoded.png").size == (96, 64)


def test_encode_folder(run, pictures, tmp_path):
    (pictures / "sub").mkdir()
    (pictures / "2.png").rename(pictures / "sub" / "2.png")
    Image.open(pictures / "0.png").save(pictures / "0.jpg")
    os.mkfifo(pictures / "pipe.png")
    text = run("encode_folder.py", pictures, tmp_path / "out", "--at-once", 2)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "out")) for path in files} == {"0.jpg.dfc", "0.png.dfc", "1.dfc", "sub/2.dfc"}
    assert all(0 < path.stat().st_size <= 0.1 * 96 * 64 / 8 for path in files)
    assert "passed over: pipe.png" in text and "not a regular file" in text


def test_progressive_preview(run, pictures, tmp_path):
    lines = run("progressive_preview.py", pictures / "0.png").splitlines()
    arrived, whole = zip(*(map(int, line.split()[::2][:2]) for line in lines))
    assert list(arrived) == sorted(arrived) and len(set(arrived)) == 4 and arrived[-1] == whole[-1]
    assert Image.open(tmp_path / "progressive.png").size == (4 * 96 + 3 * 8, 64)


def test_realism(run, pictures, tmp_path):
    lines = run("realism.py", pictures / "0.png", "--bpp", 0.06).splitlines()
    decibels = [float(line.split()[-2]) for line in lines]
    # of so small a picture in 46 bytes DiffC's mean may be the worse one by a little
    assert len(lines) == 6 and decibels[0] > decibels[2] and decibels[3] > decibels[5] - 0.5 and min(decibels) > 10
    assert Image.open(tmp_path / "realism.png").size == (7 * 96 + 6 * 8, 64)


def test_compare(run, pictures, tmp_path):
    """A row a photo; each picture under its label."""
    lines = run("compare.py", pictures / "0.png", pictures / "1.png", "--bpp", 0.5, "--side", 64).splitlines()
    assert len(lines) == 2 and re.fullmatch(r"original; JPEG [\d,]+ B; AVIF [\d,]+ B; DiffC 384 B", lines[0])
    assert Image.open(tmp_path / "compare.jpg").size == (4 * 64 + 3 * 8, 2 * (64 + 34) + 8)


def test_calibrate_and_push(run, pictures, tmp_path, tiny_sd_folder):
    options = [
        "--model",
        tiny_sd_folder,
        "--license",
        "mit",
        "--rates",
        0.2,
        "--held-out",
        1,
        "--folder",
        tmp_path / "repository",
    ]
    (pictures / "notes.txt").write_text("no picture")
    run("calibrate_and_push.py", pictures, "me/codec", *options)
    assert json.loads((tmp_path / "repository/model_index.json").read_text())["_class_name"][:2] == ["pipeline", "DiffCPipeline"]
    for pipeline in (DiffCPipeline, RelicPipeline):
        assert {"error", "latent"} == pipeline.from_pretrained(tmp_path / "repository").config.calibration.keys()


def test_calibrate_and_push_wants_pictures_beside_those_of_the_table(run, pictures, capsys):
    with pytest.raises(SystemExit):
        run("calibrate_and_push.py", pictures, "me/codec", "--held-out", 3)
    assert "has 3 pictures, and 3 are for the table; lower --held-out" in capsys.readouterr().err
    os.mkfifo(pictures / "pipe.png")
    with pytest.raises(SystemExit):
        run("calibrate_and_push.py", pictures, "me/codec")
    assert "pipe.png: not a regular file" in capsys.readouterr().err


def test_sdxl_and_flux(run, pictures, tmp_path):
    assert "StableDiffusion: v_prediction, latents of 24 channels" in run("sdxl_and_flux.py", pictures / "0.png", "--bpp", 0.1)
    assert Image.open(tmp_path / "decoded.png").size == (96, 64)


def test_captions(run, pictures, tmp_path, tiny_sd_folder):
    perco(tiny_sd_folder).save_pretrained(tmp_path / "perco")
    lines = run("captions.py", pictures / "0.png", "a house", "two houses", "--model", tmp_path / "perco").splitlines()
    sizes = [int(line.split()[0]) for line in lines]
    assert sizes[0] < sizes[1] and lines[1].endswith(": two houses")
    assert Image.open(tmp_path / "captions.png").size == (3 * 96 + 2 * 8, 64)


def test_invert_prompt(run, pictures, tmp_path, tiny_sd_folder, monkeypatch):
    """The inversion itself is in test_text_sketch.py; CLIP's ids are more than the tiny model's."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "clip_small.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(inversion, "invert", lambda *given: ([1, 2], [0.5]))
    arguments = ["--model", tiny_sd_folder, "--clip", "clip_small", "--candidates", 1, "--device", "cpu"]
    assert " bytes, " in run("invert_prompt.py", pictures / "0.png", tmp_path / "a.dfc", *arguments)
    assert describe((tmp_path / "a.dfc").read_bytes())["prompt"].startswith("tokens")


def test_every_example_is_run():
    tested = {
        "convert_cdc.py",
        "convert_perco.py",
        "convert_uqdm.py",
        "hf_dataset.py",
        "lora.py",
        "progressive_page.py",
        "prove_it.py",
        "rd_curve.py",
        "ray_data.py",
        "retrain_embedded.py",
        "webdataset_train.py",
    }  # in files of their own
    text = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("train_")}
    assert {name for name in names - tested if f'run("{name}"' not in text} == set()
