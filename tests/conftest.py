"""Fixtures that several tests share. Nothing is downloaded: every model is built here, small and random."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def tiny_tokenizer(folder):
    """A CLIP tokenizer that knows the lower-case letters, alone and at a word's end, and no merges."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


def tiny_components(prediction_type, tokenizer):
    """Stable Diffusion in miniature: VAE of factor 8, UNet with cross-attention, text encoder, the published noise schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        sample_size=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    noise = {**betas, "prediction_type": prediction_type, "steps_offset": 1, "set_alpha_to_one": False}
    if prediction_type == "epsilon":
        scheduler = PNDMScheduler(**noise, skip_prk_steps=True)
    else:
        scheduler = DDIMScheduler(**noise, clip_sample=False)
    return {"vae": vae, "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


@pytest.fixture(scope="session")
def tiny_sd_folders(tmp_path_factory):
    """Prediction type -> path of a StableDiffusionPipeline that diffusers itself saved."""
    from diffusers import StableDiffusionPipeline

    folders = {}
    for prediction_type in ("epsilon", "v_prediction"):
        folder = tmp_path_factory.mktemp(f"tiny_sd_{prediction_type}")
        parts = tiny_components(prediction_type, tiny_tokenizer(folder / "vocabulary"))
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
        )
        pipeline.save_pretrained(folder / "model")
        folders[prediction_type] = str(folder / "model")
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
