"""Relic's blocks for Modular Diffusers, by diffusers' own loader."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from diffusers import ModularPipelineBlocks

from diffusers_compress import RelicPipeline

REPOSITORY = Path(__file__).parents[1] / "examples" / "modular_relic"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_models.sd_epsilon().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blocks():
    return ModularPipelineBlocks.from_pretrained(str(REPOSITORY), trust_remote_code=True)


def pipeline_of(blocks, folder):
    pipe = blocks.init_pipeline(str(folder))
    pipe.load_components()
    return pipe


def test_files_and_pictures_are_those_of_the_pipeline(blocks, folder, photo):
    pictures = [photo.crop((0, 0, 75, 50)), photo.crop((0, 0, 48, 32))]
    codec = RelicPipeline.from_pretrained(folder)
    expected = codec.compress(pictures, target_bpp=0.5, prompt="a house").bitstreams
    state = pipeline_of(blocks, folder)(image=pictures, target_bpp=0.5, prompt="a house", num_inference_steps=2)
    assert state.get("bitstreams") == expected
    images = codec.decompress(expected, num_inference_steps=2).images
    assert [np.array_equal(a, b) for a, b in zip(state.get("images"), images)] == [True, True]


def test_blocks_run_alone(blocks, folder, photo):
    """Latents that were changed in between are another file, which a decoder of one block reads."""
    picture = photo.crop((0, 0, 48, 32))
    latents = pipeline_of(blocks.sub_blocks["encode"], folder)(image=picture, output="latents")
    code = pipeline_of(blocks.sub_blocks["code"], folder)
    files = [code(image=picture, latents=[factor * latents[0]], max_bytes=60, output="bitstreams") for factor in (1, 0.5)]
    assert files[0] == RelicPipeline.from_pretrained(folder).compress(picture, max_bytes=60).bitstreams != files[1]
    decoder = pipeline_of(blocks.sub_blocks["reconstruct"], folder)
    assert decoder(bitstreams=files[0], num_inference_steps=1, output="images")[0].size == picture.size
