"""The messages of the trellis channels as a payload, without torch: their bits one after the other."""

from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def payload_bytes(budgets: list[int], payload: bytes | None = None) -> int:
    """Length of the whole payload, which the budgets alone decide."""
    return -(-sum(budgets) // 8)


def pack(messages: "list[np.ndarray]", budgets: list[int]) -> bytes:
    """All messages' bits one after the other, the first in the highest bit of the first byte, zeros up to a whole byte."""
    import numpy as np

    if [len(message) for message in messages] != list(budgets):
        raise ValueError(f"messages of {[len(message) for message in messages]} bits: their budgets are {budgets}")
    return np.packbits(np.concatenate([np.empty(0, np.uint8), *messages])).tobytes()


def steps_present(payload: bytes, budgets: list[int]) -> int:
    """How many whole steps a payload holds."""
    return sum(end <= 8 * len(payload) for end in accumulate(budgets))


def unpack(payload: bytes, budgets: list[int]) -> "list[np.ndarray]":
    """Messages of the whole steps that a payload holds."""
    import numpy as np

    bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))
    messages, start = [], 0
    for budget in budgets:
        if start + budget > len(bits):
            break
        messages.append(bits[start : start + budget])
        start += budget
    return messages
