"""The symbols of a Relic file at both ends, with a trained or an adaptive entropy model."""

import json
import math
import zlib
from collections.abc import Callable, Generator

import numpy as np

from diffusers_compress.codecs.relic.format import (
    MODEL_NUMBERS,
    STEPS_PER_OCTAVE,
)
from diffusers_compress.codecs.relic.quantizer import Quantizer
from diffusers_compress.coding import context_model, logistic
from diffusers_compress.coding.logistic import UNIT
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.models import hyperprior
from diffusers_compress.weights import portable


def walk_through(model: Generator, transmit: Callable) -> None:
    """The coding loop, the same for both ends: `model` is a generator as in `context_model`, transmit(channel, positions, mean,
    index) -> v of these positions."""
    try:
        request = next(model)
        while True:
            request = model.send(transmit(*request))
    except StopIteration:
        pass


class Sender:
    """Collects the symbols of v [C, h w] with their distributions."""

    def __init__(self, v: np.ndarray, dither: np.ndarray):
        self.v, self.dither, self.symbols = v, dither, []

    def side_information(self, z: np.ndarray, index: list[int]) -> None:
        z = z.reshape(len(index), -1)
        self.symbols += [(k, np.zeros_like(k), np.full_like(k, i)) for k, i in zip(z, index)]

    def transmit(self, channel: int, positions: np.ndarray, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
        v = self.v[channel][positions]
        self.symbols.append(((v + self.dither[channel][positions]) // UNIT, mean, index))
        return v

    def bits(self) -> float:
        return float(logistic.code_length(*map(np.concatenate, zip(*self.symbols))).sum()) if self.symbols else 0.0

    def steps_to(self, bits: float) -> int:
        """By how many steps (of STEPS_PER_OCTAVE) the step width should grow for the symbols to take about so many bits."""
        count = np.bincount(np.concatenate([index for _, _, index in self.symbols] or [np.zeros(1, dtype=int)]))
        steps = np.arange(-4, 4, 1 / 64)  # octaves
        index = np.arange(len(count)) - logistic.PER_OCTAVE * steps[:, None]
        expected = (count * logistic.entropy(index)).sum(1)
        share = max(bits, 1) / max(self.bits(), 1)
        return round(STEPS_PER_OCTAVE * float(np.interp(-share * expected[len(steps) // 2], -expected, steps)))

    def payload(self) -> bytes:
        encoder = Encoder()
        for symbols in self.symbols:
            logistic.encode(encoder, *symbols)
        return encoder.getvalue()


class Receiver:
    """Reads v [C, h w], and what the distributions expect it to stand for."""

    def __init__(self, payload: bytes, dither: np.ndarray):
        self.decoder, self.dither = Decoder(payload), dither
        self.v, self.expected = np.zeros_like(dither), np.zeros(dither.shape)

    def side_information(self, shape: tuple[int, ...], index: list[int]) -> np.ndarray:
        zeros = np.zeros(math.prod(shape[1:]), dtype=np.int64)
        return np.stack([logistic.decode(self.decoder, zeros, zeros + i) for i in index]).reshape(shape)

    def transmit(self, channel: int, positions: np.ndarray, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
        k = logistic.decode(self.decoder, mean, index)
        dither = self.dither[channel][positions]
        self.v[channel][positions] = UNIT * k - dither
        self.expected[channel][positions] = logistic.expectation(k, mean, index) - dither
        return self.v[channel][positions]


class EntropyModel:
    """The distributions of the symbols: by a trained `HyperPrior`, or adaptive."""

    def __init__(self, statistics: dict, trained: hyperprior.HyperPrior | None = None):
        self.number = MODEL_NUMBERS["hyperprior" if trained else "adaptive"]
        self.trained = portable(trained) if trained else None
        digest = zlib.crc32(json.dumps(statistics["std"]).encode())
        self.tables = (zlib.crc32(self.trained.integer_bytes(), digest) if trained else digest) & 0xFFFF

    def send(self, quantizer: Quantizer, v: np.ndarray) -> Sender:
        """The `Sender` that has met all symbols."""
        sender = Sender(v, quantizer.dither)
        if quantizer.coded.any():
            z = None
            if self.trained:
                z = self.trained.side_information(v, quantizer.units, *quantizer.shape[1:])
                sender.side_information(z, self.trained.z_indices().long().tolist())
            walk_through(self.distributions(quantizer, z), sender.transmit)
        return sender

    def receive(self, quantizer: Quantizer, payload: bytes) -> Receiver:
        """The `Receiver` that has read all symbols. Corrupt if they cannot be."""
        receiver = Receiver(payload, quantizer.dither)
        if quantizer.coded.any():
            z = None
            if self.trained:
                index = self.trained.z_indices().long().tolist()
                z = receiver.side_information(self.trained.z_shape(*quantizer.shape[1:]), index)
            walk_through(self.distributions(quantizer, z), receiver.transmit)
        return receiver

    def distributions(self, quantizer: Quantizer, z: np.ndarray | None) -> Generator:
        where = (*quantizer.shape[1:], quantizer.units, quantizer.dither)
        if self.trained:
            return hyperprior.learned(self.trained, z, *where, quantizer.dithered)
        return context_model.adaptive(*where)
