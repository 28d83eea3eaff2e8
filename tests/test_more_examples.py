"""Examples that need more than a photo: a LoRA, a browser, a library, a cluster."""

import json
import runpy
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from test_examples import pictures, run  # noqa: F401 - fixtures
from test_report import browser

from diffusers_compress import DiffCPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_lora(run, pictures, tmp_path, tiny_sd_folder):  # noqa: F811
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=peft.get_peft_model_state_dict(unet))
    lines = run("lora.py", pictures / "0.png", "--model", tiny_sd_folder, "--lora", tmp_path / "lora", "--bpp", 0.3).splitlines()
    assert lines[0].split()[1] != lines[1].split()[1] and lines[2].startswith("WrongModel: ")
    assert Image.open(tmp_path / "decoded.png").size == (96, 64)


def test_hf_dataset(run, pictures, tmp_path, tiny_sd_folder):  # noqa: F811
    pytest.importorskip("datasets")
    lines = run("hf_dataset.py", pictures, tmp_path / "coded", "--model", tiny_sd_folder, "--bpp", 0.3).splitlines()
    assert "3 pictures" in lines[-2] and lines[-1] == "the first, decoded: (96, 64)"


def test_batch_slurm_is_a_script(tmp_path):
    """With the cluster's commands replaced by ones that print: what each machine is told to run."""
    for name, text in {"scontrol": "echo first; echo second", "srun": 'exec "$@"', "accelerate": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    told = subprocess.run(
        ["bash", EXAMPLES / "batch.slurm", "my photos", "coded"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "--num_processes 16 --machine_rank 1 --main_process_ip first" in told and "batch my photos coded --model" in told


@pytest.fixture
def page(photo, tiny_sd_folder):
    """(address, the file) of the progressive page."""
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folder)
    data = pipe.compress(photo, target_bpp=1).bitstreams[0]
    server = runpy.run_path(str(EXAMPLES / "progressive_page.py"))["server"](data, pipe, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", data
    server.shutdown()
    server.server_close()


def test_progressive_page_serves_ranges(page):
    address, data = page

    def ask(path, body=None, **headers):
        request = urllib.request.Request(f"{address}/{path}", data=body, headers=headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    assert ask("photo.dfc")[:2] == (200, data)
    status, part, headers = ask("photo.dfc", Range="bytes=5-99")
    assert (status, part, headers["Content-Range"]) == (206, data[5:100], f"bytes 5-99/{len(data)}")
    assert ask("photo.dfc", Range=f"bytes={len(data) - 3}-")[1] == data[-3:]
    for wrong in ("bytes=-5", "bytes=9-3", f"bytes={len(data)}-", "lines=1-2"):
        assert ask("photo.dfc", Range=wrong)[0] == 416
    assert ask("decode", data[: len(data) // 2])[1].startswith(b"\x89PNG")
    assert ask("decode", b"hello")[0] == 422 and ask("decode", data + b"more")[0] == 413 and ask("../etc/passwd")[0] == 404


def test_progressive_page_in_a_browser(page):
    """It asks for bytes that it has not yet, and shows a picture."""
    executable = browser()
    if executable is None:
        pytest.skip("no browser")
    from playwright.sync_api import expect, sync_playwright

    address, data = page
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 390, "height": 844})
        ranges = []
        view.on("request", lambda request: ranges.append(request.headers.get("range")))
        view.goto(address)
        expect(view.locator("#all")).to_have_text(f"{len(data):,}", timeout=60_000)
        view.locator("#share").fill("100")
        expect(view.locator("#bytes")).to_have_text(f"{len(data):,}", timeout=60_000)
        first, second = (text.removeprefix("bytes=").split("-") for text in ranges if text)
        assert first[0] == "0" and int(second[0]) == int(first[1]) + 1 and int(second[1]) == len(data) - 1
        assert view.locator("#picture").evaluate("image => image.naturalWidth") == 96
        chromium.close()


def test_the_notebook_is_stored_without_outputs():
    """They would be megabytes, of weights that change."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)
