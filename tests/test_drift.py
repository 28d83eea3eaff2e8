import warnings

import pytest
import torch

from diffusers_compress.codecs.diffc import drift


@pytest.mark.parametrize("n", [4, 1000, 24576])
def test_the_same_latent_has_not_drifted(n):
    x_t = torch.randn(n, generator=torch.Generator().manual_seed(n))
    check = drift.check_of(x_t)
    assert 0 <= check < 2**14
    assert drift.drift(x_t, check) < drift.BOUND
    assert drift.drift(x_t.view(4, -1), check) == drift.drift(x_t, check)


def test_the_estimate_is_the_rms_drift():
    generator = torch.Generator().manual_seed(0)
    for size, low, high in ((0.01, 0.0, 0.03), (0.05, 0.03, 0.07), (0.1, 0.075, 0.125)):
        found = []
        for _ in range(100):
            x_t = torch.randn(4, 32, 32, generator=generator)
            found.append(drift.drift(x_t + size * torch.randn(x_t.shape, generator=generator), drift.check_of(x_t)))
        assert low <= torch.tensor(found).square().mean() ** 0.5 <= high


def test_small_drifts_pass_and_large_ones_are_told():
    generator = torch.Generator().manual_seed(0)

    def warned(size):
        count = 0
        for _ in range(200):
            x_t = torch.randn(4096, generator=generator)
            moved = x_t + size * torch.randn(4096, generator=generator)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                notes = drift.notes(drift.drift(moved, drift.check_of(x_t)))
            assert [str(warning.message) for warning in caught] == notes
            count += len(notes)
        return count

    assert drift.notes(None) == [] and warned(drift.BOUND / 4) == 0
    assert warned(3 * drift.BOUND) >= 190
    assert warned(1.4) >= 190


def test_the_bits_are_the_cells_of_the_projections():
    x_t = torch.randn(100, generator=torch.Generator().manual_seed(0))
    p = drift.projections(x_t)
    assert p.shape == (7,)
    cells = [int(value * 8 // 1) % 4 for value in p]
    assert [drift.check_of(x_t) >> shift & 3 for shift in range(12, -1, -2)] == cells
