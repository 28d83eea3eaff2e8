"""Nothing that a program sets globally changes bytes, and nothing global is changed by us."""

import io
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import make
from test_perco import make as perco

from diffusers_compress import DiffCPipeline, HyperPrior, RefinePipeline, RelicPipeline, embedded_model
from diffusers_compress.contract import CODECS

ROOT = Path(__file__).parents[1]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def set_by(setter, value, after):
    setter(value)
    try:
        yield
    finally:
        setter(after)


@contextmanager
def other_settings():
    """Those that have changed nothing so far, all at once."""
    with ExitStack() as stack:
        stack.enter_context(set_by(torch.use_deterministic_algorithms, True, False))
        stack.enter_context(set_by(torch.set_num_threads, 2, torch.get_num_threads()))
        stack.enter_context(set_by(torch.set_flush_denormal, True, False))
        stack.enter_context(set_by(torch.manual_seed, 1, 0))
        stack.enter_context(np.errstate(all="raise"))
        stack.enter_context(torch.enable_grad())
        yield


SETTINGS = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),  # nothing comes of what is made there
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "two threads, determinism, and others": other_settings,
}


def hyperprior():
    torch.manual_seed(0)
    prior = HyperPrior(latent_channels=4, hidden=16)
    prior.settle()
    return prior


@pytest.fixture(scope="module")
def photo(photo):
    return photo.crop((30, 20, 78, 52))


@pytest.fixture(scope="module")
def pipes(tiny_sd_folder):
    found = {
        "diffc": DiffCPipeline.from_pretrained(tiny_sd_folder),
        "relic": RelicPipeline.from_pretrained(tiny_sd_folder, hyperprior=hyperprior()),
        "perco": perco(tiny_sd_folder),
        "uqdm": make.pipeline("uqdm", "epsilon"),
        "cdc": make.pipeline("cdc", "epsilon"),
        "text-sketch": make.pipeline("text-sketch", "epsilon"),
        "refine": RefinePipeline.from_pretrained(tiny_sd_folder),
        "embedded": DiffCPipeline.from_pretrained(embedded_model()),
    }
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


CASES = {  # name: (pipeline, options of compress, of decompress). A codec's own name stands for it with threads and processes
    "diffc": ("diffc", {"max_bytes": 120, "num_coding_steps": 3, "prompt": "abc"}, {"num_inference_steps": 2}),
    "diffc, fidelity": ("diffc", {"fidelity": 0.4, "num_coding_steps": 3}, {"reconstruction": "denoised"}),
    "diffc, checked": ("diffc", {"max_bytes": 2000, "num_coding_steps": 3}, {"reconstruction": "denoised"}),
    "diffc, trellis32": ("diffc", {"max_bytes": 40, "num_coding_steps": 2, "coder": "trellis32"}, {"reconstruction": "denoised"}),
    "diffc, poisson": ("diffc", {"max_bytes": 30, "num_coding_steps": 2, "coder": "poisson"}, {"reconstruction": "denoised"}),
    "relic": ("relic", {"max_bytes": 120, "prompt": "abc"}, {"num_inference_steps": 2, "realism": 0.5}),
    "relic, adaptive": (
        "relic",
        {"max_bytes": 120, "entropy_model": "adaptive", "rounding": "plain"},
        {"num_inference_steps": 1},
    ),
    "embedded model": ("embedded", {"max_bytes": 60, "num_coding_steps": 3}, {"reconstruction": "denoised"}),
    "perco": ("perco", {"prompt": "abc"}, {"num_inference_steps": 2}),
    "uqdm": ("uqdm", {"num_coding_steps": 2}, {"num_inference_steps": 2}),
    "uqdm, lossless": ("uqdm", {"lossless": True}, {}),
    "refine": ("refine", {"fidelity": 0.2, "prompt": "abc"}, {"num_inference_steps": 2}),
    "cdc": ("cdc", {"max_bytes": 300}, {"num_inference_steps": 2}),
    "text-sketch": ("text-sketch", {"prompt": "a house", "threshold": 0.1}, {"num_inference_steps": 2}),
}


def round_trip(pipes, case, photo):
    """(file, picture)"""
    codec, options, decoding = CASES[case]
    data = pipes[codec].compress(photo, **options).bitstreams[0]
    vars(pipes[codec]).pop("_refined", None)  # or Refine would give the picture of the call before
    return data, np.asarray(pipes[codec].decompress(data, **decoding).images[0]).astype(int)


def forget():
    """Empty the caches of our modules, lest a table be left that was made under another setting."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers_compress"):
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()


@pytest.fixture(scope="module")
def expected(pipes, photo):
    return {case: round_trip(pipes, case, photo) for case in CASES}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_settings_change_nothing(pipes, expected, photo, case, setting):
    forget()
    with SETTINGS[setting]():
        data, picture = round_trip(pipes, case, photo)
    forget()
    assert data == expected[case][0]
    assert np.abs(picture - expected[case][1]).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_the_default_dtype_does_not_matter_to_files_of_other_programs(pipes, photo, kind):
    buffer = io.BytesIO()
    photo.save(buffer, kind, quality=30)
    pictures = []
    for dtype in (torch.float32, torch.float64, torch.float16):
        vars(pipes["refine"]).pop("_refined", None)
        with default_dtype(dtype):
            pictures.append(np.asarray(pipes["refine"].refine(buffer.getvalue(), num_inference_steps=2).images[0]).astype(int))
    assert max(np.abs(picture - pictures[0]).max() for picture in pictures) <= 1


def states():
    return torch.get_rng_state().tolist(), [np.asarray(part).tolist() for part in np.random.get_state()], random.getstate()


@pytest.mark.parametrize("case", CASES)
def test_no_global_generator_is_advanced(pipes, photo, case):
    before, settings = states(), (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    round_trip(pipes, case, photo)
    assert states() == before
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == settings


@pytest.mark.parametrize("case", CODECS)
def test_threads_share_a_pipeline(pipes, expected, photo, case):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: round_trip(pipes, case, photo), range(4)))
    for data, picture in results:
        assert data == expected[case][0]
        assert np.abs(picture - expected[case][1]).max() <= 1


PROGRAM = """
import json, sys
from PIL import Image
from diffusers_compress.contract import CODECS

found = {}
for codec, options in json.loads(sys.argv[1]).items():
    pipe = CODECS[codec].pipeline_class().from_pretrained(codec)
    pipe.set_progress_bar_config(disable=True)
    found[codec] = pipe.compress(Image.open("photo.png"), **options).bitstreams[0].hex()
print(json.dumps(found))
"""


def test_two_processes_share_a_folder(pipes, expected, photo, tmp_path, python):
    photo.save(tmp_path / "photo.png")
    for codec in CODECS:
        pipes[codec].save_pretrained(tmp_path / codec)
    options = json.dumps({codec: CASES[codec][1] for codec in CODECS})
    running = [python.start(["-c", PROGRAM, options], cwd=tmp_path) for _ in range(2)]
    found = [json.loads(process.communicate()[0]) for process in running]
    assert found == [{codec: expected[codec][0].hex() for codec in CODECS}] * 2
