"""Channel coders: how a sender gives a receiver a sample of N(shift, I) in few bits. The number is the one in the file.

Every channel has the same functions (n dimensions, `budget` a non-negative integer that the receiver knows beforehand):

    budget(kl) -> int           the budget that delivers a shift of `kl` = |shift|^2 / (2 ln 2) bits
    encode(shift, budget, step) -> (message, y)
    decode(message, n, budget, step, device) -> y       the same y
    payload_bytes(budgets, payload) -> int              length of the whole payload, from the budgets or its first bytes
    pack(messages, budgets) -> bytes
    unpack(payload, budgets) -> messages                of the whole steps that a payload holds
"""

from diffusers_compress.channels import poisson, trellis

CHANNELS = {1: trellis, 2: poisson}
