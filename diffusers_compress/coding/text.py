"""Text to bits and back under static integer distributions: as words of a CLIP tokenizer, or as letters. FORMAT.md, section "PerCo", "Captions".

Words are token ids with what the tokenizer forgets (capitals, missing spaces) beside them, and serve only where they give the text
back exactly. Letters are the text's UTF-8 under the letters' distribution.
"""

import functools
import string
import zlib

import numpy as np

from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt
from diffusers_compress.format.limits import Limits, check_prompt

WORD_END = "</w>"

# Distributions, by frequencies. Tokens of CLIP are numbered by falling frequency from 512 on, so a class of them is an octave of numbers:
# a byte within a word, one that ends a word, 512, 513-514, 515-518, ... Counted on thirty captions that nothing was measured on.
TOKEN_CLASSES = (2, 61, 1, 1, 12, 9, 27, 4, 13, 6, 13, 19, 45, 41, 28, 32, 13, 4, 2, 1, 1, 1)
SINGLE_BYTES = 256
ENDS = {False: (15, 1), True: (1, 3)}  # goes on, ends; after a word, after a full stop
GLUES = {False: (63, 1), True: (1, 15)}  # after a space, without one; a word, punctuation
CASES = {False: (60, 3, 1), True: (32, 30, 2)}  # as the tokenizer gives it, first letter large, all large; inside, at the start
LETTERS = " etaoinsrhldcugmpfywbkv.,'x-jqz"  # by falling frequency in English, about
LENGTH_BITS = 4


def printable_bytes() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (Radford et al. 2019, GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = printable_bytes()


def byte_frequencies() -> tuple[int, ...]:
    """Of each byte: Zipf's distribution over the letters, little for large letters and figures, least for the rest."""
    frequencies = [1] * 256
    for rank, letter in enumerate(LETTERS):
        frequencies[ord(letter)] = 6000 // (rank + 4)
        frequencies[ord(letter.upper())] = max(frequencies[ord(letter.upper())], 150 // (rank + 4))
    for figure in b"0123456789":
        frequencies[figure] = 15
    return tuple(frequencies)


BYTE_FREQUENCIES = byte_frequencies()
SINGLE_FREQUENCIES = tuple(BYTE_FREQUENCIES[byte] for byte in ALPHABET.values())  # of tokens of one byte, in CLIP's order


class Vocabulary:
    """The tokens of a tokenizer that are made of bytes, and what tells them from another tokenizer's."""

    def __init__(self, tokenizer):
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        special = set(tokenizer.all_special_ids)
        self.bytes = {number: self.spelling(token) for token, number in tokens if number not in special}
        self.identity = zlib.crc32("\n".join(f"{number} {token}" for token, number in tokens).encode())

    @staticmethod
    def spelling(token: str) -> tuple[bytes, bool] | None:
        """The bytes of a token, and whether it ends a word; None if it is not made of bytes."""
        ends = token.endswith(WORD_END)
        letters = token.removesuffix(WORD_END)
        return (bytes(ALPHABET[c] for c in letters), ends) if letters and set(letters) <= ALPHABET.keys() else None


@functools.lru_cache(4)
def _vocabulary(tokenizer, size: int) -> Vocabulary:
    return Vocabulary(tokenizer)


def vocabulary_of(tokenizer) -> Vocabulary:
    """The same one as long as the tokenizer does not grow."""
    return _vocabulary(tokenizer, len(tokenizer))


def variants(word: str) -> list[str]:
    """The word in each of its cases. Only the letters of ASCII: what other letters become depends on the version of Unicode."""
    large = word.encode().upper().decode()
    return [word, large[:1] + word[1:], large]


def is_word(word: str) -> bool:
    return word[:1] not in string.punctuation


def ends_sentence(word: str) -> bool:
    return word in (".", "!", "?")


def split(text: str, tokenizer, vocabulary: Vocabulary) -> list[tuple[list[int], str, int, bool]] | None:
    """The words as (token ids, as the tokenizer spells it, case, glued to the one before); None if they do not make the text."""
    words, position, ids = [], 0, []
    for number in tokenizer(text, add_special_tokens=False, verbose=False).input_ids:
        ids.append(number)
        spelling = vocabulary.bytes.get(number)
        if spelling is None:
            return None
        if not spelling[1]:
            continue
        word = b"".join(vocabulary.bytes[i][0] for i in ids).decode(errors="replace")
        spaced = bool(words) and text.startswith(" ", position)
        position += spaced
        case = next((case for case, variant in enumerate(variants(word)) if text.startswith(variant, position)), None)
        if case is None:
            return None
        position += len(variants(word)[case])
        words.append((ids, word, case, bool(words) and not spaced))
        ids = []
    return words if words and not ids and position == len(text) else None


def encode_token(encoder: Encoder, number: int):
    kind = number // SINGLE_BYTES if number < 2 * SINGLE_BYTES else (number - 2 * SINGLE_BYTES + 1).bit_length() + 1
    encoder.encode(kind, TOKEN_CLASSES)
    if kind < 2:
        encoder.encode(number % SINGLE_BYTES, SINGLE_FREQUENCIES)
    else:
        encoder.encode_bits(number - 2 * SINGLE_BYTES + 1 - (1 << kind - 2), kind - 2)


def decode_token(decoder: Decoder) -> int:
    kind = decoder.decode(TOKEN_CLASSES)
    if kind < 2:
        return SINGLE_BYTES * kind + decoder.decode(SINGLE_FREQUENCIES)
    return 2 * SINGLE_BYTES - 1 + (1 << kind - 2) + decoder.decode_bits(kind - 2)


def encode_words(encoder: Encoder, words: list[tuple[list[int], str, int, bool]]):
    before = None
    for i, (ids, word, case, glued) in enumerate(words):
        for number in ids:
            encode_token(encoder, number)
        encoder.encode(case, CASES[before is None or ends_sentence(before)])
        if before is not None:
            encoder.encode(int(glued), GLUES[not is_word(word)])
        encoder.encode(int(i == len(words) - 1), ENDS[ends_sentence(word)])
        before = word


def decode_words(decoder: Decoder, vocabulary: Vocabulary, limits: Limits) -> str:
    """Corrupt or LimitExceeded for what no encoder writes."""
    text, before = "", None
    while True:
        word = decode_word(decoder, vocabulary, limits)
        case = decoder.decode(CASES[before is None or ends_sentence(before)])
        glued = before is None or decoder.decode(GLUES[not is_word(word)])
        text += ("" if glued else " ") + variants(word)[case]
        check_prompt(len(text.encode()), limits)
        if decoder.decode(ENDS[ends_sentence(word)]):
            return text
        before = word


def decode_word(decoder: Decoder, vocabulary: Vocabulary, limits: Limits) -> str:
    """The tokens up to one that ends a word."""
    word, ends = b"", False
    while not ends:
        number = decode_token(decoder)
        spelling = vocabulary.bytes.get(number)
        if spelling is None:
            raise Corrupt(f"the caption holds token {number}, which the tokenizer does not have")
        letters, ends = spelling
        word += letters
        check_prompt(len(word), limits)
    try:
        return word.decode()
    except UnicodeDecodeError as error:
        raise Corrupt("the caption holds a word that is not UTF-8") from error


def encode_bytes(encoder: Encoder, data: bytes):
    """The length as an Elias-gamma code, then the bytes."""
    bits = len(data).bit_length() - 1
    encoder.encode_bits(bits, LENGTH_BITS)
    encoder.encode_bits(len(data) - (1 << bits), bits)
    encoder.encode_all(np.frombuffer(data, dtype=np.uint8), np.tile(BYTE_FREQUENCIES, (len(data), 1)))


def decode_bytes(decoder: Decoder, limits: Limits) -> bytes:
    bits = decoder.decode_bits(LENGTH_BITS)
    length = (1 << bits) + decoder.decode_bits(bits)
    check_prompt(length, limits)
    return bytes(decoder.decode_all(np.tile(BYTE_FREQUENCIES, (length, 1))).astype(np.uint8))
