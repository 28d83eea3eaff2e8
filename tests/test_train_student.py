"""examples/train_student.py on a tiny model: it trains, goes on, and its result is a finisher of one call."""

import json
import sys

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from diffusers_compress import DiffCPipeline
from diffusers_compress.diffusion.finishers import finisher_of
from diffusers_compress.metrics.wasserstein import wasserstein_distortion


def test_it_trains_goes_on_and_loads(script, tiny_sd_folder, photo, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        photo.resize((96, 80)).rotate(90 * i, expand=True).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setattr(script, "HELD_OUT", 1)
    # by steps, not by time: a busy machine does few steps in a minute
    monkeypatch.setattr(script.Stage, "progress", property(lambda self: self.step / self.args.minutes))

    def run(steps):
        own = [
            "train_student.py",
            "--photos",
            tmp_path / "photos",
            "--output",
            tmp_path / "run",
            "--minutes",
            steps,
            "--rank",
            2,
        ]
        own += ["--model", tiny_sd_folder, "--latents", tmp_path / "latents.pt", "--size", 64, "--batch", 2, "--ema", 0.5]
        own += ["--checkpoint-minutes", 0, "--mixed-precision", "no"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in own])
        script.main()
        return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]

    rows = run(2)
    assert len(rows) == 2 and all(np.isfinite([*row.values()][1:]).all() for row in rows)
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    student = finisher_of(pipe, str(tmp_path / "run" / "student"))
    assert type(student.pipe.scheduler).__name__ == "TCDScheduler"
    first, last = student.timesteps[0], student.timesteps[-1]
    assert student.timesteps == list(range(first, last + 1)) and 0 < first < last < 999
    ratio = pipe.noise_schedule().ratio
    assert float(ratio[last]) == pytest.approx(0.35, rel=0.02) and float(ratio[first]) == pytest.approx(6, rel=0.1)
    data = pipe.compress(photo, max_bytes=300).bitstreams[0]
    plain, finished = (
        np.asarray(pipe.decompress(data, num_inference_steps=1, finisher=finisher).images[0])
        for finisher in (None, str(tmp_path / "run" / "student"))
    )
    assert not np.array_equal(plain, finished)

    (tmp_path / "run" / "student").rename(tmp_path / "before")
    assert run(3)[-1]["step"] > rows[-1]["step"]

    unet = script.with_lora(pipe.unet, 2, tmp_path / "before")
    before = load_file(tmp_path / "before" / "pytorch_lora_weights.safetensors")
    again = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name].half()) for name in before)


def test_the_loss_is_the_metric(script):
    """Wasserstein distortion and squared error as `metrics` have them, and a gradient where there is no texture."""
    x, x_hat = torch.rand(2, 2, 3, 64, 64).mul(2).sub(1).unbind()
    texture, error = script.distortions(x, x_hat)
    for i in range(2):
        a, b = (255 / 2 * (pictures[i] + 1) / 255 for pictures in (x, x_hat))
        assert float(texture[i]) * 127.5**2 == pytest.approx(wasserstein_distortion(a, b), rel=1e-3)
        assert float(error[i]) == pytest.approx(float((x[i] - x_hat[i]).square().mean()), rel=1e-4)
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    script.distortions(x[:1], flat)[0].sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.any()
