"""The inputs of a batch, their names in the output, and their groups."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple


class Item(NamedTuple):
    """One input: its name in the manifest, the name of its output, and where its bytes lie (length -1: to the end)."""

    name: str
    target: str
    path: str
    start: int = 0
    length: int = -1


def find_inputs(source: str, accepts: Iterable[str]) -> dict[str, str]:
    """Name -> path of every input, sorted by name: its place in the output tree is its name.

    source: a folder (its whole tree; files of other suffixes and hidden ones are passed over), a file, a tar shard, a glob or
    brace pattern, or a text file of paths, one a line, which keep their folders. FileNotFoundError if there is none.
    """
    suffixes = {*accepts, ".tar"}
    if os.path.isdir(source):
        base, paths = source, [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
        paths = [path for path in paths if not any(part.startswith(".") for part in Path(path).relative_to(source).parts)]
        paths = [path for path in paths if Path(path).suffix.lower() in suffixes]
    elif not os.path.isfile(source):
        base, paths = os.path.dirname(re.split(r"[*?\[{]", source)[0]), expand(source)
    elif Path(source).suffix.lower() in suffixes:
        base, paths = os.path.dirname(source), [source]
    else:
        base, paths = "", [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not paths:
        raise FileNotFoundError(f"{source}: no input here with one of the suffixes {', '.join(sorted(suffixes))}")
    return dict(sorted((name_below(base, path), path) for path in paths))


def expand(pattern: str) -> list[str]:
    """The files of a glob, or of a brace pattern such as shard-{0000..0146}.tar."""
    patterns = [pattern]
    if "{" in pattern:
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise ImportError('for patterns with braces: pip install "diffusers_compress[batch]"') from error
        patterns = braceexpand(pattern)
    return [path for one in patterns for path in glob.glob(one, recursive=True) if os.path.isfile(path)]


def name_below(base: str, path: str) -> str:
    """The path below `base`, or without its root, with forward slashes. ValueError if it leads out of the output folder."""
    path = PurePath(os.path.relpath(path, base) if base else os.path.normpath(path))
    if ".." in path.parts:
        raise ValueError(f"{path}: leads out of the output folder; name it by a path without '..'")
    return path.relative_to(path.anchor).as_posix()


def targets(names: Iterable[str], suffix: str, taken: Iterable[str] = ()) -> dict[str, str]:
    """Name -> the same with `suffix` in place of its own, or behind its own where two would be the same or one of `taken`."""
    short, taken = {name: PurePath(name).with_suffix(suffix).as_posix() for name in names}, list(taken)
    count = Counter([*short.values(), *taken])
    chosen = {name: target if count[target] == 1 else name + suffix for name, target in short.items()}
    twice = [target for target, times in Counter([*chosen.values(), *taken]).items() if times > 1]
    if twice:
        raise ValueError(f"several inputs would become {twice[0]}; rename them")
    return chosen


def groups_of(items: list[Item], shapes: list, batch_size: int) -> list[list[Item]]:
    """Items of equal shape in batches, in the order of their first members."""
    by_shape = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    groups = [same[k : k + batch_size] for same in by_shape.values() for k in range(0, len(same), batch_size)]
    return [[items[i] for i in group] for group in sorted(groups)]


def is_shard(name: str) -> bool:
    return name.lower().endswith(".tar")


def shard_of(name: str) -> str:
    """Name of the shard that a picture's name in the manifest begins with."""
    return name[: name.find(".tar::") + 4]
