"""What was trained over the embedded model: two presets, small, and not noise."""

from pathlib import Path

import pytest
from PIL import Image

from diffusers_compress import PerCoPipeline, embedded_model
from diffusers_compress.codecs.perco.format import describe

PRESETS = sorted(path.parent.name for path in Path(embedded_model("perco")).glob("*/adapter.json"))


def test_the_embedded_presets_are_small_and_one_is_the_lowest():
    folder = Path(embedded_model("perco"))
    assert "0.0019" in PRESETS and sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 16e6


@pytest.mark.parametrize("preset", PRESETS)
def test_an_embedded_preset_paints_what_its_grid_says(preset):
    """Means of a red and a blue picture's channels come back, although nothing but indices was sent."""
    pipe = PerCoPipeline.from_pretrained(embedded_model("perco"), preset=preset)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.new("RGB", (128, 64), colour) for colour in ((190, 60, 50), (50, 80, 190))]
    files = pipe.compress(pictures).bitstreams
    assert all(describe(data)["preset"] == preset for data in files) and len(files[0]) < 80
    red, blue = (image.mean((0, 1)) for image in pipe.decompress(files, num_inference_steps=5, output_type="np").images)
    assert red[0] - red[2] > 0.1 and blue[2] - blue[0] > 0.1
