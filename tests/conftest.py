"""Fixtures that several tests share. Nothing is downloaded: every model is built here, small and random."""

import importlib
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in its background. Processes that the tests start would inherit it, and some tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: the workers share the processors

import hypothesis
import numpy as np
import pytest
import torch
from fork_server import ForkServer
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"

hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")


def pytest_xdist_auto_num_workers(config):
    """One for each processor, up to four, which is what memory allows; none for a single file."""
    single = len(config.args) == 1 and os.path.isfile(config.args[0].partition("::")[0])
    return 0 if single else min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # files with slow tests first, lest all wait for one of them in the end
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    """Tests that draw see the same numbers each time, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def python():
    """`python.run(["-c", ...])` is a second process, as `subprocess.run([sys.executable, "-c", ...])` is, but starts at once."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def script(request):
    """The script of `examples` that a test module is named after: test_train_cdc.py has train_cdc.py."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(request.module.__name__.removeprefix("test_"))
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="session")
def tiny_sd_folders(tmp_path_factory):
    """Prediction type -> path of a StableDiffusionPipeline that diffusers itself saved."""
    import tiny_models

    folders = {}
    for prediction_type, make in (("epsilon", tiny_models.sd_epsilon), ("v_prediction", tiny_models.sd_v_prediction)):
        folders[prediction_type] = str(tmp_path_factory.mktemp(f"tiny_sd_{prediction_type}") / "model")
        make().save_pretrained(folders[prediction_type])
    return folders


@pytest.fixture(scope="session")
def tiny_sd_folder(tiny_sd_folders):
    return tiny_sd_folders["epsilon"]


@pytest.fixture(scope="session")
def photo():
    """A synthetic RGB picture, 96 wide and 64 high, with what photos have: gradients, edges, texture and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:96]
    sky = np.stack([90 + x, 120 + x / 2 + y, 220 - y], axis=-1)
    ground = np.stack([70 + 30 * np.sin(x / 3), 110 + 20 * np.sin((x + y) / 4), 60 + y / 2], axis=-1)
    picture = np.where((y > 40 + 6 * np.sin(x / 15))[..., None], ground, sky)
    picture[(x - 70) ** 2 + (y - 18) ** 2 < 100] = (250, 230, 150)
    picture = picture + rng.normal(0, 4, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))
