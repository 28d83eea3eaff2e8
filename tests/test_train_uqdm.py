"""examples/train_uqdm.py on a tiny network: its loss is what files take, it learns, and its result loads and codes."""

import json
import sys

import numpy as np
import pytest
import torch
from golden import make

from diffusers_compress import UQDMPipeline
from diffusers_compress.codecs.uqdm import loop
from diffusers_compress.codecs.uqdm.format import read_file
from diffusers_compress.weights import portable

SMALL = "--size 16 --scales 1 2 --batch 1 --lr 5e-3 --warm-up 1 --ema 0.5 --widths 8 --patch 2 --preconditioned".split()


def test_the_loss_is_the_size_of_files(script, photo):
    """Of a network that was never trained, within what one picture's noise and the tables make of it."""
    pipe = make.pipeline("uqdm", "v_prediction")
    image = photo.crop((0, 0, 16, 16))
    _, _, sections, _ = read_file(pipe.compress(image).bitstreams[0])
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    x = loop.samples(pixels / 127.5 - 1)[None].expand(64, -1, -1, -1)
    for section, t in zip(sections, (4, 3, 2, 1)):
        with torch.no_grad():
            bits = script.bits_of_steps(portable(pipe.network), pipe.scheduler, x, [t] * 64, torch.Generator().manual_seed(0))
        assert 8 * len(section) / 768 == pytest.approx(float(bits.mean()), rel=0.05, abs=5 * float(bits.std()))


def test_it_learns_goes_on_and_its_result_codes(script, photo, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        photo.rotate(90 * i, expand=True).save(tmp_path / "photos" / f"{i}.png")

    def run(minutes):
        words = ["train_uqdm.py", "--photos", tmp_path / "photos", "--output", tmp_path / "run", "--minutes", minutes, *SMALL]
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--checkpoint-minutes", str(minutes / 3)])
        script.main()
        return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]

    rows = run(0.1)
    assert rows[-1]["bits"] < rows[0]["bits"] and len(rows) >= 2
    steps = rows[-1]["step"]
    pipe = UQDMPipeline.from_pretrained(tmp_path / "run" / "model")
    assert np.array_equal(np.asarray(pipe(photo, lossless=True).images[0]), np.asarray(photo))
    half = UQDMPipeline.from_pretrained(tmp_path / "run" / "model", dtype=torch.float16)
    assert half.compress(photo).bitstreams == pipe.compress(photo).bitstreams  # its numbers are those of float16
    for done in (tmp_path / "run" / "network", tmp_path / "run" / "model"):
        done.rename(done.with_name(done.name + "-before"))
    assert run(0.12)[-1]["step"] > steps
