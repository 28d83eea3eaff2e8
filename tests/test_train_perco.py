"""examples/train_perco.py on a tiny model: it learns, goes on where it was killed, and its result loads."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_compress import PerCoPipeline

SMALL = (
    "--crop 64 --batch 2 --width 16 --features 8 --codebook-dim 4 --warm-up 1 --validation 1 --lr 1e-3 --hyper-lr 1e-3".split()
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photo):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        photo.rotate(90 * i, expand=True).resize((80 + i, 70)).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a house\n")
    return folder


@pytest.fixture
def train(script, pictures, tiny_sd_folders, monkeypatch):
    def run(output, *options, steps=6, source=pictures):
        model = tiny_sd_folders["v_prediction"]
        command = [
            "train_perco.py",
            "--pictures",
            source,
            "--model",
            model,
            "--output",
            output,
            "--steps",
            steps,
            *SMALL,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        script.main()
        return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]

    return run


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_training_starts_from_an_adapter(script, train, tmp_path, monkeypatch):
    """Hyper-encoder, low-rank and whole tensors are those of the adapter before the first step."""
    options = ["--rank", 2, "--sketch-weight", 1, "--whole", "conv_out", "--ema", 0.0]
    train(tmp_path / "first", *options, "--preset", "0.1250", steps=2)
    train(tmp_path / "second", *options, "--start", tmp_path / "first" / "adapter", "--lr", 0, "--hyper-lr", 0, steps=1)
    for part in ("unet_changes.safetensors", "hyper_encoder/diffusion_pytorch_model.safetensors"):
        first, second = (load_file(tmp_path / run / "adapter" / part) for run in ("first", "second"))
        assert first.keys() == second.keys()
        learned = first.keys() - {"frequency", "usage", "places"}  # these are measured anew
        assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in learned)


def test_a_killed_run_goes_on_with_the_very_same_losses(script, train, tmp_path, monkeypatch):
    """Crops, noise and weights at each step are those of a run that was not killed, two steps after its last checkpoint."""
    options = ["--checkpoint-every", 3, "--sketch-steps", 1, "--rank", 2, "--schedule", "cosine", "--sketch-weight", 1]
    straight = train(tmp_path / "straight", *options)
    losses = script.Training.losses

    def killed(self, trainee, step, *batch):
        if step == 5:
            raise KeyboardInterrupt
        return losses(self, trainee, step, *batch)

    monkeypatch.setattr(script.Training, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", *options)
    monkeypatch.setattr(script.Training, "losses", losses)
    resumed = train(tmp_path / "killed", *options)

    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    assert without_time(resumed) == without_time(straight)
    for name in ("unet_changes.safetensors", "hyper_encoder/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "straight" / "adapter" / name).read_bytes() == (tmp_path / "killed" / "adapter" / name).read_bytes()
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_that_was_not_finished_is_passed_over(script, tmp_path):
    for step, complete in ((3, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert script.latest_checkpoint(tmp_path) == (3, tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "options", [[], ["--rank", 2, "--whole", "down_blocks.0"], ["--rank", 0, "--preset", "0.0019", "--sigmas", 0.3, 2000]]
)
def test_what_was_trained_loads_as_adapter_and_whole(train, tmp_path, photo, options):
    train(tmp_path, "--whole-pipeline", "--ema", 0.5, "--timestep-grid", 50, *options, steps=3)
    assert Image.open(tmp_path / "validation" / "3.png").size == (
        64,
        128,
    )  # one held-out crop, above what is painted from its grid
    small, whole = (PerCoPipeline.from_pretrained(tmp_path / name) for name in ("adapter", "model"))
    assert type(small.unet).__name__ == "UNet2DConditionModel" and small.unet.config.in_channels == 4 + 8
    for name, tensor in small.unet.state_dict().items():
        assert torch.allclose(tensor, whole.unet.state_dict()[name], atol=2e-3), name
    data = small.compress(photo).bitstreams[0]
    assert small.decompress(data, num_inference_steps=1).images[0].size == photo.size


@pytest.mark.parametrize("searched", [[], ["--searched"]])
def test_it_learns(searched, train, tmp_path):
    """On one picture the estimate from the grid gets better, and codes come into use."""
    options = ["--sketch-steps", 40, "--batch", 4, "--validate-every", 40, "--cache", tmp_path / "latents.pt", *searched]
    rows = train(tmp_path, *options, steps=40)
    first, last = (np.mean([row["estimate"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.9 * first and "estimate_held_out" in rows[-1]
    assert searched or rows[-1]["perplexity"] > 2


def test_captions_and_perceptual_loss_come_in(script, train, tmp_path, pictures, monkeypatch):
    """With a stand-in for the network of LPIPS, whose weights would be fetched."""
    seen = []
    encode_prompt = PerCoPipeline.encode_prompt
    monkeypatch.setattr(PerCoPipeline, "encode_prompt", lambda self, texts: seen.extend(texts) or encode_prompt(self, texts))

    class Stand(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            assert net == "vgg"

        def forward(self, x, y):
            return (x - y).abs().mean()

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Stand)
    (tmp_path / "captions.json").write_text(json.dumps({"1.png": "a hill", "2.png": "clouds"}))
    options = ["--captions", tmp_path / "captions.json", "--caption-drop", 0.2, "--lpips-weight", 0.1, "--batch", 8]
    rows = train(tmp_path / "run", *options, steps=3)
    assert all(0 < row["lpips"] < 2 for row in rows)
    assert {"a house", "a hill", "clouds", ""} == set(seen)


def test_shards_serve_too(train, tmp_path, pictures):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(4):
            image = Image.open(pictures / f"{i}.png")
            writer.write({"__key__": str(i), "png": image.convert("RGB"), "txt": "a house"})
    rows = train(tmp_path / "run", steps=2, source=tmp_path / "a.tar")
    assert len(rows) == 2 and all(np.isfinite(row["prediction"]) for row in rows)


def test_too_few_pictures_are_named(train, tmp_path):
    with pytest.raises(ValueError, match="has 4 pictures that serve, of which --validation keeps 9"):
        train(tmp_path, "--validation", 9)
