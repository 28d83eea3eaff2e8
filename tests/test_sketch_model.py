"""The coder of sketches: exact, smaller than what everyone has, and safe from any bytes."""

import io
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

import diffusers_compress
from diffusers_compress.codecs.text_sketch import edges, thumbnail
from diffusers_compress.coding import sketch_model
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt


def coded(grid, levels=2):
    encoder = Encoder()
    sketch_model.encode(encoder, grid, levels)
    return encoder.getvalue()


def pixels(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 3), (33, 31)])
@pytest.mark.parametrize("levels", [2, 3, 8])
@pytest.mark.parametrize("kind", ["empty", "full", "random", "rings"])
def test_a_sketch_comes_back(shape, levels, kind):
    y, x = np.mgrid[: shape[0], : shape[1]]
    grid = {
        "empty": np.zeros(shape, dtype=np.int64),
        "full": np.full(shape, levels - 1),
        "random": np.random.default_rng(3).integers(levels, size=shape),
        "rings": (np.hypot(y - 4, x - 6).astype(np.int64) % 5 == 0) * (levels - 1),
    }[kind]
    assert np.array_equal(sketch_model.decode(Decoder(coded(grid, levels)), shape, levels), grid)


def test_empty_and_full_sketches_take_next_to_nothing():
    assert len(coded(np.zeros((64, 96), dtype=np.int64))) <= 30
    assert len(coded(np.ones((64, 96), dtype=np.int64))) <= 30


def test_what_follows_a_sketch_in_the_stream_comes_back_too():
    encoder, grid = Encoder(), np.eye(9, dtype=np.int64)
    sketch_model.encode(encoder, grid, 2)
    encoder.encode_bits(5, 3)
    decoder = Decoder(encoder.getvalue())
    assert np.array_equal(sketch_model.decode(decoder, (9, 9), 2), grid) and decoder.decode_bits(3) == 5


def test_edges_of_a_photo_are_much_smaller_than_zlib_or_png_makes_them():
    """`benchmarks/text_sketch.py` has the figures of 24 photographs."""
    x = pixels(Image.open(Path(diffusers_compress.__file__).with_name("embedded") / "coffee.jpg"))
    ours = theirs = png = 0
    for side in 64, 128:
        grid = edges.quantized(edges.strengths(x, side), 0.4, 2)
        ours += len(coded(grid))
        theirs += len(zlib.compress(np.packbits(grid > 0, axis=1).tobytes(), 9))
        Image.fromarray(grid > 0).save(buffer := io.BytesIO(), "PNG", optimize=True)
        png += len(buffer.getvalue())
    assert grid.mean() > 0.02 and ours <= 0.7 * min(theirs, png)


@given(st.binary(max_size=40), st.integers(1, 12), st.integers(1, 12), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_a_sketch_or_corrupt(data, rows, columns, levels):
    try:
        grid = sketch_model.decode(Decoder(data), (rows, columns), levels)
    except Corrupt:
        return
    assert grid.shape == (rows, columns) and 0 <= grid.min() and grid.max() < levels


def test_a_thumbnail_has_the_colours_in_tens_of_bytes(photo):
    x = pixels(photo)
    colours = edges.reduced(x, (6, 8))
    k, encoder = thumbnail.quantize(colours), Encoder()
    thumbnail.encode(encoder, k)
    data = encoder.getvalue()
    assert len(data) <= 60
    back = thumbnail.decode(Decoder(data), (6, 8))
    assert np.array_equal(back, k)
    assert (thumbnail.dequantize(back) - colours).square().mean().sqrt() < 10 / 127.5
    assert (thumbnail.dequantize(thumbnail.quantize(torch.full((3, 1, 1), 0.5))) - 0.5).abs().max() < 4 / 127.5


def test_the_sketch_follows_the_edges_and_the_threshold():
    """A white square on black: its outline, and nothing else, at any size; a higher threshold leaves fewer cells."""
    picture = Image.new("L", (160, 96))
    picture.paste(255, (41, 25, 121, 73))  # not along the cells
    strength = edges.strengths(pixels(picture), 80)
    grid = edges.quantized(strength, 0.3, 2)
    assert grid.shape == (48, 80) and 90 <= grid.sum() <= 160
    assert not grid[16:32, 24:56].any() and not grid[:8].any() and not grid[40:].any()
    noisy = np.random.default_rng(1).random((40, 40))
    counts = [int((edges.quantized(noisy, threshold, 2) > 0).sum()) for threshold in (0.2, 0.5, 0.9)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    soft = edges.quantized(noisy, 0.2, 8)
    assert soft.min() == 0 and soft.max() == 7 and len(np.unique(soft)) == 8
