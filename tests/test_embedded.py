"""The small model that ships with the package: a real one, on a real photo."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.diffusion import schedule


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffCPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def portrait():
    return images.open_image(demo_photo()).convert("RGB").crop((100, 20, 356, 276))


@pytest.fixture(scope="module")
def face(portrait):
    return portrait.crop((64, 0, 192, 128))


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2))


def test_folder_has_the_layout_and_size_that_was_promised():
    """Stable Diffusion's layout with another autoencoder and denoiser; 40 MB, no file above 24."""
    sizes = [path.stat().st_size for path in Path(embedded_model()).rglob("*") if path.is_file()]
    assert sum(sizes) <= 40_000_000 and max(sizes) <= 24_000_000
    index = json.loads(Path(embedded_model(), "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderDC"] and index["unet"] == ["diffusers_compress", "WienerUNet"]


def test_flat_colours_come_back(pipe):
    """Each channel within 3 levels, through the autoencoder alone."""
    for colour in itertools.product((20, 128, 230), repeat=3):
        x = images.to_tensor(Image.new("RGB", (32, 32), colour))[0][None]
        with torch.no_grad():
            shown = images.to_output(pipe.decode_latent(pipe.encode_picture(x)))[0]
        assert np.abs(np.asarray(shown, dtype=float).mean((0, 1)) - colour).max() < 3


def test_the_autoencoder_alone(pipe, portrait):
    with torch.no_grad():
        x_hat = pipe.decode_latent(pipe.encode_picture(images.to_tensor(portrait)[0][None]))
    assert psnr(portrait, images.to_output(x_hat)[0]) > 28


def test_psnr_rises_with_the_rate(pipe, face):
    """Every file nearly fills its size, and more bits give a better picture, in the flow and in the preview."""
    figures = {"flow": [], "denoised": []}
    for bpp in (0.02, 0.06, 0.18):
        out = pipe.compress(face, target_bpp=bpp)
        assert 0.95 * bpp < out.bpp[0] <= bpp
        for reconstruction, values in figures.items():
            values.append(psnr(face, pipe.decompress(out.bitstreams, reconstruction=reconstruction).images[0]))
    for values in figures.values():
        assert values[0] + 0.5 < values[1] and values[1] + 0.5 < values[2]


def test_pictures_of_a_batch_are_coded_as_they_would_be_alone(pipe, portrait):
    pictures = [portrait.crop(box) for box in ((0, 0, 128, 128), (64, 64, 192, 192))]
    out = pipe.compress(pictures, target_bpp=0.15, num_coding_steps=4)
    together = pipe.decompress(out.bitstreams).images
    assert out.bitstreams[0] != out.bitstreams[1]
    for picture, data, image in zip(pictures, out.bitstreams, together):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(pipe.decompress(data).images[0], dtype=int)).max() <= 1
        # Rounding in the network may differ with the batch's size, and so a few bits of a message.
        sent_alone = pipe.compress(picture, target_bpp=0.15, num_coding_steps=4).bitstreams
        assert abs(psnr(picture, pipe.decompress(sent_alone).images[0]) - psnr(picture, image)) < 0.3


def test_the_network_saves_bits(pipe, face, monkeypatch):
    """The same noise level costs less than half of what it costs with a network that knows nothing."""
    size = len(pipe.compress(face, fidelity=0.5).bitstreams[0])
    ratio = schedule.from_scheduler(pipe.scheduler).ratio.float()
    # v = alpha eps - sigma x_0_hat; with x_0_hat = 0 it is alpha / sigma x_t
    monkeypatch.setattr(DiffCPipeline, "predict", lambda self, x_t, t, embeds: ratio[t].view(-1, 1, 1, 1) * x_t)
    assert size < 0.5 * len(pipe.compress(face, fidelity=0.5).bitstreams[0])


@pytest.fixture(scope="module")
def sent(pipe, face):
    """A file, and the decibels of what float32 makes of it."""
    data = pipe.compress(face, target_bpp=0.08, num_coding_steps=8).bitstreams[0]
    return data, psnr(face, pipe.decompress(data, num_inference_steps=5).images[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_decodes_within_a_fifth_of_a_decibel(pipe, face, sent, dtype):
    other = DiffCPipeline.from_pretrained(embedded_model(), dtype=dtype)
    other.set_progress_bar_config(disable=True)
    assert other.fingerprint() == pipe.fingerprint()
    assert abs(psnr(face, other.decompress(sent[0], num_inference_steps=5).images[0]) - sent[1]) < 0.2


def test_a_large_picture_comes_back(pipe, portrait):
    picture = portrait.resize((1000, 650))
    data = pipe.compress(picture, target_bpp=0.004, num_coding_steps=4).bitstreams[0]
    decoded = pipe.decompress(data, reconstruction="denoised").images[0]
    assert decoded.size == (1000, 650)
    assert psnr(picture, decoded) > psnr(picture, Image.new("RGB", picture.size, "gray"))
