"""The command `info`."""

import os
import sys
from importlib import import_module
from pathlib import Path

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import Find, MaxPixels, Source
from diffusers_compress.cli.paths import read_input
from diffusers_compress.cli.terminal import explain
from diffusers_compress.format.container import CODECS, Header, read_header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def info_command(source: Source, find: Find = None, max_pixels: MaxPixels = DEFAULT_LIMITS.pixels):
    """Say what a compressed file holds, without a model, and, asked to, which of your models it was made with."""
    data, limits = read_input(source), Limits(pixels=max_pixels)
    facts = describe(data, limits)
    width = max(map(len, facts))
    for name, value in facts.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:{width}}  {text if text.isprintable() else repr(text)}")  # a prompt must not steer the terminal
    if find:
        find_model(read_header(data, limits)[0], find)


def find_model(header: Header, folders: list[Path]):
    """Say which model folders below these a file was made with. FileNotFoundError if none."""
    known = {index.parent: model_identity(index.parent, header) for folder in folders for index in model_indices(folder)}
    for folder, identity in known.items():
        if identity == header.fingerprint.hex():
            print(f"made with  {folder}")
    if header.fingerprint.hex() not in known.values():
        for folder, identity in known.items():
            print(f"not {folder}: {identity}", file=sys.stderr)
        raise FileNotFoundError(f"model {header.fingerprint.hex()} is none of the {len(known)} model folders there")


def model_indices(folder: Path) -> list[Path]:
    """Of pipelines, and of PerCo's adapters."""
    indices = {"model_index.json", "adapter.json"}
    return sorted(Path(path, name) for path, _, names in os.walk(folder) for name in indices.intersection(names))


def model_identity(folder: Path, header: Header) -> str:
    """The fingerprint that files of this codec made with a model folder bear, in hex, or why there is none."""
    try:
        return loading.load(str(folder), "cpu", "bfloat16", CODECS[header.codec].lower()).fingerprint().hex()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one folder, the next may be the right one
        return explain(error)


def describe(data: bytes, limits: Limits) -> dict:
    """The facts of a compressed file; BitstreamError by kind if it is none."""
    header, _ = read_header(data, limits)  # a file that is none of ours is told at once

    return import_module(f"diffusers_compress.codecs.{CODECS[header.codec].lower()}.format").describe(data, limits)
