"""What users of diffusers expect of any pipeline: callbacks, progress, offloading, tiling, attention, schedulers, batches, types."""

import doctest
import inspect

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.models.attention_processor import AttnProcessor

import diffusers_compress
from diffusers_compress import DiffCPipeline, RelicPipeline
from diffusers_compress.diffusion.schedule import from_scheduler
from diffusers_compress.diffusion.solvers import DDIM_SOLVERS, NATIVE_SOLVERS, REFUSED

CLASSES = {"diffc": DiffCPipeline, "relic": RelicPipeline}
FAST = {"diffc": {"num_coding_steps": 3}, "relic": {}}  # of `compress`
# Schedulers with the levels of Stable Diffusion under their own names
SHARE_THE_LEVELS = sorted((set(NATIVE_SOLVERS) | set(DDIM_SOLVERS) | set(REFUSED)) - {"CogVideoXDDIMScheduler"})


def load(codec, folder, **options):
    pipe = CLASSES[codec].from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=CLASSES)
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(codec, tiny_sd_folder):
    return load(codec, tiny_sd_folder)


@pytest.fixture(scope="module")
def coded(codec, pipe, photo):
    return pipe.compress(photo, max_bytes=100, **FAST[codec]).bitstreams[0]


@pytest.fixture(scope="module")
def decoded(pipe, coded):
    return picture(pipe, coded)


def picture(pipe, data):
    """[H, W, 3] in [0, 1]."""
    return pipe.decompress(data, output_type="np", num_inference_steps=3).images[0]


def assert_same(a, b):
    assert np.abs(a - b).max() < 1.01 / 255


# ------------------------------------------------------------------------------------------------------ callbacks, progress


def test_a_callback_sees_every_step_and_changes_nothing(codec, pipe, photo, coded, decoded):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, timestep, sorted(tensors), tensors["latents"].shape))
        tensors["latents"].zero_()
        return {"latents": torch.zeros(())}

    options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]}
    if codec == "diffc":
        assert pipe.compress(photo, max_bytes=100, **FAST[codec], **options).bitstreams[0] == coded
        assert [step for step, *_ in seen] == [0, 1] and seen[0][1] < 999  # without a call at pure noise
        seen.clear()
    assert_same(pipe.decompress(coded, output_type="np", num_inference_steps=3, **options).images[0], decoded)
    assert len(seen) == 2 + 3 if codec == "diffc" else len(seen) >= 1
    timesteps = [timestep for _, timestep, *_ in seen]
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(names == ["latents", "noise_pred"] and shape == (1, 4, 8, 12) for *_, names, shape in seen)
    seen.clear()
    picture(pipe, coded)
    assert seen == []  # only for that call
    pipe(photo, max_bytes=100, num_inference_steps=2, callback_on_step_end=look)
    assert {names[0] for *_, names, _ in seen} == {"latents"}


def test_diffusers_own_callbacks(pipe, coded):
    class Look(PipelineCallback):
        tensor_inputs = ["noise_pred"]
        names = None

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.names = list(callback_kwargs)
            return callback_kwargs

    look = Look(cutoff_step_ratio=1.0)
    pipe.decompress(coded, num_inference_steps=1, callback_on_step_end=look)
    assert look.names == ["noise_pred"]
    with pytest.raises(ValueError, match="latents.*noise_pred.*not.*image"):
        pipe.decompress(coded, callback_on_step_end=look.callback_fn, callback_on_step_end_tensor_inputs=["image"])


def test_both_ends_have_a_progress_bar(codec, tiny_sd_folder, photo, capsys):
    pipe = CLASSES[codec].from_pretrained(tiny_sd_folder)
    pipe.compress(photo, max_bytes=100, **FAST[codec])
    assert ("network calls: " if codec == "diffc" else "pictures: ") in capsys.readouterr().err
    pipe.set_progress_bar_config(desc="coding")
    data = pipe.compress(photo, max_bytes=100, **FAST[codec]).bitstreams[0]
    assert "coding" in capsys.readouterr().err
    pipe.set_progress_bar_config(desc="painting")
    pipe.decompress(data, num_inference_steps=1)
    assert "painting" in capsys.readouterr().err


def test_a_generator_for_each_picture(tiny_sd_folder, photo):
    pipe = load("diffc", tiny_sd_folder)
    data = pipe.compress(photo, max_bytes=60, num_coding_steps=2).bitstreams[0]
    options = {"reconstruction": "ancestral", "num_inference_steps": 3, "output_type": "np"}

    def draw(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe.decompress([data] * len(seeds), generator=generators, **options).images

    first, second = draw(1, 2)
    assert_same(second, draw(2)[0])
    assert np.abs(first - second).max() > 0.02
    generators = [torch.Generator().manual_seed(seed) for seed in (2, 1)]
    out = pipe(photo, max_bytes=60, num_coding_steps=2, num_images_per_prompt=2, generator=generators, **options)
    assert out.bitstreams == [data] and out.notes == [[], []]
    assert_same(out.images, np.stack([second, first]))
    with pytest.raises(ValueError, match="1 generators.*2 files"):
        pipe.decompress([data] * 2, generator=[torch.Generator()], **options)
    with pytest.raises(ValueError, match="2 generators.*1 files"):
        pipe.decompress(data, generator=[torch.Generator()] * 2, **options)


# ------------------------------------------------------------------------------------------------------- memory and speed


def test_sequential_offloading(codec, tiny_sd_folder, photo, coded, decoded):
    """As enable_sequential_cpu_offload does it, with the CPU in the GPU's place: weights are on the meta device between calls."""
    pipe = load(codec, tiny_sd_folder)
    for name in ("unet", "vae", "text_encoder"):
        accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    assert pipe.compress(photo, max_bytes=100, **FAST[codec]).bitstreams[0] == coded
    assert_same(picture(pipe, coded), decoded)
    assert next(pipe.unet.parameters()).is_meta


def test_model_offloading(codec, tiny_sd_folder, photo, coded, decoded):
    pipe = load(codec, tiny_sd_folder)
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.compress(photo, max_bytes=100, **FAST[codec]).bitstreams[0] == coded
    assert_same(picture(pipe, coded), decoded)


def test_tiling_and_slicing_of_the_autoencoder(codec, tiny_sd_folder, photo, coded, decoded):
    pipe = load(codec, tiny_sd_folder)
    pipe.vae.enable_slicing()
    assert_same(picture(pipe, coded), decoded)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 4
    tiled = pipe.compress(photo, max_bytes=100, **FAST[codec]).bitstreams[0]
    assert len(tiled) <= 100 and picture(pipe, tiled).shape == decoded.shape
    assert np.sqrt(np.mean((picture(pipe, coded) - decoded) ** 2)) < 0.25  # an untrained one sees the borders


def test_the_autoencoder_has_one_picture_at_a_time(codec, tiny_sd_folder, photo, monkeypatch):
    """Whatever the batch: it takes most of the memory."""
    pipe, seen = load(codec, tiny_sd_folder), []
    encode, decode = pipe.vae.encode, pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: seen.append(len(x)) or encode(x))
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **options: seen.append(len(z)) or decode(z, **options))
    files = pipe.compress([photo] * 3, max_bytes=100, **FAST[codec]).bitstreams
    pipe.decompress(files, num_inference_steps=1)
    assert seen == [1] * 6


def test_offloaded_models_go_although_a_call_failed(codec, tiny_sd_folder, photo, monkeypatch):
    pipe, freed = load(codec, tiny_sd_folder), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    with pytest.raises(ValueError, match="max_bytes"):
        pipe.compress(photo, max_bytes=-1)
    assert freed == [True]


def test_attention_processors(codec, tiny_sd_folder, coded, decoded):
    pipe = load(codec, tiny_sd_folder)
    pipe.unet.set_attn_processor(AttnProcessor())
    assert_same(picture(pipe, coded), decoded)
    pipe.enable_attention_slicing()
    assert_same(picture(pipe, coded), decoded)


# ----------------------------------------------------------------------------------------------------- batches, schedulers


def test_a_batch_is_its_pictures(codec, pipe, photo):
    """Files within their size, and each decodes in the batch as it does alone."""
    pictures = [photo, photo.rotate(180), photo.crop((0, 0, 40, 40))]
    alone = [pipe.compress(x, max_bytes=100, **FAST[codec]).bitstreams[0] for x in pictures]
    together = pipe.compress(pictures, max_bytes=100, **FAST[codec]).bitstreams
    assert all(len(data) <= len(single) + 2 and len(data) <= 100 for data, single in zip(together, alone))
    images = pipe.decompress(together, output_type="np", num_inference_steps=3).images
    for data, image in zip(together, images):
        assert_same(image, picture(pipe, data))


@pytest.mark.parametrize("name", SHARE_THE_LEVELS)
def test_any_scheduler_that_shares_the_levels(pipe, coded, decoded, name, monkeypatch):
    """A file decodes under another scheduler, or the scheduler says why not; the model's identity stays."""
    identity = pipe.fingerprint()
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, name).from_config(pipe.scheduler.config))
    if name.startswith("Flow"):
        with pytest.raises(ValueError, match=f"variance-preserving.*not {name}"):
            picture(pipe, coded)
        return
    assert pipe.fingerprint() == identity
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{name}.*cannot finish a picture: it "):
            picture(pipe, coded)
    else:
        found = picture(pipe, coded)
        assert np.isfinite(found).all() and np.sqrt(np.mean((found - decoded) ** 2)) < 0.25


def test_every_scheduler_of_diffusers_is_known_or_told(tiny_sd_folder):
    """Whatever diffusers ships either has levels, or says that it has none."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))]
    assert len(names) > 40
    for name in names:
        try:
            scheduler = getattr(diffusers, name)()
        except (TypeError, ImportError, ValueError):  # needs arguments, or another library
            continue
        if not hasattr(scheduler, "config"):
            continue
        try:
            noise = from_scheduler(scheduler)
        except ValueError as error:
            assert name in str(error)
        else:
            assert (noise.ratio.diff() < 0).all(), name


# ----------------------------------------------------------------------------------------------------------- docs and types


def test_examples_of_the_docstrings(codec):
    pipeline = CLASSES[codec]
    (example,) = [test for test in doctest.DocTestFinder(recurse=False).find(pipeline, "class", globs={}) if test.examples]
    assert doctest.DocTestRunner().run(example).failed == 0


def test_public_signatures_are_typed():
    from diffusers_compress import calibration, hub
    from diffusers_compress.diffusion import equations, families, schedule, solvers
    from diffusers_compress.diffusion.families import common
    from diffusers_compress.latent_pipeline import LatentCodecMixin
    from diffusers_compress.pipeline import CodecMixin

    public = [getattr(diffusers_compress, name) for name in diffusers_compress.__all__ if name.endswith("Pipeline")]
    functions = [f for pipeline in public for f in vars(pipeline).items()]
    functions += [f for mixin in (CodecMixin, LatentCodecMixin) for f in vars(mixin).items()]
    functions += [
        f for module in (calibration, common, equations, families, hub, schedule, solvers) for f in vars(module).items()
    ]
    untyped = []
    for name, function in functions:
        own = inspect.isfunction(function) and function.__module__.startswith("diffusers_compress")
        if own and (name == "__call__" or not name.startswith("_")):
            signature = inspect.signature(function)
            missing = [
                p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "options")
            ]
            if missing or signature.return_annotation is signature.empty:
                untyped.append((function.__qualname__, missing))
    assert untyped == []
