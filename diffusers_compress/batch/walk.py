"""The inputs of a batch, their names in the output, and their groups."""

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from diffusers_compress.files import WALKED, Found, find_files, read_text, why_skipped


class Item(NamedTuple):
    """One input: its name in the manifest, the name of its output, and where its bytes lie (length -1: to the end)."""

    name: str
    target: str
    path: str
    start: int = 0
    length: int = -1


def find_inputs(source: str, accepts: Collection[str]) -> Found:
    """The inputs: the name of each is its place in the output tree.

    source: a folder (its whole tree, see `files.find_files`), a file, a tar shard, a glob or brace pattern, or a text file of
    paths, one a line, which keep their folders. A pattern passes over what a folder does; what is named itself is an input.
    FileNotFoundError if there is none, ValueError for a list that cannot be read.
    """
    suffixes, skipped = frozenset({*accepts, ".tar"}), {}
    if os.path.isdir(source):
        paths, skipped = find_files(source, suffixes)
    elif os.path.isfile(source):
        named = Path(source).suffix.lower() in suffixes
        base, names = (os.path.dirname(source), [source]) if named else ("", read_list(source))
        paths = {name_below(base, path): path for path in names}
    else:
        base = os.path.dirname(re.split(r"[*?\[{]", source)[0])
        paths = {name_below(base, path): path for path in expand(source)}
        links = known_folders(paths.values())
        reasons = {
            name: WALKED if os.path.dirname(path) in links else why_skipped(name, suffixes) for name, path in paths.items()
        }
        skipped = {name: reason for name, reason in sorted(reasons.items()) if reason}
    if not paths.keys() - skipped.keys():
        raise FileNotFoundError(f"{source}: no input here with one of the suffixes {', '.join(sorted(suffixes))}")
    return Found({name: paths[name] for name in sorted(paths) if name not in skipped}, skipped)


def read_list(path: str) -> list[str]:
    """The lines of a text file of paths. ValueError if it is none."""
    try:
        return [line for line in read_text(path).split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{error}; an input is a picture or file of ours, a tar shard, or a text file of paths") from None


def expand(pattern: str) -> list[str]:
    """The files of a glob, or of a brace pattern such as shard-{0000..0146}.tar; of the latter also those that are not there."""
    if "{" not in pattern:
        return [path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise ImportError('for patterns with braces: pip install "diffusers_compress[batch]"') from error
    found = [[one] if not glob.has_magic(one) else glob.glob(one, recursive=True) for one in braceexpand(pattern)]
    return [path for some in found for path in some if not os.path.isdir(path)]


def known_folders(paths: Iterable[str]) -> set[str]:
    """Those of the paths' folders that are another of them by a longer path, through a link."""
    folders = sorted({os.path.dirname(path) for path in paths}, key=lambda folder: (len(folder), folder))
    first = {}
    return {folder for folder in folders if first.setdefault(os.path.realpath(folder), folder) != folder}


def name_below(base: str, path: str) -> str:
    """The path below `base`, or without its root, with forward slashes. ValueError if it leads out of the output folder."""
    below = PurePath(os.path.relpath(path, base) if base else os.path.normpath(path))
    if ".." in below.parts:
        raise ValueError(f"{below}: leads out of the output folder; name it by a path without '..'")
    return below.relative_to(below.anchor).as_posix()


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
