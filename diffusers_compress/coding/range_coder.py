"""Entropy coding: symbols under integer frequency tables, in a range coder (first in, first out).

The only module that touches constriction. Bytes are the range coder's 32-bit words, most significant byte first, so that
a stream can be cut after any byte: the end is chosen so that whatever follows it decodes to the same symbols.
"""

import functools

import constriction
import numpy as np

from diffusers_compress.errors import Corrupt

_CATEGORICAL = constriction.stream.model.Categorical(perfect=False)
_UNIFORM = constriction.stream.model.Uniform()


@functools.lru_cache(1024)
def _categorical(frequencies: tuple[int, ...]):
    if min(frequencies) < 1 or len(frequencies) < 2:
        raise ValueError(f"frequencies {frequencies}: at least two are needed, each at least 1")
    return constriction.stream.model.Categorical(np.array(frequencies, dtype=np.float64), perfect=False)


class Encoder:
    """Range encoder. Symbols go in one by one; `getvalue` gives the bytes."""

    def __init__(self):
        self._coder = constriction.stream.queue.RangeEncoder()

    def encode(self, symbol: int, frequencies: tuple[int, ...]) -> None:
        """Costs about log2(sum(frequencies) / frequencies[symbol]) bits."""
        self._coder.encode(symbol, _categorical(frequencies))

    def encode_bits(self, value: int, num_bits: int) -> None:
        """`num_bits` (at most 23) equally likely bits."""
        if num_bits:
            self._coder.encode(value, constriction.stream.model.Uniform(1 << num_bits))

    def encode_all(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        """Symbols [N], each under its own table, a row of `frequencies` [N, m]: integers of at least 1."""
        if len(symbols):
            self._coder.encode(symbols.astype(np.int32), _CATEGORICAL, frequencies.astype(np.float64))

    def encode_run(self, symbols: np.ndarray, frequencies: tuple[int, ...]) -> None:
        """Symbols [N], all under one table."""
        self._coder.encode(symbols.astype(np.int32), _categorical(frequencies))

    def encode_bits_all(self, values: np.ndarray, num_bits: np.ndarray) -> None:
        """values [N] as num_bits [N] (1 to 23) equally likely bits each."""
        if len(values):
            self._coder.encode(values.astype(np.int32), _UNIFORM, (1 << num_bits).astype(np.int32))

    def getvalue(self, ended: bool = False) -> bytes:
        """Fewest bytes for which every continuation decodes to the symbols encoded so far; `ended`: for which a continuation by zeros does."""
        if self._coder.is_empty():
            return b""
        words = self._coder.get_compressed().astype(">u4").tobytes()
        position, (low, width) = self._coder.pos()
        size = 4 * (position + 2)
        sealed = int.from_bytes(words.ljust(size, b"\0"), "big")
        low = sealed - (sealed - low) % 2**64  # the sealed value lies in [low, low + width); pos gives low modulo 2**64
        for length in range(max(0, size - 8), size + 1):  # width < 2**64: the value differs in its last bytes alone
            unit = 1 << 8 * (size - length)
            value = -(-low // unit)
            if (value * unit < low + width) if ended else ((value + 1) * unit <= low + width):
                return value.to_bytes(length, "big")
        raise AssertionError("unreachable: the interval holds at least one value")


class Decoder:
    """Range decoder. What lies beyond the data reads as `padding` bytes. Corrupt data give wrong symbols or raise Corrupt."""

    def __init__(self, data: bytes, padding: int = 0):
        data = data + bytes([padding]) * (-len(data) % 4 + 16)  # of which a stream that an encoder wrote takes no more than 8
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, dtype=">u4").astype(np.uint32))

    def check_end(self) -> None:
        """Corrupt if much more was decoded than the data hold. It may take dozens of further symbols until this is noticed."""
        if self._coder.maybe_exhausted():
            raise Corrupt("the payload ends early: it was damaged; fetch or encode the file again")

    def decode(self, frequencies: tuple[int, ...]) -> int:
        return self._decode(_categorical(frequencies))

    def decode_bits(self, num_bits: int) -> int:
        return self._decode(constriction.stream.model.Uniform(1 << num_bits)) if num_bits else 0

    def decode_all(self, frequencies: np.ndarray) -> np.ndarray:
        """What `encode_all` wrote under these tables, [N] int64."""
        return self._decode_all(_CATEGORICAL, frequencies.astype(np.float64))

    def decode_run(self, count: int, frequencies: tuple[int, ...]) -> np.ndarray:
        """What `encode_run` wrote under this table, [count] int64."""
        return self._checked(_categorical(frequencies), count).astype(np.int64)

    def decode_bits_all(self, num_bits: np.ndarray) -> np.ndarray:
        """What `encode_bits_all` wrote, [N] int64."""
        return self._decode_all(_UNIFORM, (1 << num_bits).astype(np.int32))

    def _decode(self, model) -> int:
        return int(self._checked(model))

    def _decode_all(self, family, parameters) -> np.ndarray:
        if not len(parameters):
            return np.zeros(0, dtype=np.int64)
        return self._checked(family, parameters).astype(np.int64)

    def _checked(self, *model):
        try:
            return self._coder.decode(*model)
        except AssertionError as error:  # a point outside of every symbol's interval, which no encoder makes
            raise Corrupt("the payload is no stream of the range coder") from error
