"""A refined file's own part, read without torch: parameters, base file, facts. FORMAT.md, section "Refine"."""

import math
from dataclasses import dataclass

from diffusers_compress.contract import REFINE
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.format.bits import need, read_varint, write_varint
from diffusers_compress.format.limits import DEFAULT_LIMITS, check_prompt

BASE_NUMBERS = {"jpeg": 1, "webp": 2, "avif": 3, "jxl": 4, "jpeg2000": 5, "diffc": 6, "relic": 7}
LEARNED = ("diffc", "relic")  # codecs of `contract.CODECS`, on the same model
MAX_PROMPT_BYTES = DEFAULT_LIMITS.prompt_bytes
MAX_SEED = 2**32 - 1

# The errors of the base's latent are sent as codes: 2^-10, 2^(-10 + 1/16), ... 2^(5 + 15/16).
CODES, CODES_PER_OCTAVE, SMALLEST_OCTAVE = 256, 16, -10


@dataclass
class Parameters:
    """What a refined file says besides the size and the model. `errors`: for each channel of the latent, the code of the rms of
    E(picture) - E(base)."""

    base: str
    errors: list[int]
    seed: int = 0
    prompt: str = ""

    def to_bytes(self):
        """ValueError if a number is out of its field's range."""
        numbers = bytes([BASE_NUMBERS[self.base], len(self.errors) - 1, *self.errors])
        return numbers + write_varint(self.seed) + self.prompt.encode()

    @classmethod
    def from_bytes(cls, data, limits=DEFAULT_LIMITS):
        """Inverse of `to_bytes`. Corrupt or LimitExceeded for what no encoder writes."""
        need(data, 2)
        bases = {number: name for name, number in BASE_NUMBERS.items()}
        if data[0] not in bases:
            raise Corrupt(f"the file names base codec {data[0]}; known are {BASE_NUMBERS}")
        start = 2 + data[1] + 1
        need(data, start)
        seed, end = read_varint(data, start)
        if seed > MAX_SEED:
            raise Corrupt(f"the file's seed is {seed}, above {MAX_SEED}")
        check_prompt(len(data) - end, limits)
        try:
            return cls(bases[data[0]], list(data[2:start]), seed, data[end:].decode())
        except UnicodeDecodeError as error:
            raise Corrupt("the prompt in the file is not UTF-8") from error


def error_of(code):
    """The rms error that a code stands for."""
    return 2.0 ** (SMALLEST_OCTAVE + code / CODES_PER_OCTAVE)


def code_of(error):
    """The code whose error is nearest, by ratio."""
    octaves = math.log2(error) if error > 0 else SMALLEST_OCTAVE
    return max(0, min(CODES - 1, round(CODES_PER_OCTAVE * (octaves - SMALLEST_OCTAVE))))


def read_file(data, limits=DEFAULT_LIMITS):
    """Parse a refined file: (header, parameters, the base's own file)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, REFINE)
    parameters = Parameters.from_bytes(header.parameters, limits)
    return header, parameters, container.read_payload(data, offset)[0]


def base_file(data, limits=DEFAULT_LIMITS):
    """The base's own file, as its codec wrote it."""
    return read_file(data, limits)[2]


def describe(data, limits=DEFAULT_LIMITS):
    """The facts of a refined file as plain values, without a model."""
    header, parameters, base = read_file(data, limits)
    return {
        "codec": "Refine",
        "width": header.width,
        "height": header.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (header.width * header.height),
        "model": header.fingerprint.hex(),
        "prompt": parameters.prompt,
        "base": parameters.base,
        "base_bytes": len(base),
        "errors": [error_of(code) for code in parameters.errors],
        "seed": parameters.seed,
        "complete": True,  # a file that was cut short cannot be read
    }
