"""The payload of a Text+Sketch file: token ids, thumbnail, sketch, in one stream. FORMAT.md, section "Text+Sketch"."""

from dataclasses import dataclass, field

import numpy as np

from diffusers_compress.codecs.text_sketch import thumbnail
from diffusers_compress.codecs.text_sketch.format import IDS, NO_PROMPT, WORDS, Parameters, grid_shape
from diffusers_compress.coding import sketch_model
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.coding.text import decode_token, encode_token
from diffusers_compress.errors import Corrupt

COUNT_BITS = 7  # of the number of tokens
ID_BITS = 16


@dataclass
class Content:
    """What a file says of a picture: token ids of the prompt; the thumbnail's integers [3, rows, columns]; levels [rows, columns] of the
    sketch, None if there is none."""

    ids: list[int] = field(default_factory=list)
    thumbnail: np.ndarray | None = None
    sketch: np.ndarray | None = None


def encode_ids(encoder: Encoder, ids: list[int], way: int) -> None:
    encoder.encode_bits(len(ids), COUNT_BITS)
    for number in ids:
        if way == WORDS:
            encode_token(encoder, number)
        else:
            encoder.encode_bits(number, ID_BITS)


def decode_ids(decoder: Decoder, way: int) -> list[int]:
    count = decoder.decode_bits(COUNT_BITS)
    return [decode_token(decoder) if way == WORDS else decoder.decode_bits(ID_BITS) for _ in range(count)]


def way_of(ids: list[int]) -> int:
    """How ids are coded in fewest bytes. ValueError for one that does not fit in 16 bits."""
    if not ids:
        return NO_PROMPT
    if max(ids) >> ID_BITS:
        raise ValueError(f"the prompt holds token {max(ids)}; a file holds ids below {1 << ID_BITS}")

    def size(way):
        encoder = Encoder()
        encode_ids(encoder, ids, way)
        return len(encoder.getvalue())

    return min((WORDS, IDS), key=size)


def encode(content: Content, parameters: Parameters) -> bytes:
    """The payload."""
    encoder = Encoder()
    if content.ids:
        encode_ids(encoder, content.ids, parameters.prompt)
    if content.thumbnail is not None:
        thumbnail.encode(encoder, content.thumbnail)
    if content.sketch is not None:
        sketch_model.encode(encoder, content.sketch, parameters.levels)
    return encoder.getvalue()


def decode(payload: bytes, parameters: Parameters, height: int, width: int) -> Content:
    """What `encode` wrote of a picture of height x width pixels. Corrupt for values that no encoder writes."""
    decoder, content = Decoder(payload), Content()
    if parameters.prompt:
        content.ids = decode_ids(decoder, parameters.prompt)
        if not content.ids:
            raise Corrupt("the file's prompt has no tokens; fetch or encode the file again")
    if parameters.thumbnail:
        content.thumbnail = thumbnail.decode(decoder, grid_shape(height, width, parameters.thumbnail))
    if parameters.side:
        content.sketch = sketch_model.decode(decoder, grid_shape(height, width, parameters.side), parameters.levels)
    return content
