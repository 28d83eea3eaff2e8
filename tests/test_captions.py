import gzip
import json
import zlib
from importlib.util import find_spec
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

from diffusers_compress import LimitExceeded, captions, embedded_model
from diffusers_compress.codecs.perco.format import BYTES, NO_CAPTION, WORDS
from diffusers_compress.codecs.perco.payload import choose_caption, decode_caption
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.coding.text import ALPHABET, vocabulary_of
from diffusers_compress.errors import BitstreamError
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

ROOT = Path(__file__).parents[1]
CAPTIONS = (ROOT / "benchmarks" / "captions.txt").read_text(encoding="utf-8").splitlines()


def clip_tokenizer(folder):
    """The tokenizer of CLIP, and so of Stable Diffusion, from the merges that open_clip ships."""
    from transformers import CLIPTokenizer

    path = Path(find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.open(path, "rt", encoding="utf-8").read().split("\n")[1 : 49152 - 512 - 2 + 257]
    single = list(ALPHABET)
    tokens = single + [token + "</w>" for token in single] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_tokenizer(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def letters():
    """The embedded model's tokenizer: bytes, no merges."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(embedded_model(), subfolder="tokenizer")


def coded(text, tokenizer):
    """(way, bytes)"""
    way, encode = choose_caption(text, tokenizer, vocabulary_of(tokenizer))
    encoder = Encoder()
    encode(encoder)
    return way, encoder.getvalue()


def decoded(way, data, tokenizer, limits=DEFAULT_LIMITS):
    return decode_caption(way, Decoder(data), vocabulary_of(tokenizer), limits)


def test_the_vocabulary_is_clips(clip):
    assert len(clip) == 49408
    ids = clip("a photo of a cat", add_special_tokens=False).input_ids
    assert ids == [320, 1125, 539, 320, 2368]  # as CLIP's own tokenizer numbers them


def test_captions_take_at_most_half_of_zlibs_bytes(clip):
    """The bytes of the caption and the one that tells the vocabulary, against zlib at its best."""
    assert len(CAPTIONS) >= 50 and all(8 <= len(caption.split()) <= 20 for caption in CAPTIONS)
    ours = sum(len(coded(caption, clip)[1]) + 1 for caption in CAPTIONS)
    assert ours <= 0.37 * sum(len(zlib.compress(caption.encode(), 9)) for caption in CAPTIONS)


@pytest.mark.parametrize("text", CAPTIONS[::6])
def test_ordinary_captions_are_words(clip, text):
    way, data = coded(text, clip)
    assert way == WORDS and decoded(way, data, clip) == text


TEXTS = [
    "",
    "a",
    "Hello, World! It's 5 o'clock. NASA",
    "don't  Stop!! naïve café 😀 a\nb",
    " a leading space",
    "a trailing space ",
    "ß STRASSE İstanbul ﬁn ǆ",
    "e\u0301 and \u00e9",
    "<|endoftext|> a <|startoftext|>",
    "\x00\x01\u202e\ufffd",
    "日本語の文、ひとつ。",
    "x" * 4096,
    "a " * 2048,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_caption_comes_back(clip, letters, text):
    for tokenizer in (clip, letters):
        way, data = coded(text, tokenizer)
        assert decoded(way, data, tokenizer) == text
        assert (way == NO_CAPTION) == (text == "")


@given(st.text(max_size=60))
def test_any_unicode_comes_back(clip, text):
    way, data = coded(text, clip)
    assert decoded(way, data, clip) == text


@given(st.lists(st.sampled_from(["a", "Dog", "U.S.", "it's", ",", "!", "-", " ", "\t", "x1", "ÉTÉ"]), max_size=12).map("".join))
def test_mixed_cases_and_spaces_come_back(clip, text):
    way, data = coded(text, clip)
    assert decoded(way, data, clip) == text


def test_the_smaller_way_is_taken(clip, letters):
    assert coded("a dog runs along the beach", clip)[0] == WORDS
    assert coded("a dog runs along the beach", letters)[0] == BYTES
    assert coded("x", clip)[0] == BYTES


def test_letters_take_fewer_bytes_than_zlib_too(letters):
    ours = sum(len(coded(caption, letters)[1]) for caption in CAPTIONS)
    assert ours < 0.7 * sum(len(zlib.compress(caption.encode(), 9)) for caption in CAPTIONS)


def test_too_long_captions_are_refused(clip):
    with pytest.raises(ValueError, match="at most 4096 bytes, not 4097"):
        coded("x" * 4097, clip)
    for tokenizer_way in ((clip, "a dog in the park"), (clip, "\x00" * 50)):
        way, data = coded(tokenizer_way[1], tokenizer_way[0])
        with pytest.raises(LimitExceeded, match="Limits.prompt_bytes"):
            decoded(way, data, clip, Limits(prompt_bytes=10))


@pytest.mark.parametrize("way", [WORDS, BYTES])
def test_noise_gives_a_short_text_or_an_error(clip, way):
    """No stream decodes to more than the limit: no bomb."""
    for seed in range(60):
        data = np.random.default_rng(seed).bytes(40) if seed else b""
        try:
            assert len(decoded(way, data, clip).encode()) <= 4096
        except BitstreamError:
            pass


def test_vocabularies_are_told_apart(clip, letters):
    assert vocabulary_of(clip) is vocabulary_of(clip)
    assert vocabulary_of(clip).identity != vocabulary_of(letters).identity


# ----------------------------------------------------------------------------------------------- models that describe pictures


def test_a_captioner_of_transformers(tmp_path):
    """BLIP's own layout, small and of random weights: from a folder, to one text for each picture."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "house", "[DEC]", "[ENC]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 8, "eos_token_id": 3, "sep_token_id": 3}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), BertTokenizer(str(tmp_path / "vocab.txt"))).save_pretrained(tmp_path / "blip")

    captioner = captions.load_captioner(str(tmp_path / "blip"), max_tokens=5)
    texts = captioner([Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")])
    assert len(texts) == 2 and all(isinstance(text, str) and len(text.split()) <= 5 for text in texts)


def test_a_captioner_of_open_clip(tmp_path):
    """CoCa, small and of random weights, registered with open_clip like its own configurations."""
    import open_clip

    tower = {
        "context_length": 76,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    }
    vision = {
        "image_size": 32,
        "layers": 1,
        "width": 16,
        "patch_size": 16,
        "head_width": 8,
        "attentional_pool": True,
        "output_tokens": True,
    }
    vision |= {"attn_pooler_heads": 2}
    decoder = {"context_length": 76, "vocab_size": 49408, "layers": 1, "heads": 2, "width": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": tower, "multimodal_cfg": decoder, "custom_text": True}
    (tmp_path / "coca_tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    captioner = captions.load_captioner("open_clip:coca_tiny", max_tokens=8)
    texts = captioner([Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")])
    assert len(texts) == 2 and all(isinstance(text, str) and "<start_of_text>" not in text for text in texts)
