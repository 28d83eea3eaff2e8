import numpy as np
import pytest

from diffusers_compress.coding import logistic
from diffusers_compress.coding.context_model import NEIGHBOURS, adaptive, batches, order, solve, surroundings, units_of
from diffusers_compress.coding.logistic import UNIT

SIZES = [(1, 1), (1, 9), (5, 3), (8, 8), (13, 22), (64, 96)]


def bits_of(walk, v, dither):
    """Code length of v [C, h w] under a model, which is told the values as it goes."""
    bits, seen = 0.0, np.zeros(v.shape, dtype=int)
    request = next(walk, None)
    while request is not None:
        channel, positions, mean, index = request
        seen[channel, positions] += 1
        bits += logistic.code_length((v[channel][positions] + dither[channel][positions]) // UNIT, mean, index).sum()
        try:
            request = walk.send(v[channel][positions])
        except StopIteration:
            request = None
    return bits, seen


def smooth(rng, channels, h, w):
    """A latent with what latents have: neighbours and channels alike, its strength varying over the picture."""
    x = rng.normal(size=(channels, h, w))
    for axis in (1, 2):
        x = sum(np.roll(x, shift, axis) for shift in (-2, -1, 0, 1, 2))
    x[1] += 0.7 * x[0]
    return (x * (1 + 3 * (np.arange(w) > w // 2))).reshape(channels, -1)


@pytest.mark.parametrize("h, w", SIZES)
def test_every_position_once_and_neighbours_known_before(h, w):
    known = np.zeros(h * w + 1, dtype=bool)
    known[-1] = True
    for batch in batches(h, w):
        assert batch.neighbours.shape == (len(batch.positions), NEIGHBOURS)
        assert not known[batch.positions].any() and known[batch.neighbours].all()
        known[batch.positions] = True
    assert known.all()
    assert np.array_equal(np.sort(np.concatenate([b.positions for b in batches(h, w, 8, h * w)])), np.arange(h * w))


def test_neighbours_are_the_nearest_ones():
    last = batches(16, 16)[-1]
    y, x = last.positions // 16, last.positions % 16
    inner = (y > 2) & (y < 13) & (x > 2) & (x < 13)
    dy, dx = (last.neighbours[inner] // 16 - y[inner, None], last.neighbours[inner] % 16 - x[inner, None])
    assert set(zip(dy[:, :4].ravel().tolist(), dx[:, :4].ravel().tolist())) == {(0, 1), (0, -1), (1, 0), (-1, 0)}
    assert (dy**2 + dx**2).max() == 5


def test_spread_of_a_ramp():
    v = np.append(np.tile(np.arange(16) * 1000, 16), 0)
    batch = batches(16, 16)[-1]
    centre, spread, difference = surroundings(v, batch, 7)
    inside = (batch.positions % 16 > 1) & (batch.positions % 16 < 14)
    assert np.array_equal(centre[inside], v[batch.positions][inside])
    assert (spread[inside] > UNIT // 8).all() and (difference.sum(-1)[inside] == 0).all()


def test_solve_inverts():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 19):
        x = rng.integers(-1000, 1000, (500, n))
        weights = rng.normal(size=n)
        matrix, vector = x.T @ x + 1000 * np.eye(n, dtype=int), np.rint(x.T @ (x @ weights)).astype(np.int64)
        exact = np.linalg.solve(matrix.astype(float), vector.astype(float))
        assert np.abs(solve(matrix, vector) / 4096 - exact).max() < 0.01
    assert np.abs(solve(np.zeros((3, 3), dtype=int), np.array([1, 0, 1 << 40]))).max() <= 1 << 20


@pytest.mark.parametrize("dithered", [False, True])
@pytest.mark.parametrize("step", [0.2, 1.0])
def test_context_saves_what_static_tables_cannot(dithered, step):
    rng = np.random.default_rng(0)
    y = smooth(rng, 2, 64, 96)
    units = units_of(y.std(1), [step] * 2, [True] * 2)
    dither = (2 * rng.integers(0, UNIT // 2, y.shape) - UNIT // 2 + 1) * dithered
    k = np.floor(y / step + dither / UNIT + 0.5).astype(np.int64)
    bits, seen = bits_of(adaptive(64, 96, units, dither), UNIT * k - dither, dither)
    assert (seen == 1).all()
    static = sum(logistic.code_length(k[c][:, None], dither[c][:, None], np.arange(60)).sum(0).min() for c in (0, 1))
    assert bits < 0.82 * static


def test_only_coded_channels_are_asked_for():
    units = units_of([1.0, 5.0, 2.0], [0.5, 0.5, 0.5], [True, False, True])
    assert units == [2 * UNIT, 0, 4 * UNIT] and order(units) == [2, 0]
    zeros = np.zeros((3, 40), dtype=np.int64)
    _, seen = bits_of(adaptive(5, 8, units, zeros), zeros, zeros)
    assert (seen == [[1], [0], [1]]).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (40, 3)])
def test_odd_sizes_and_wild_values(size):
    """Nothing overflows or leaves the tables, whatever the values are."""
    h, w = size
    rng = np.random.default_rng(0)
    v = UNIT * rng.integers(-(1 << 19), 1 << 19, (3, h * w))
    bits, seen = bits_of(adaptive(h, w, [1, 1 << 20, 500], 0 * v), v, 0 * v)
    assert (seen == 1).all() and np.isfinite(bits)
