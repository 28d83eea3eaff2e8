"""The scripts that make the embedded model: from pictures to a folder that codes, in seconds, and on from where they were killed."""

import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import DiffCPipeline, PerCoPipeline, RefinePipeline, RelicPipeline, TextSketchPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = (
    "--latent-channels 4 --unet-widths 16 16 32 --decoder-batch 2 --decoder-crop 32 --unet-batch 1 --unet-crop 64 "
    "--mixed-precision no"
).split()

SMALL = {
    "train_perco.py": "--crop 64 --batch 2",
    "train_sketch_controlnet.py": "--size 64 --batch 1",
    "train_refine.py": "--size 64 --batch 1 --draws 1",
    "train_student.py": "--size 64 --batch 1",
}


@pytest.fixture(scope="module")
def examples():
    """The modules train_common and train_embedded."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_common
        import train_embedded
    finally:
        sys.path.pop(0)
    return train_common, train_embedded


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photo):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        photo.rotate(180 * (i % 2)).resize((260 + 8 * i, 256), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_everything_is_made_anew_by_one_command(pictures, tmp_path, python, monkeypatch):
    """The finished folders load in their codecs, each with its own parts, and their files decode; and all goes on from them."""
    script = EXAMPLES / "retrain_embedded.py"

    def run(output, *options):
        options = ["--photos", pictures, "--output", output, *TINY, "--minutes", 0.1, "--perco-steps", 2, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in (script, *options)])
        runpy.run_path(str(script), run_name="__main__")
        return output / "embedded"

    monkeypatch.syspath_prepend(EXAMPLES)

    def run_small(command, **options):
        return python.run([*command, *SMALL.get(Path(command[1]).name, "").split()], **options)

    monkeypatch.setattr(subprocess, "run", run_small)  # the script runs one process after another
    embedded = run(tmp_path / "first")
    folder = embedded / "model"
    picture = Image.open(pictures / "0.png").crop((0, 0, 96, 64))
    for pipeline, parts in ((DiffCPipeline, ["variance_head"]), (RelicPipeline, ["hyperprior"])):
        pipe = pipeline.from_pretrained(folder)
        assert all(getattr(pipe, part) is not None for part in parts)
        assert {"error", "latent", "second_guess"} == pipe.config.calibration.keys()
        decoded = pipe.decompress(pipe.compress(picture, target_bpp=0.2).bitstreams, num_inference_steps=2)
        assert decoded.images[0].size == picture.size
    logs = [tmp_path / "first" / name / "log.jsonl" for name in ("model", "relic", "text_sketch", "refine", "student")]
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    stages = ["decoder", "unet", "texture", "hyperprior", "controlnet", "estimator", "unet", "student"]
    assert [stage for stage, _ in itertools.groupby(row["stage"] for row in rows)] == stages
    assert all(np.isfinite(row["loss"]) for row in rows)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    run(tmp_path / "first")  # finds all of it done
    assert weights.read_bytes() == before

    again = run(tmp_path / "second", "--start", embedded)
    assert weights.read_bytes() != (again / "model" / "unet" / weights.name).read_bytes()
    for pipeline, part, options in (
        (PerCoPipeline, "perco/0.0019", {}),
        (TextSketchPipeline, "text_sketch", {"prompt": ""}),
        (RefinePipeline, "refine", {"fidelity": 0.1}),
    ):
        pipe = pipeline.from_pretrained(again / part)
        decoded = pipe.decompress(pipe.compress(picture, **options).bitstreams, num_inference_steps=1)
        assert decoded.images[0].size == picture.size
    pipe = DiffCPipeline.from_pretrained(again / "model")
    decoded = pipe.decompress(
        pipe.compress(picture, target_bpp=0.2).bitstreams, finisher=str(again / "student"), num_inference_steps=1
    )
    assert decoded.images[0].size == picture.size

    options = [
        "--stages",
        "quantizer",
        "export",
        "--quantizer-minutes",
        "0.05",
        "--model",
        folder,
        "--latents",
        tmp_path / "first" / "latents.pt",
    ]
    python.run([EXAMPLES / "train_relic.py", "--photos", pictures, "--output", tmp_path / "network", *options], check=True)
    pipe = RelicPipeline.from_pretrained(tmp_path / "network" / "model")
    assert pipe.parameter_network is not None and pipe.hyperprior is not None
    assert pipe.decompress(pipe.compress(picture, target_bpp=0.5, rounding="dithered").bitstreams).images[0].size == picture.size


def test_a_killed_run_goes_on_from_its_checkpoint(examples, pictures, tmp_path, monkeypatch):
    """In the middle of a stage, then in the middle of the next, which does not take the one before it again."""
    common, script = examples
    options = ["--photos", pictures, "--output", tmp_path, *TINY, "--checkpoint-minutes", 0, "--stages", "decoder", "texture"]
    monkeypatch.setattr(sys, "argv", ["train_embedded.py", *map(str, options)])
    write_log, killed_at = common.Stage.write_log, []

    def killed(self, *figures):
        write_log(self, *figures)
        if self.step == 3 and self.name not in killed_at:
            killed_at.append(self.name)
            raise KeyboardInterrupt  # after the line of the log, before its checkpoint

    monkeypatch.setattr(common.Stage, "write_log", killed)
    # by steps, not by time: a busy machine does few steps in a hundredth of a minute
    monkeypatch.setattr(common.Stage, "progress", property(lambda self: self.step / 5))
    for name in ("decoder", "texture"):
        with pytest.raises(KeyboardInterrupt):
            script.main()
        assert killed_at[-1] == name and common.latest_checkpoint(tmp_path / "checkpoints" / name)[0] == 2
    script.main()

    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("decoder", "texture"):
        mine = [row for row in rows if row["stage"] == name]
        assert [row["step"] for row in mine] == list(range(1, len(mine) + 1))
        seconds = [row["seconds"] for row in mine]
        assert seconds == sorted(seconds) and common.latest_checkpoint(tmp_path / "checkpoints" / name)[0] == len(mine)
    assert (tmp_path / "parts" / "vae-textured").exists()


def test_windows_are_of_the_photos_at_several_scales(examples):
    """A ramp keeps its values, and its slope grows with the factor, up to what the smallest photo allows."""
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 150, 200)
    slopes = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = examples[0].batch_of_photos([ramp, ramp[:, :, :100]], 64, 16, (0.5, 4.0), generator)
        assert x.shape == (16, 3, 64, 64) and x.min() >= -1 and x.max() <= 199 / 127.5 - 1 + 1e-6
        slopes.append(127.5 * x.diff(dim=-1)[..., 16:48].mean().abs().item())
    assert 0.49 < min(slopes) < 0.7 and 1.5 < max(slopes) < 1.58


def test_the_autoencoder_starts_as_a_linear_transform(examples):
    """AutoencoderDC with the components in its weights gives what the components give, at sides of any multiple of 8."""
    photos = [torch.randint(256, (3, 64, 96), generator=torch.Generator().manual_seed(i), dtype=torch.uint8) for i in range(4)]
    components = examples[1].Components.measure(photos, 12, 0.25)
    vae = examples[1].make_vae(components, (0, 1, 1, 1))
    x = examples[0].to_model_range(photos[0][None, :, :40, :72])
    with torch.no_grad():
        z = vae.encode(x).latent
        assert torch.allclose(z, components.encode(x), atol=1e-4)
        assert torch.allclose(z, examples[1].Components.of(vae.encoder).encode(x), atol=1e-4)
        blocks = torch.einsum("kc,bchw->bkhw", components.synthesis, z) + components.mean[:, None, None]
        assert (vae.decode(z).sample - torch.nn.functional.pixel_shuffle(blocks, 8)).abs().max() < 0.02  # RMSNorm: nearly


def test_training_goes_on_from_a_finished_model(examples, pictures, tmp_path, monkeypatch):
    """Its encoder stays, its decoder and UNet are where the new run starts."""
    script = examples[1]
    options = ["--photos", pictures, "--output", tmp_path / "run", *TINY, "--unet-lr", 0, "--decoder-lr", 0]
    options += ["--unet-minutes", 0.001, "--decoder-minutes", 0.001, "--stages", "decoder", "unet"]
    monkeypatch.setattr(sys, "argv", ["train_embedded.py", *map(str, options)])
    components = script.Components.measure([torch.randint(256, (3, 64, 96), dtype=torch.uint8)], 4, 0.25)
    vae, unet = script.make_vae(components, (0, 1, 1, 1)), script.make_unet(script.parse_args())
    torch.nn.init.normal_(unet.conv_out.weight)
    vae.save_pretrained(tmp_path / "model" / "vae")
    unet.save_pretrained(tmp_path / "model" / "unet")
    sys.argv += ["--start", str(tmp_path / "model")]
    script.main()
    for name, before in (("vae", vae), ("unet", unet)):
        after = type(before).from_pretrained(tmp_path / "run" / "parts" / name)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(after.parameters(), before.parameters()))


def test_local_moments_tell_texture_from_blur(examples):
    x = torch.rand(1, 3, 64, 64)
    for moments, brighter, blurred in zip(
        *map(examples[0].local_moments, (x, x + 0.3, torch.nn.functional.avg_pool2d(x, 3, 1, 1)))
    ):
        assert torch.allclose(moments, brighter, atol=1e-5) and (blurred < 0.7 * moments).all()


def test_what_is_added_leaves_the_rest_of_a_folder_alone(examples, tiny_sd_folder, tmp_path):
    from diffusers_compress import VarianceHead
    from diffusers_compress.models.hyperprior import HyperPrior

    examples[0].add_parts(tiny_sd_folder, tmp_path / "a", {"error": None}, variance_head=VarianceHead(4))
    examples[0].add_parts(tmp_path / "a", tmp_path / "b", {"latent": {"mean": [0.0] * 4}}, hyperprior=HyperPrior(4))
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["variance_head"] == ["diffusers_compress", "VarianceHead"] and index["hyperprior"][1] == "HyperPrior"
    assert index["_calibration"] == {"error": None, "latent": {"mean": [0.0] * 4}}
    for path in Path(tiny_sd_folder).rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tiny_sd_folder)).read_bytes()
    assert DiffCPipeline.from_pretrained(tmp_path / "b").variance_head is not None
    assert RelicPipeline.from_pretrained(tmp_path / "b").hyperprior is not None


def test_principal_components_are_uncorrelated_and_complete(examples):
    """Falling in variance; 192 of them, orthonormal without a spread, hold all of a picture's variance."""
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 16, 16), (64, 64), mode="bicubic").clamp(0, 1)
    photos = list((255 * smooth).byte())
    components = examples[1].Components.measure(photos, 192, 0.0)
    x = torch.cat([examples[0].to_model_range(photo[None]) for photo in photos])
    covariance = torch.cov(components.encode(x).movedim(1, 0).flatten(1))
    variance = covariance.diagonal()
    assert (covariance - variance.diag()).abs().max() < 1e-3 and (variance.diff() < 1e-5).all()
    blocks = torch.nn.functional.pixel_unshuffle(x, 8).movedim(1, 0).flatten(1)
    assert torch.allclose(variance.sum(), torch.cov(blocks).diagonal().sum(), rtol=1e-4)
    spread = examples[1].Components.measure(photos, 192, 0.25)
    wanted = components.encode(x).std((0, 2, 3), correction=0)[:8] ** 1.25
    assert torch.allclose(spread.encode(x).std((0, 2, 3), correction=0)[:8], wanted, rtol=1e-2)
