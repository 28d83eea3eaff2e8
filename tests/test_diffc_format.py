from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_compress.codecs.diffc.format import (
    BUDGET_DIGITS,
    BUDGET_RANK_BITS,
    STRIDE_DIGITS,
    STRIDE_RANK_BITS,
    Parameters,
    nearest,
    number_of,
    rank_of,
)
from diffusers_compress.coding.channels import CHANNELS, Row, channel_of, name_of, payload_of
from diffusers_compress.errors import Corrupt, LimitExceeded, UnsupportedVersion
from diffusers_compress.format.bits import BitWriter
from diffusers_compress.format.limits import Limits


@st.composite
def parameters(draw):
    budget = number_of(draw(st.integers(0, 2**BUDGET_RANK_BITS - 1)), BUDGET_DIGITS)
    ranks = draw(st.lists(st.integers(1, 2**STRIDE_RANK_BITS - 1), max_size=30))
    return Parameters(
        channel=draw(st.sampled_from([row.number for row in CHANNELS.values()])),
        budget=budget,
        last=draw(st.integers(0, budget)),
        strides=[number_of(rank, STRIDE_DIGITS) for rank in ranks],
        prompt=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=200)),
        check=draw(st.none() | st.integers(0, 2**14 - 1)),
    )


def bits(digits):
    """These binary digits as bytes, ones behind them."""
    writer = BitWriter()
    writer.write(int(digits, 2), len(digits))
    return writer.to_bytes()


def fields(channel=1, prompt=None, budget_rank=36, last=0, last_bits=6, stride_rank=8, differences=()):
    """The bytes of parameters, field by field, whether or not an encoder would write them."""
    writer = BitWriter()
    writer.write(channel, 2)
    writer.write(prompt is not None, 1)
    if prompt is not None:
        writer.write(len(prompt), 16)
        for byte in prompt:
            writer.write(byte, 8)
    writer.write(budget_rank, BUDGET_RANK_BITS)
    writer.write(last, last_bits)
    writer.write(stride_rank, STRIDE_RANK_BITS)
    for number in differences:
        writer.write_rice(number, 1)
    return writer.to_bytes()


@given(parameters())
def test_parameters_come_back(wanted):
    data = wanted.to_bytes()
    assert len(data) >= 2
    assert Parameters.from_bytes(data) == wanted


@given(parameters())
def test_all_steps_but_the_last_have_the_same_budget(wanted):
    budgets = wanted.budgets
    assert len(budgets) == len(wanted.strides)
    assert set(budgets[:-1]) <= {wanted.budget} and budgets[-1:] in ([], [wanted.last])


@given(st.binary(max_size=40))
def test_any_bytes_are_parameters_or_refused(data):
    try:
        read = Parameters.from_bytes(data)
    except (Corrupt, LimitExceeded, UnsupportedVersion):
        return
    assert Parameters.from_bytes(read.to_bytes()) == read


def test_fields_follow_one_another_as_described():
    """Budget of rank 36 (40), 33 of 40 in the last step, strides of the ranks 8, 9, 7: differences 1 and -2."""
    wanted = Parameters(1, number_of(36, 5), 33, [number_of(rank, 4) for rank in (8, 9, 7)])
    assert wanted.to_bytes() == fields(last=33, differences=[2, 3]) == bytes.fromhex("42484225")
    assert Parameters(1, number_of(36, 5), 33, wanted.strides, "hé").to_bytes() == fields(
        prompt="hé".encode(), last=33, differences=[2, 3]
    )


def test_a_usual_file_needs_few_bytes():
    """Twelve steps whose strides grow slowly, as those of pictures do."""
    ranks = [60, 60, 61, 62, 62, 63, 63, 64, 64, 64, 65, 65]
    wanted = Parameters(1, 1000, 990, [number_of(rank, STRIDE_DIGITS) for rank in ranks])
    assert Parameters.from_bytes(wanted.to_bytes()).strides == wanted.strides
    assert len(wanted.to_bytes()) <= 8


@pytest.mark.parametrize("digits", [4, 5])
def test_ranks_number_the_integers_of_few_digits_without_gaps(digits):
    numbers = [number_of(rank, digits) for rank in range(200)]
    few = [number for number in range(numbers[100]) if number % 2 ** max(0, number.bit_length() - digits) == 0]
    assert numbers[: len(few)] == few and numbers == sorted(set(numbers))
    assert [rank_of(number, digits) for number in numbers] == list(range(200))


@given(st.integers(0, 10**9), st.sampled_from([4, 5]))
def test_rank_and_nearest_of_any_number(number, digits):
    rank = rank_of(number, digits)
    assert number_of(rank, digits) <= number < number_of(rank + 1, digits)
    around = [abs(number_of(r, digits) - number) for r in (rank, rank + 1)]
    assert abs(nearest(number, digits) - number) == min(around)


@pytest.mark.parametrize("name", CHANNELS)
def test_every_channel_has_its_number_and_its_payload(name):
    number = CHANNELS[name].number
    assert name_of(number) == name and 0 < number < 256
    assert channel_of(number).pack is payload_of(number).pack


@pytest.mark.parametrize(
    "data, error, words",
    [
        (b"", Corrupt, "bits wanted"),
        (b"\x40", Corrupt, "bits wanted"),
        (bits("0000000000110"), Corrupt, "channel 3 in eight bits"),
        (bits("0000000001000"), UnsupportedVersion, "channel 4.*upgrade"),
        (bits("000011111111100000000000000"), UnsupportedVersion, "channel 255"),
        (fields(last=41), Corrupt, "last budget, 41, is above that of the other steps, 40"),
        (fields(prompt=b"\xff"), Corrupt, "UTF-8"),
        (fields(prompt=b"x" * 4097), LimitExceeded, "4097 bytes"),
        (fields(prompt=b"x" * 40)[:20], Corrupt, "bits wanted"),
        (fields(stride_rank=0), Corrupt, "stride .* out of range"),
        (fields(stride_rank=1, differences=[1]), Corrupt, "stride .* out of range"),
        (fields(stride_rank=255, differences=[2]), Corrupt, "stride .* out of range"),
    ],
)
def test_what_no_encoder_writes_is_refused(data, error, words):
    with pytest.raises(error, match=words):
        Parameters.from_bytes(data)


@pytest.mark.parametrize("wrong", [Parameters(256, 8), Parameters(1, 2**40), Parameters(1, 8, 16), Parameters(1, 8, 3, [2**40])])
def test_a_number_out_of_its_field_is_told(wrong):
    with pytest.raises(ValueError, match="does not fit"):
        wrong.to_bytes()


def test_there_is_room_for_channels_to_come(monkeypatch):
    monkeypatch.setitem(CHANNELS, "dither", Row(4, "poisson", "index_payload"))
    for check in (None, 0, 0x2ABC):
        whole = Parameters(4, 40, 33, [1, 2, 3], "a", check)
        assert Parameters.from_bytes(whole.to_bytes()) == whole
        short = replace(whole, channel=1)
        assert len(whole.to_bytes()) - len(short.to_bytes()) in (1, 2)


def test_a_check_takes_sixteen_bits_in_front():
    """Channel 0, then the channel, then the check; without it the bytes are as they ever were."""
    plain = Parameters(1, number_of(36, 5), 33, [number_of(rank, 4) for rank in (8, 9, 7)])
    assert plain.to_bytes() == bytes.fromhex("42484225")
    checked = replace(plain, check=0x2ABC)
    bits = f"{int.from_bytes(checked.to_bytes(), 'big'):048b}"
    assert bits == "00" + "01" + f"{0x2ABC:014b}" + f"{int.from_bytes(plain.to_bytes(), 'big'):032b}"[2:]
    assert Parameters.from_bytes(checked.to_bytes()) == checked


def test_limits_can_be_raised():
    prompted = Parameters(1, 8, prompt="x" * 5000).to_bytes()
    with pytest.raises(LimitExceeded, match="5000 bytes.*Limits.prompt_bytes"):
        Parameters.from_bytes(prompted)
    assert len(Parameters.from_bytes(prompted, Limits(prompt_bytes=5000)).prompt) == 5000
    many = Parameters(1, 8, 8, [1] * 257).to_bytes()
    with pytest.raises(LimitExceeded, match="256 steps.*Limits.steps"):
        Parameters.from_bytes(many)
    assert len(Parameters.from_bytes(many, Limits(steps=257)).strides) == 257
