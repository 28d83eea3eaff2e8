"""README.md tells the truth: its code runs as pasted, its links and pictures are there, its `pip install` lines install."""

import io
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from diffusers_compress.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODECS = ["diffc:decode.realism=0", "diffc", "avif"]  # in the columns of README's table


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["decoded"].size == names["image"].size
    assert 0 < len(names["data"]) <= 0.05 * 256 * 256 / 8


def test_the_tutorial_runs(tmp_path, monkeypatch, photo, capsys):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.jpg")
    code = "".join(blocks("python", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")))
    exec(compile(code, "tutorial.md", "exec"), {})
    assert "steps, made with model" in capsys.readouterr().out
    assert {"natural.png", "closest.png", "coarse.png", "relic.png"} <= {path.name for path in tmp_path.iterdir()}


def test_commands_run(tmp_path, monkeypatch, photo, capsys):
    """All but those that install, which `.ci/run` and the next test run, and the demo, which tests/test_cli.py runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in ("photo.jpg", "photos/1.jpg"):
        photo.resize((144, 96)).save(path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("diffusers-compress ")]
    assert {command[1] for command in commands} >= {"encode", "decode", "info", "batch", "eval"}
    for _, *words in commands:
        if words[0] not in ("demo", "app"):
            assert main(words) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "coded" / "1.dfc").exists() and (tmp_path / "report" / "report.html").exists()


@pytest.mark.slow
def test_a_git_url_installs(tmp_path):
    """What pip builds from a clone is the package, with its model and its command."""
    assert "pip install git+URL" in README
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as clone:  # of all commits pip would fetch 200 MB
        clone.extractall(tmp_path / "clone", filter="data")
    options = ["--quiet", "--no-deps", "--no-compile", "--no-build-isolation", "--target", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, tmp_path / "clone"], check=True)
    site = tmp_path / "diffusers_compress"
    assert (site / "embedded/model/model_index.json").exists() and (site / "pipelines/diffc.py").exists()
    assert (tmp_path / "bin" / "diffusers-compress").exists()


def test_the_figures_are_those_of_the_results():
    """README's table is a part of the first in RESULTS.md, rounded."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()]
    head = next(line for line in lines if line[0] == "codec")
    columns = [head.index("PSNR, dB"), next(i for i, name in enumerate(head) if name.startswith("Wasserstein"))]
    found = {
        tuple(line[:2]): [float(line[i]) for i in columns] for line in lines[::-1] if len(line) == len(head) and line[0] in CODECS
    }
    rows = re.findall(r"^\| ([\d.]+) \| (.+) \| (.+) \| (.+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for bpp, *cells in rows:
        for codec, cell in zip(CODECS, cells):
            assert cell == "–" or cell == "{:.2f} / {:.0f}".format(*found[codec, bpp]), (codec, bpp)


def test_links_and_pictures_are_there():
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README)]
    assert [target for target in targets if not target.startswith("https://") and not (ROOT / target).exists()] == []
    assert len(README.splitlines()) <= 130


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    home, options, python = ((tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("index", "cli_options", "api"))
    assert '<a href="FORMAT.html">The .dfc file format, version 1</a>' in home and 'src="compare.jpg"' in home
    assert "in the format that the suffix of OUT says; PNG to stdout.</li>" in options  # nothing cut short
    assert 'id="pipelines.diffc.DiffCPipeline.compress"' in python


def test_the_site_has_every_page():
    named = re.findall(r"^ +- (?:[\w+]+: )?(\w+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    made = {"index", "cli_options"} | {path.stem for path in ROOT.glob("*.md")} - {"README"}
    assert sorted(named) == sorted(made | {path.stem for path in (ROOT / "docs").glob("*.md")})


def test_the_drawings_are_what_the_code_draws(tmp_path):
    figures = runpy.run_path(str(ROOT / "docs/figures.py"))
    figures["write_svg"].__globals__["DOCS"] = tmp_path
    for codec, columns in figures["FLOWS"].items():
        figures["flow"](codec, *columns)
        name = f"{codec}_flow.svg"
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")  # noqa: S314 - our own files
