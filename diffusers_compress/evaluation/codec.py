"""What is evaluated under one label: a codec with its model and its options."""

import re
from ast import literal_eval
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from diffusers_compress.contract import CODECS
from diffusers_compress.evaluation.baselines import BASELINES

SUFFIX = ".dfc"  # of our codecs' files


@dataclass(frozen=True)
class Codec:
    """What is evaluated under one label: a name of `CODECS` or `BASELINES`; for ours a model, its name, and call options."""

    name: str
    model: str = ""
    model_name: str = ""
    encode_options: tuple = ()
    decode_options: tuple = ()

    @property
    def encoding(self) -> str:
        """What decides the file, in words: codecs that share it share files."""
        model = f"@{self.model_name}" if self.model_name else ""
        return "".join([self.name, model, *(f":encode.{name}={value}" for name, value in self.encode_options)])

    @property
    def label(self) -> str:
        return "".join([self.encoding, *(f":decode.{name}={value}" for name, value in self.decode_options)])

    @property
    def suffix(self) -> str:
        return BASELINES[self.name].suffix if self.name in BASELINES else SUFFIX


def parse_codec(text: str, model: str = "", model_name: str = "") -> Codec:
    """`NAME[:encode.OPTION=VALUE][:decode.OPTION=VALUE]...`, the options those of `compress` and `decompress`; ValueError.

    model: folder or Hub id; default: the codec's embedded one.
    """
    name, *parts = text.split(":")
    if name not in {**CODECS, **BASELINES}:
        raise ValueError(f"codec is {name!r}, permitted are {', '.join([*CODECS, *BASELINES])}")
    if name in BASELINES:
        if parts:
            raise ValueError(f"codec {name} takes no options, not {':'.join(parts)!r}")
        if name == "jxl" and find_spec("imagecodecs") is None:
            raise ValueError('codec jxl needs imagecodecs: pip install "diffusers_compress[eval]"')
        return Codec(name)
    options = {"encode": [], "decode": []}
    for part in parts:
        match = re.fullmatch(r"(encode|decode)\.(\w+)=(.*)", part)
        if not match:
            raise ValueError(f"codec option is {part!r}, permitted are encode.NAME=VALUE and decode.NAME=VALUE")
        options[match[1]].append((match[2], plain_value(match[3])))
    return Codec(name, model or CODECS[name].embedded_model(), model_name, tuple(options["encode"]), tuple(options["decode"]))


def split_codecs(text: str) -> list[str]:
    """The codecs of a list with commas between. After a comma within a value, such as ('wd',150), there is no letter."""
    return re.split(r",(?=[a-z])", text)


def parse_rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"rate is {text!r}, permitted are numbers of bits per pixel") from None


def plain_value(text: str):
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


_LOADED: dict[tuple, Any] = {}  # one pipeline at a time: a device may not hold two


def load_pipeline(name: str, model: str, device: str, dtype: str, target_bpp: float | None = None):
    """One of our pipelines on its device, silent, until another one is asked for. `target_bpp`: where a model folder has several rates."""
    options = {"preset": target_bpp} if CODECS[name].presets and target_bpp is not None else {}
    key = name, model, device, dtype, *options.values()
    if key not in _LOADED:
        _LOADED.clear()
        pipe = CODECS[name].pipeline_class().from_pretrained(model, dtype=getattr(torch, dtype), **options).to(device)
        pipe.set_progress_bar_config(disable=True)
        _LOADED[key] = pipe
    return _LOADED[key]
