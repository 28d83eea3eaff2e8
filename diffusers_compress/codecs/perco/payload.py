"""The payload of a PerCo file: the grid of indices and the caption. FORMAT.md, section "PerCo"."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from diffusers_compress.codecs.perco.format import BYTES, NO_CAPTION, WORDS, Parameters
from diffusers_compress.coding import grid_model
from diffusers_compress.coding.grid_model import Codebook
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.coding.text import (
    Vocabulary,
    decode_bytes,
    decode_words,
    encode_bytes,
    encode_words,
    split,
    vocabulary_of,
)
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.format.bits import BitReader, BitWriter
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits
from diffusers_compress.models.hyper_encoder import HyperEncoder


def smallest_file(header: Header, grid: np.ndarray, caption: str, seed: int, hyper_encoder: HyperEncoder, tokenizer) -> bytes:
    """The file of a grid [a, b] of indices and a caption, the indices modelled or as they are, whichever takes fewer bytes."""
    vocabulary, codebook, stride = vocabulary_of(tokenizer), hyper_encoder.probability_model(), hyper_encoder.config.stride
    way, encode_caption = choose_caption(caption, tokenizer, vocabulary)
    files = []
    for modelled in (True, False):
        parameters = Parameters(stride, bits_of(codebook.size), modelled, way, vocabulary.identity & 0xFF, seed)
        whole = replace(header, parameters=parameters.to_bytes())
        files.append(container.pack(whole, pack_payload(grid, codebook, modelled, encode_caption)))
    return min(files, key=len)


def pack_payload(grid: np.ndarray, codebook: Codebook, modelled: bool, encode_caption: Callable[[Encoder], None]) -> bytes:
    """Payload of a grid [a, b] of indices and a caption."""
    encoder, plain = Encoder(), b""
    encode_caption(encoder)
    if modelled:
        grid_model.encode(encoder, grid, codebook)
    else:
        writer = BitWriter()
        for index in grid.flatten().tolist():
            writer.write(index, bits_of(codebook.size))
        plain = writer.to_bytes(pad=0)
    return plain + encoder.getvalue()


def unpack_payload(
    payload: bytes, parameters: Parameters, shape: tuple[int, int], codebook: Codebook, vocabulary: Vocabulary, limits: Limits
) -> tuple[np.ndarray, str]:
    """(grid [a, b], caption). Corrupt or LimitExceeded for what no encoder writes."""
    if parameters.modelled:
        decoder = Decoder(payload)
        caption = decode_caption(parameters.caption, decoder, vocabulary, limits)
        return grid_model.decode(decoder, shape, codebook), caption
    size = -(-shape[0] * shape[1] * parameters.bits // 8)
    reader = BitReader(payload[:size])
    grid = torch.tensor([reader.read(parameters.bits) for _ in range(shape[0] * shape[1])]).reshape(shape).numpy()
    if grid.max() >= codebook.size:
        raise Corrupt(f"the file holds index {grid.max()}, the codebook has {codebook.size}")
    return grid, decode_caption(parameters.caption, Decoder(payload[size:]), vocabulary, limits)


def bits_of(size: int) -> int:
    """Of an index in a codebook of this size."""
    return (size - 1).bit_length()


def choose_caption(text: str, tokenizer, vocabulary: Vocabulary) -> tuple[int, Callable[[Encoder], None]]:
    """How a caption is coded in fewest bytes, and what does it. ValueError if it is too long."""
    data = text.encode()
    if len(data) > DEFAULT_LIMITS.prompt_bytes:
        raise ValueError(f"a caption may have at most {DEFAULT_LIMITS.prompt_bytes} bytes, not {len(data)}")
    if not text:
        return NO_CAPTION, lambda encoder: None
    words = split(text, tokenizer, vocabulary)
    ways = {BYTES: lambda encoder: encode_bytes(encoder, data)}
    if words is not None:
        ways[WORDS] = lambda encoder: encode_words(encoder, words)
    way = min(ways, key=lambda way: size_of(ways[way]) + (way == WORDS))  # a byte of the vocabulary goes with WORDS
    return way, ways[way]


def size_of(encode: Callable[[Encoder], None]) -> int:
    encoder = Encoder()
    encode(encoder)
    return len(encoder.getvalue())


def decode_caption(way: int, decoder: Decoder, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS) -> str:
    """The caption. Corrupt or LimitExceeded for what no encoder writes."""
    if way == WORDS:
        return decode_words(decoder, vocabulary, limits)
    try:
        return decode_bytes(decoder, limits).decode() if way == BYTES else ""
    except UnicodeDecodeError as error:
        raise Corrupt("the caption in the file is not UTF-8") from error
