import numpy as np
import pytest

from diffusers_compress.coding import grid_model
from diffusers_compress.coding.range_coder import Decoder, Encoder


def codebook(size, seed=0):
    rng = np.random.default_rng(seed)
    places = np.rint(rng.normal(0, 40, (size, 4))).clip(-127, 127).astype(np.int64)
    return grid_model.Codebook(rng.integers(1, 256, size), places)


def coded(grid, book):
    encoder = Encoder()
    grid_model.encode(encoder, grid, book)
    return encoder.getvalue()


def smooth(shape, book, step=4):
    """A walk whose next index is one of the few that are nearest to the one on the left."""
    rng, grid = np.random.default_rng(1), np.zeros(shape, dtype=np.int64)
    for row in range(shape[0]):
        for column in range(1, shape[1]):
            distance = np.square(book.places - book.places[grid[row, column - 1]]).sum(1)
            grid[row, column] = np.argsort(distance, kind="stable")[rng.integers(step)]
    return grid


@pytest.mark.parametrize("size", [2, 3, 64, 300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 6)])
def test_every_grid_comes_back(size, shape):
    book = codebook(size)
    for grid in (np.random.default_rng(0).integers(0, size, shape), np.full(shape, size - 1)):
        assert np.array_equal(grid_model.decode(Decoder(coded(grid, book)), shape, book), grid)


def test_a_grid_without_any_order_costs_at_most_a_byte_more_than_fixed_length():
    book = codebook(256)
    for seed in range(4):
        grid = np.random.default_rng(seed).integers(0, 256, (8, 12))
        assert len(coded(grid, book)) <= 96 + 1
    assert len(coded(np.random.default_rng(0).integers(0, 64, (30, 40)), codebook(64))) <= 900 * 1.01


def test_what_neighbours_foretell_costs_less():
    book = codebook(256)
    grid = smooth((24, 24), book)
    assert len(coded(grid, book)) < 0.6 * 576
    assert len(coded(np.full((24, 24), 77), book)) < 0.03 * 576


def test_what_training_foretells_costs_less():
    book = codebook(256)
    book.frequency[:] = 1
    book.frequency[:16] = 200
    grid = np.random.default_rng(0).integers(0, 16, (8, 12))
    assert len(coded(grid, book)) < 0.7 * 96


def test_ranks_count_codes_by_distance_then_by_number():
    book = codebook(50)
    rng = np.random.default_rng(2)
    points, scales = rng.integers(-200, 200, (6, 4)), np.array([1, 2, 1, 2, 1, 1])
    distance = np.square(scales[:, None, None] * book.places - points[:, None]).sum(2)
    ranks = np.argsort(np.argsort(distance, 1, kind="stable"), 1)
    assert np.array_equal(book.octaves(points, scales), np.floor(np.log2(1 + ranks)))


def test_laws_are_positive_and_stay_within_the_coders_precision():
    laws = grid_model.walk(codebook(8192), (3, 3))
    frequencies = next(laws)
    for index in (0, 0, 0, 8191, 0, 17, 0, 0):
        assert frequencies.min() >= 1 and frequencies.sum() < 1 << 23
        frequencies = laws.send(index)


def test_the_identity_tells_what_decides_a_law():
    book = codebook(16)
    places = book.places.copy()
    places[3, 1] += 1
    frequency = book.frequency.copy()
    frequency[5] += 1
    identities = {book.identity(), grid_model.Codebook(frequency, book.places).identity()}
    assert len(identities | {grid_model.Codebook(book.frequency, places).identity()}) == 3


def test_the_law_is_part_of_the_format():
    """The same bytes on all machines and in all versions."""
    assert coded(np.arange(12).reshape(3, 4) * 5 % 16, codebook(16)).hex() == "08e73ce4135c44"
