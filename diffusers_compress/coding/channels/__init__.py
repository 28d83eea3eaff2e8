"""Channel coders: how a sender gives a receiver a sample of q = N(shift, I) in few bits. The number is the one in the file.

Every channel has the same names (B pictures, n dimensions, `budget` a non-negative integer that the receiver knows beforehand):

    kl(budget) -> float         useful bits that this budget delivers
    budget(kl) -> int           the inverse
    wide                        whether the reference is N(0, 1 + excess); if not, excess and rank are not used
    encode(shift [B, n], excess [B, n], rank [B, n], budget, step) -> (messages [B, ...], y [B, n])
    decode(messages, excess, rank, budget, step) -> y       the same y
    payload_bytes(budgets, payload) -> int              length of the whole payload, from the budgets or its first bytes
    pack(messages, budgets) -> bytes                    one picture's messages of all steps
    unpack(payload, budgets) -> messages                of the whole steps that a payload holds
"""

from importlib import import_module
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, NamedTuple


class Row(NamedTuple):
    """number: in the file; channel: "module:name" in this folder; payload: module in `coding` that writes its messages, without torch."""

    number: int
    channel: str
    payload: str


CHANNELS = {
    "trellis": Row(1, "trellis:TRELLIS", "bit_payload"),
    "poisson": Row(2, "poisson", "index_payload"),
    "trellis32": Row(3, "trellis:TRELLIS32", "bit_payload"),
}


def name_of(number: int) -> str:
    """The channel with this number."""
    return next(name for name, row in CHANNELS.items() if row.number == number)


def channel_of(number: int) -> Any:
    """What sends and receives, as described above."""
    return resolve_name(f"{__name__}.{CHANNELS[name_of(number)].channel}")


def payload_of(number: int) -> ModuleType:
    """What writes and reads the payload, and knows its length."""
    return import_module(f"diffusers_compress.coding.{CHANNELS[name_of(number)].payload}")
