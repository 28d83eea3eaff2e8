"""The scripts that make RESULTS.md and the example's curves, each run once on a small picture and a tiny model."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(photo, tmp_path):
    (tmp_path / "pictures").mkdir()
    photo.save(tmp_path / "pictures" / "photo.png")
    return tmp_path / "pictures"


def script(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_results_md(folder, tmp_path, tiny_sd_folder, monkeypatch):
    results = script(ROOT / "benchmarks" / "results.py")
    monkeypatch.setattr(results, "embedded_model", lambda *_: tiny_sd_folder)
    monkeypatch.setattr(
        results, "MEASURED", [(["diffc", "diffc:decode.realism=0"], [0.2, 0.4]), (list(results.BASELINES), [0.4])]
    )
    monkeypatch.setattr(results, "METRICS", ("psnr",))
    words = [folder, folder, "--work", tmp_path / "work", "--out", tmp_path / "RESULTS.md", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["results.py", *map(str, words)])
    results.main()
    text = (tmp_path / "RESULTS.md").read_text()
    measured, published = text.split("## What others published (not measured here, large models)")
    assert len(re.findall(r"^\| diffc \| 0\.[24] \| 0\.\d+ \| none \|", measured, re.MULTILINE)) == 2 * 2
    assert "| jpeg | 0.4 |" in measured and "Of the 4 files of our codecs 0 exceed their target" in measured
    assert published.count("\n| ") == 2 + len(results.PEERS)
    assert str(tmp_path) not in text
    assert (tmp_path / "work" / "kodak" / "report.html").exists()


def test_rd_curve(folder, tmp_path, tiny_sd_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rd_curve.py", str(folder), "--model", tiny_sd_folder, "--out", str(tmp_path / "curves")])
    script(ROOT / "examples" / "rd_curve.py").main()
    assert (tmp_path / "curves" / "plots" / "psnr.svg").exists()
    assert "| avif | 0.2 |" in capsys.readouterr().out
