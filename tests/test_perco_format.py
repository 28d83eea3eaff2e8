import itertools

import pytest

from diffusers_compress.codecs.perco.format import BYTES, MAX_SEED, NO_CAPTION, PRESETS, WORDS, Parameters
from diffusers_compress.errors import BitstreamError, Corrupt

GRIDS = [(stride, (size - 1).bit_length()) for stride, size in PRESETS.values()] + [(1, 1), (8, 16), (2, 14)]


@pytest.mark.parametrize("grid", GRIDS)
def test_parameters_come_back(grid):
    for modelled, caption, seed in itertools.product((False, True), (NO_CAPTION, WORDS, BYTES), (0, 1, 127, 128, MAX_SEED)):
        parameters = Parameters(*grid, modelled, caption, 99 if caption == WORDS else 0, seed)
        assert Parameters.from_bytes(parameters.to_bytes()) == parameters


def test_a_preset_without_caption_and_seed_takes_one_byte():
    assert [len(Parameters(*grid, True).to_bytes()) for grid in GRIDS] == [1] * 7 + [2] * 3
    assert Parameters(8, 8, True).preset == "0.0019" and Parameters(2, 14, True).preset == "stride 2, 14 bits"


def test_bits_are_as_in_format_md():
    assert Parameters(8, 8, True).to_bytes().hex() == "30"
    assert Parameters(1, 6, False, WORDS, 0x4D, 300).to_bytes().hex() == "c64dac02"
    assert Parameters(2, 14, True, BYTES, 0, 5).to_bytes().hex() == "1a7405"


def test_whatever_is_read_is_written_alike_or_refused():
    for data in itertools.chain(([a] for a in range(256)), ([a, b] for a in range(0, 256, 3) for b in range(256))):
        try:
            parameters = Parameters.from_bytes(bytes(data))
        except BitstreamError:
            continue
        assert parameters.to_bytes() == bytes(data)


@pytest.mark.parametrize("data", ["", "31", "3030", "3c", "32", "3200", "34", "0a", "0201", "1a7485808080808001"])
def test_what_no_encoder_writes_is_corrupt(data):
    with pytest.raises(Corrupt):
        Parameters.from_bytes(bytes.fromhex(data))


@pytest.mark.parametrize("wrong", [{"stride": 16}, {"bits": 17}, {"caption": 4}, {"vocabulary": 256, "caption": WORDS}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        Parameters(**{"stride": 4, "bits": 9, "modelled": True} | wrong).to_bytes()
