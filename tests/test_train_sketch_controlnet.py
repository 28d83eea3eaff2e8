"""examples/train_sketch_controlnet.py on a tiny model: it starts without effect, goes on, and its result is what the pipeline takes."""

import json
import sys

import numpy as np
import torch

from diffusers_compress import TextSketchPipeline
from diffusers_compress.codecs import describe


def test_it_trains_goes_on_and_loads(script, tiny_sd_folder, photo, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        photo.resize((96, 80)).rotate(90 * i, expand=True).save(tmp_path / "photos" / f"{i}.png")

    monkeypatch.setattr(script, "HELD_OUT", 1)

    def run(output, minutes, *more):
        own = ["train_sketch_controlnet.py", "--photos", tmp_path / "photos", "--output", tmp_path / output, "--minutes", minutes]
        own += ["--model", tiny_sd_folder, "--latents", tmp_path / "latents.pt", "--size", 64, "--batch", 2, "--ema", 0.5]
        own += ["--embedding", 4, 4, 4, 8, "--checkpoint-minutes", minutes / 3, "--mixed-precision", "no", *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in own])
        script.main()
        return [json.loads(line) for line in (tmp_path / output / "log.jsonl").read_text().splitlines()]

    rows = run("run", 0.05)
    assert len(rows) >= 2 and all(0.5 < row["at 0.6"] < 1.5 for row in rows)
    pipe = TextSketchPipeline.from_pretrained(tmp_path / "run" / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.controlnet.dtype == torch.float32 and pipe.controlnet.config.conditioning_channels == 4
    data = pipe.compress(photo, threshold=0.1).bitstreams[0]
    assert describe(data)["sketch"] == [64, 96]
    seen, blind = (
        np.asarray(pipe.decompress(data, num_inference_steps=2, controlnet_conditioning_scale=scale).images[0])
        for scale in (1.0, 0.0)
    )
    assert not np.array_equal(seen, blind)

    (tmp_path / "run" / "model").rename(tmp_path / "before")
    assert run("run", 0.06)[-1]["step"] > rows[-1]["step"]
    run("second", 0.01, "--start", tmp_path / "before" / "controlnet")


def test_it_starts_without_effect_and_with_the_unets_weights(script, tiny_sd_folder):
    pipe = TextSketchPipeline.from_pretrained(tiny_sd_folder)
    controlnet = script.make_controlnet(pipe.unet, (4, 4, 4, 8))
    image = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = pipe.encode_prompt([[]])["text"]
        down, middle = controlnet(torch.randn(1, 4, 8, 8), torch.tensor([500]), text, image, return_dict=False)
    assert all(not features.any() for features in (*down, middle))
    assert torch.equal(controlnet.down_blocks[1].resnets[0].conv1.weight, pipe.unet.down_blocks[1].resnets[0].conv1.weight)
    assert controlnet.controlnet_cond_embedding(image).abs().mean() > 1e-3
