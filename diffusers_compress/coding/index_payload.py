"""The messages of the poisson channel as a payload, without torch: one range-coder stream of indices, its length at its head."""

import functools
import math
from collections.abc import Iterator

import numpy as np

from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt

CHUNK_BITS = 14
SPARE_BITS = 2  # of candidates beyond the KL
LENGTH_BYTES = 3  # of the payload's length, at its head


def cost(budget: int) -> float:
    """Expected payload bits of a step, a line through measured costs of chunks of 1 to 14 bits."""
    return 0.89 * budget + 1.25 * chunk_count(budget) if budget else 0.0


def chunk_count(budget: int) -> int:
    return max(1, -(-budget // CHUNK_BITS))


def bits_of_chunks(budget: int) -> Iterator[int]:
    """KL of each chunk in whole bits, as equal as can be."""
    chunks = chunk_count(budget)
    return (budget * (c + 1) // chunks - budget * c // chunks for c in range(chunks))


def octave_count(bits: int) -> int:
    """A chunk has 2^octaves - 1 candidates k = 1, 2, ..., so that all octaves 2^o <= k < 2^(o + 1) are whole."""
    return bits + SPARE_BITS


@functools.cache
def octave_frequencies(bits: int) -> tuple[int, ...]:
    """Zipf's distribution with exponent 1 + 1 / (bits + 1.5), summed over octaves: a geometric one, in integers."""
    # ratio = floor(2^16 * 2^(-1 / (bits + 1.5))): the largest integer whose power `root` is at most 2^(16 root - 2)
    root = 2 * bits + 3
    ratio = next(r for r in range(2**16, 0, -1) if r**root <= 2 ** (16 * root - 2))
    return tuple((ratio**octave << 16) >> 16 * octave for octave in range(octave_count(bits)))


def payload_bytes(budgets: list[int], payload: bytes | None = None) -> int:
    """Length of the whole payload: what the payload's own head says, or without one an estimate from the budgets."""
    if payload is None:
        return LENGTH_BYTES + 4 + math.ceil(sum(map(cost, budgets)) / 8)
    return LENGTH_BYTES + int.from_bytes(payload[:LENGTH_BYTES], "little")


def pack(messages: list[np.ndarray], budgets: list[int]) -> bytes:
    """Length of the rest, then one range-coder stream: octave of index + 1 under Zipf's distribution, offset in the octave uniform."""
    encoder = Encoder()
    for message, budget in zip(messages, budgets, strict=True):
        if len(message) != chunk_count(budget):
            raise ValueError(f"message of {len(message)} chunks: a budget of {budget} has {chunk_count(budget)}")
        for index, bits in zip(message.tolist() if budget else [], bits_of_chunks(budget)):
            octave = (index + 1).bit_length() - 1
            encoder.encode(octave, octave_frequencies(bits))
            encoder.encode_bits(index + 1 - 2**octave, octave)
    stream = encoder.getvalue()
    if len(stream) >> 8 * LENGTH_BYTES:
        raise ValueError(
            f"a payload of {len(stream)} bytes: the poisson channel holds less than {1 << 8 * LENGTH_BYTES}; use trellis"
        )
    return len(stream).to_bytes(LENGTH_BYTES, "little") + stream


def steps_present(payload: bytes, budgets: list[int]) -> int:
    """How many whole steps a payload determines."""
    return len(unpack(payload, budgets))


def _decode_index(decoder: Decoder, bits: int) -> int:
    octave = decoder.decode(octave_frequencies(bits))
    return 2**octave + decoder.decode_bits(octave) - 1


def unpack(payload: bytes, budgets: list[int]) -> list[np.ndarray]:
    """Messages of the whole steps that a payload determines: those that it gives whatever bytes may follow."""
    lowest, highest = (Decoder(payload[LENGTH_BYTES:], filler) for filler in (0x00, 0xFF))
    messages = []
    for budget in budgets:
        message = []
        for bits in bits_of_chunks(budget):
            try:
                index, other = (_decode_index(decoder, bits) if budget else 0 for decoder in (lowest, highest))
            except Corrupt:
                return messages
            if index != other:
                return messages
            message.append(index)
        messages.append(np.array(message, dtype=np.int64))
    return messages
