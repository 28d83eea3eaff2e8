"""examples/train_refine.py on a tiny model: it learns, goes on after a stop, and its adapter is what `RefinePipeline` takes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_compress import RefinePipeline, embedded_model


def test_it_trains_goes_on_and_loads(script, tiny_sd_folder, photo, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        photo.resize((96, 80)).rotate(90 * i, expand=True).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setattr(script, "HELD_OUT", 4)
    # by steps, not by time: a busy machine does few steps in a minute
    monkeypatch.setattr(script.Stage, "progress", property(lambda self: self.step / self.minutes))

    def run(output, steps, *more):
        own = ["train_refine.py", "--photos", tmp_path / "photos", "--output", tmp_path / output, "--minutes", steps]
        own += ["--model", tiny_sd_folder, "--latents", tmp_path / "latents.pt", "--draws", 2, "--bases", "jpeg", "webp"]
        own += ["--size", 64, "--batch", 2, "--lr", 3e-3, "--ema", 0.5, "--checkpoint-minutes", 0, "--width", 8]
        own += ["--estimator-minutes", 3, "--mixed-precision", "no", *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in own])
        script.main()
        return [json.loads(line) for line in (tmp_path / output / "log.jsonl").read_text().splitlines()]

    rows = run("run", 20, "--rank", 2)
    errors = [row["error at s = 0.5"] for row in rows if row["stage"] == "unet"]
    assert {row["stage"] for row in rows} == {"estimator", "unet"} and len(errors) >= 2 and errors[-1] < errors[0]
    pipe = RefinePipeline.from_pretrained(tmp_path / "run" / "adapter")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.form == "flow" and pipe.unet.config.in_channels == 12
    data = pipe.compress(photo, fidelity=0.1, base="webp").bitstreams[0]
    whole, late = (np.asarray(pipe.decompress(data, num_inference_steps=2, late_start=kappa).images[0]) for kappa in (None, 0.5))
    assert not np.array_equal(whole, late)
    with pytest.raises(ValueError, match="this one was trained to refine jpeg"):
        pipe.compress(photo, fidelity=0.1, base="relic")

    pipe.save_pretrained(tmp_path / "whole")
    again = RefinePipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    assert again.fingerprint() == pipe.fingerprint()
    assert np.array_equal(np.asarray(again.decompress(data, num_inference_steps=2).images[0]), whole)

    (tmp_path / "run" / "adapter").rename(tmp_path / "before")
    assert run("run", 22, "--rank", 2)[-1]["step"] > rows[-1]["step"]  # goes on
    rows = run("second", 2, "--rank", 2, "--form", "diffusion", "--start", tmp_path / "before", "--estimator-minutes", 0)
    assert {row["stage"] for row in rows} == {"unet"}
    rows = run("third", 2, "--rank", 2, "--start", tmp_path / "before", "--low-rates", 0.5)
    assert {row["stage"] for row in rows} == {"estimator", "unet"}
    assert RefinePipeline.from_pretrained(tmp_path / "second" / "adapter").config.form == "diffusion"


def test_it_starts_with_the_answer_of_independent_gaussians(script):
    """Of a `WienerUNet` whose UNet adds nothing yet, behind an estimator that knows no better than N(y, errors^2)."""
    from test_wiener_unet import latents, make

    unet = make()
    unet.fit(latents(10, 32, 32))
    args = script.argparse.Namespace(rank=2, whole="", start=None)
    unet = script.prepared_unet(script.argparse.Namespace(unet=unet), args).eval()
    assert unet.config.in_channels == 9 and unet.config.scaled
    x_0, d = latents(8, 32, 32), torch.tensor([0.5, 2.0]).repeat(4)
    y = x_0 + d[:, None, None, None] * torch.randn(x_0.shape)
    alpha, sigma = unet.levels(500, 8, "cpu")
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape)
    with torch.no_grad():
        seen = script.trained.seen_of(script.BaseEstimator(3, width=8), y, d[:, None].expand(8, 3))
        assert script.trained.deviations(seen) == pytest.approx(d.tolist())
        output = unet(torch.cat([x_t, seen], 1), 500, torch.randn(8, 5, 8), return_dict=False)[0]
    wrong = (alpha * x_t - sigma * output - x_0).square().mean((1, 2, 3))
    expected = 1 / (1 / d**2 + (alpha / sigma).squeeze() ** 2)  # both say x_0, each with noise of its own
    assert wrong.tolist() == pytest.approx(expected.tolist(), rel=0.1)


def test_another_codecs_adapter_is_refused():
    with pytest.raises(ValueError, match=r"names no form of flow, diffusion"):
        RefinePipeline.from_pretrained(Path(embedded_model("perco")) / "0.0019")
