"""examples/train_cdc.py on tiny networks: they start as a transform, a run goes on, and its result loads and codes."""

import json
import sys

import numpy as np
import pytest
import torch

from diffusers_compress import CDCPipeline

SMALL = (
    "--size 64 --scales 1 1 --batch 1 --lr 5e-3 --warm-up 1 --ema 0.5 --widths 16 24 24 --hyper-widths 8 8 4 --unet-widths 16 16 "
    "--context-channels 16 --levels 3"
).split()


@pytest.fixture
def photos(photo, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        photo.resize((96, 80)).rotate(90 * i, expand=True).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def words(photos, output, minutes, *more):
    own = ["train_cdc.py", "--photos", photos, "--output", output, "--minutes", minutes, "--checkpoint-minutes", minutes / 3]
    return [*map(str, own), "--mixed-precision", "no", *SMALL, *more]  # accelerate knows one precision a process


def test_it_starts_as_the_best_linear_transform(script, monkeypatch):
    """Of windows with fewer dimensions than it has channels the latent says all, and in the same units."""
    monkeypatch.setattr(sys, "argv", words("p", "o", 1))
    args = script.parse_args()
    context_model, unet = script.networks(args)
    x = torch.randn(8, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)  # 12 dimensions in 16 x 16 pixels
    script.start_from_components(context_model, unet, x, args.betas)
    for module in context_model.modules():
        if hasattr(module, "norm2"):
            module.norm2.weight.data.zero_()
    rate = torch.tensor([0.0, 1.0] * 4)
    with torch.no_grad():
        y, _ = context_model.analyse(x, rate)
        x_hat = context_model.preview(context_model.synthesise(y, rate))
        energy = (y / context_model.gain(rate)).square().sum()
    assert (x_hat - x).abs().max() < 1e-3
    assert float(energy) == pytest.approx(float(x.square().sum()), rel=1e-3)


def test_it_goes_on_and_its_result_codes(script, photos, photo, tmp_path, monkeypatch):
    def run(minutes):
        monkeypatch.setattr(sys, "argv", words(photos, tmp_path / "run", minutes))
        script.main()
        return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]

    rows = run(0.1)
    assert rows[-1]["rate 0.0"]["bpp"] < rows[-1]["rate 1.0"]["bpp"]
    steps = rows[-1]["step"]
    pipe = CDCPipeline.from_pretrained(tmp_path / "run" / "model")
    small, large = (pipe(photo, fidelity=fidelity, preview=True) for fidelity in (0.01, 1.0))
    assert small.bpp < large.bpp and error(small.images[0], photo) > error(large.images[0], photo)
    # Another type of its weights changes no table
    other = CDCPipeline.from_pretrained(tmp_path / "run" / "model", dtype=torch.bfloat16)
    assert other.decompress(large.bitstreams[0], preview=True).images[0].size == photo.size
    (tmp_path / "run" / "model").rename(tmp_path / "before")
    assert run(0.12)[-1]["step"] > steps


def error(image, other):
    return np.square(np.asarray(image, dtype=float) - np.asarray(other)).mean()
