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

from diffusers_compress.coding.channels import poisson
from diffusers_compress.coding.channels.trellis import Trellis, survivors

# The lines through the useful bits were measured (benchmarks/channel_overhead.py).
CHANNELS = {
    1: Trellis(state_bits=14, slope=0.925, intercept=2.35),
    2: poisson,
    3: Trellis(state_bits=32, slope=0.96, intercept=2.6, survivors=survivors),
}
