"""The command `batch` with a tiny random model."""

import threading

import numpy as np
import pytest
from batch_tools import tree
from PIL import Image

from diffusers_compress import cli, contract
from diffusers_compress.cli import terminal
from diffusers_compress.cli.batch import SOME_FAILED
from diffusers_compress.cli.options import named_value
from diffusers_compress.cli.terminal import progress


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """However slow this machine is now."""
    monkeypatch.setattr(terminal, "INTERVAL", 1e6)


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        photo.crop((i, i, 64 + i, 48 + i)).save(folder / f"{i}.png")
    return folder


def run(*arguments):
    return cli.main(["batch", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("codec", ["diffc", "relic"])
def test_the_command_is_the_pipelines_compress_and_decompress(photos, tiny_sd_folder, tmp_path, capsys, codec):
    model = ["--model", tiny_sd_folder, "--codec", codec]
    assert run(photos, tmp_path / "coded", "--max-bytes", 120, *model) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'coded'}: 3 of 3 pictures, ") and err == ""
    pipe = contract.CODECS[codec].pipeline_class().from_pretrained(tiny_sd_folder)
    expected = pipe.compress([Image.open(photos / f"{i}.png") for i in range(3)], max_bytes=120).bitstreams
    assert tree(tmp_path / "coded") == {f"{i}.dfc": data for i, data in enumerate(expected)}

    assert run(tmp_path / "coded", tmp_path / "decoded", "--decode", "--option", "num_inference_steps=2", *model) == 0
    pictures = pipe.decompress(expected, num_inference_steps=2).images
    for i, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "decoded" / f"{i}.png")), np.asarray(picture))


def test_lossless_files_come_back_bit_by_bit(photos, tiny_sd_folder, tmp_path, capsys):
    model = ["--model", tiny_sd_folder, "--codec", "relic"]
    assert run(photos, tmp_path / "coded", "--max-bytes", 120, "--lossless", *model) == 0
    assert run(tmp_path / "coded", tmp_path / "decoded", "--decode", *model) == 0
    for i in range(3):
        a, b = (np.asarray(Image.open(folder / f"{i}.png")) for folder in (photos, tmp_path / "decoded"))
        assert np.array_equal(a, b)
    assert run(tmp_path / "coded", tmp_path / "again", "--decode", "--lossless", *model) == 2
    assert "--lossless: relic has no such option in decoding" in capsys.readouterr().err


def test_the_exit_status_tells_of_partial_failure(photos, tiny_sd_folder, tmp_path, capsys):
    (tmp_path / "list").write_text(f"{photos}/0.png\n{photos}/none.png\n")
    assert run(tmp_path / "list", tmp_path / "out", "--max-bytes", 120, "--model", tiny_sd_folder) == SOME_FAILED
    out, err = capsys.readouterr()
    assert "1 of 2 pictures" in out
    assert "none.png: FileNotFoundError" in err


def test_the_command_refuses_before_it_works(photos, tmp_path, capsys):
    assert run(photos, tmp_path / "out") == 2
    assert "--bpp" in capsys.readouterr().err
    assert run(photos, tmp_path / "out", "--bpp", 1, "--option", "colour=blue") == 2
    assert "--option colour: diffc" in capsys.readouterr().err
    assert run(photos, tmp_path / "out", "--bpp", 1, "--option", "colour") == 2
    assert "NAME=VALUE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_option_is_a_number_where_it_reads_as_one():
    assert list(map(named_value, ["a=5", "b=0.5", "c=True", "d=flow", "e=x=y", "f="])) == [
        ("a", 5),
        ("b", 0.5),
        ("c", True),
        ("d", "flow"),
        ("e", "x=y"),
        ("f", ""),
    ]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "INTERVAL", 0.01)
    said = threading.Event()
    complain = terminal.complain
    monkeypatch.setattr(
        terminal, "complain", lambda line: (complain(line), said.set() if line.startswith("coding: 6 of 8") else None)
    )
    with progress("coding") as show:
        show(6, 8)
        assert said.wait(60)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("coding: 6 of 8, ") and " s left" in line for line in lines)
