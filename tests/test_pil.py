"""Pillow reads and writes compressed files as it does its own formats."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_compress import Corrupt, DiffCPipeline, RelicPipeline, WrongModel, contract, pil
from diffusers_compress.format import container


@pytest.fixture
def registered(tiny_sd_folder, monkeypatch):
    """Both codecs, DiffC first; Pillow forgets them afterwards."""
    Image.init()  # or what a test imports is registered in the copies, and lost
    for name in ("OPEN", "SAVE", "EXTENSION", "MIME", "ID"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    monkeypatch.setattr(Image.Image, "save", Image.Image.save)
    monkeypatch.setattr(pil, "registered", {})
    pipes = {"diffc": DiffCPipeline.from_pretrained(tiny_sd_folder), "relic": RelicPipeline.from_pretrained(tiny_sd_folder)}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
        pil.register(pipe, num_inference_steps=2)
    return pipes


@pytest.mark.parametrize("codec", ["diffc", "relic"])
def test_save_and_open(registered, photo, tmp_path, codec):
    path = tmp_path / "photo.dfc"
    photo.save(path, bpp=0.15, **({} if codec == "diffc" else {"codec": codec}))
    data = path.read_bytes()
    assert data == registered[codec].compress(photo, target_bpp=0.15).bitstreams[0]
    with Image.open(path) as image:
        assert (image.format, image.size, image.mode, image.info["codec"]) == ("DFC", photo.size, "RGB", codec)
        assert image.info["bpp"] == 8 * len(data) / (96 * 64) <= 0.15
        again = image.convert("RGB")
    expected = registered[codec].decompress(data, num_inference_steps=2).images[0]
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize("name", ["photo.dfc", b"photo.DFC", Path("photo.dfc"), "photo"])
def test_a_failed_save_leaves_the_old_file_whole(registered, photo, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, format = Path(os.fsdecode(name)), None if name != "photo" else "DFC"
    path.write_bytes(b"the old file")
    for bad in ({}, {"bpp": -1}, {"bpp": 0.1, "no_such_option": 1}, {"bpp": 0.1, "codec": "jpeg"}):
        with pytest.raises((ValueError, TypeError)):
            photo.save(name, format, **bad)
        assert path.read_bytes() == b"the old file" and os.listdir() == [path.name]
    photo.save(name, format, bpp=0.15)
    assert path.read_bytes() == registered["diffc"].compress(photo, target_bpp=0.15).bitstreams[0] and os.listdir() == [path.name]


def test_a_failed_save_leaves_no_new_file(registered, photo, tmp_path):
    with pytest.raises(ValueError):
        photo.save(tmp_path / "photo.dfc")
    assert not os.listdir(tmp_path)


def test_other_formats_are_saved_as_before(registered, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path / "photo.dfc", format="PNG")
    assert (tmp_path / "photo.png").read_bytes() == (tmp_path / "photo.dfc").read_bytes()
    with pytest.raises(ValueError, match="unknown file extension"):
        photo.save(tmp_path / "photo.nothing")


def test_registering_twice_wraps_save_once(registered):
    save = Image.Image.save
    pil.register(registered["relic"])
    assert Image.Image.save is save


def test_file_objects_copies_and_other_modes(registered, photo):
    buffer = io.BytesIO()
    photo.convert("L").save(buffer, "DFC", max_bytes=60, num_coding_steps=2)
    assert len(buffer.getvalue()) <= 60
    image = Image.open(buffer)
    assert image.copy().size == image.resize((96, 64)).size == photo.size
    assert image.getpixel((0, 0)) == image.getpixel((0, 0))


def test_the_model_is_called_when_pixels_are_wanted(registered, photo, monkeypatch):
    data = registered["diffc"].compress(photo, max_bytes=60, num_coding_steps=2).bitstreams[0]
    calls, decompress = [], DiffCPipeline.decompress
    monkeypatch.setattr(DiffCPipeline, "decompress", lambda *args, **options: calls.append(1) or decompress(*args, **options))
    image = Image.open(io.BytesIO(data))
    assert image.size == photo.size and not calls
    image.load()
    image.load()
    assert calls == [1]


def test_pillows_size_limits_hold(registered, photo, monkeypatch):
    data = registered["diffc"].compress(photo, max_bytes=60, num_coding_steps=2).bitstreams[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", photo.width * photo.height - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", photo.width * photo.height // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    large = container.pack(container.Header(contract.DIFFC, 60_000, 60_000, bytes(4), b""), b"")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(large))


def test_errors(registered, photo, tiny_sd_folders, monkeypatch):
    data = registered["diffc"].compress(photo, max_bytes=60, num_coding_steps=2).bitstreams[0]
    with pytest.raises(Corrupt):
        Image.open(io.BytesIO(data[:-1] + bytes([data[-1] ^ 1]))).load()
    with pytest.raises(ValueError, match="codec must be one of diffc, relic"):
        photo.save(io.BytesIO(), "DFC", codec="jpeg", bpp=0.1)
    with pytest.raises(ValueError, match="exactly one of target_bpp"):
        photo.save(io.BytesIO(), "DFC")
    pil.register(DiffCPipeline.from_pretrained(tiny_sd_folders["v_prediction"]))
    with pytest.raises(WrongModel):
        Image.open(io.BytesIO(data)).load()
    monkeypatch.delitem(pil.registered, "diffc")
    with pytest.raises(ValueError, match="needs a diffc pipeline; registered: relic"):
        Image.open(io.BytesIO(data)).load()


def test_nothing_is_registered_by_importing():
    program = "import diffusers_compress.pil; from PIL import Image; print('.dfc' in Image.registered_extensions())"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
