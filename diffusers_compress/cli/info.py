"""The command `info`. It imports no torch, numpy or diffusers, unless it is to find a model."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import Find, MaxPixels, Source
from diffusers_compress.cli.paths import read_input
from diffusers_compress.cli.terminal import complain, explain, tell
from diffusers_compress.codecs import codec_of, describe
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

LONGEST = 6  # numbers of a list that are shown


def info_command(
    source: Source,
    find: Find = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, lists in full.")] = False,
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels,
):
    """Say what a compressed file holds, without a model, and, asked to, which of your models it was made with."""
    data, limits = read_input(source), Limits(pixels=max_pixels)
    facts = describe(data, limits)
    models = model_folders(codec_of(data, limits), find) if find else {}
    made_with = [str(folder) for folder, identity in models.items() if identity == facts["model"]]
    if as_json:
        tell(json.dumps(facts | ({"made_with": made_with} if find else {})))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            tell(f"{name:{width}}  {shown(value)}")
        for folder in made_with:
            tell(f"made with  {folder}")
    if find and not made_with:
        for other, identity in models.items():
            complain(f"not {other}: {identity}")
        raise FileNotFoundError(f"model {facts['model']} is none of the {len(models)} model folders there")


def shown(value: Any) -> str:
    """A fact in one short line."""
    if isinstance(value, list):
        numbers = [shown(number) for number in value]
        rest = f", ... ({len(numbers)} in all)" if len(numbers) > LONGEST else ""
        return f"[{', '.join(numbers[:LONGEST])}{rest}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def model_folders(codec: str, folders: list[Path]) -> dict[Path, str]:
    """Model folders below these -> the fingerprint that files of this codec made with it bear, in hex, or why there is none."""
    return {index.parent: model_identity(index.parent, codec) for folder in folders for index in model_indices(folder)}


def model_indices(folder: Path) -> list[Path]:
    """Of pipelines, and of adapters."""
    indices = {"model_index.json", "adapter.json"}
    return sorted(Path(path, name) for path, _, names in os.walk(folder) for name in indices.intersection(names))


def model_identity(folder: Path, codec: str) -> str:
    try:
        # An adapter's base may be on the Hub, which is not asked here.
        return loading.load(str(folder), "cpu", "bfloat16", codec, local_files_only=True).fingerprint().hex()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one folder, the next may be the right one
        return explain(error)
