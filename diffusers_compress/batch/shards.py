"""WebDataset tar shards: a shard in, a shard out, with its pictures in their new form."""

import io
import tarfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial
from itertools import groupby
from pathlib import Path, PurePath
from typing import NamedTuple

from diffusers_compress.batch.codec import Codec
from diffusers_compress.batch.manifest import line, sha256_of
from diffusers_compress.batch.walk import Item, groups_of, targets
from diffusers_compress.batch.work import WRITE_BEHIND, ahead, coded, describe, finish, shape_of
from diffusers_compress.files import whole_file


class Shard(NamedTuple):
    """A WebDataset tar: its name and path, its samples (lists of members), and the items to code by their members' names."""

    name: str
    path: str
    samples: list[list[tarfile.TarInfo]]
    items: dict[str, Item]


def open_shard(codec: Codec, name: str, path: str) -> Shard:
    """OSError, tarfile.TarError or ValueError if it is not a whole tar file of different names."""
    with tarfile.open(path, "r:") as tar:
        members = [member for member in tar if member.isfile()]
    if len({member.name for member in members}) < len(members):
        raise ValueError(f"{path}: holds several files of one name")
    pictures = [member for member in members if PurePath(member.name).suffix.lower() in codec.accepts]
    others = [member.name for member in members if PurePath(member.name).suffix.lower() not in codec.accepts]
    target = targets([member.name for member in pictures], codec.makes, others)
    items = {m.name: Item(f"{name}::{m.name}", target[m.name], path, m.offset_data, m.size) for m in pictures}
    return Shard(name, path, [list(sample) for _, sample in groupby(members, sample_key)], items)


def sample_key(member: tarfile.TarInfo) -> tuple[str, str]:
    """The path up to the first dot of the file's own name: WebDataset takes what has the same key for one sample."""
    folder, _, name = member.name.rpartition("/")
    return folder, name.partition(".")[0]


def pictures_in(codec: Codec, path: str) -> int:
    """Pictures of a shard; 1 if it cannot be read, which takes one line of the manifest to say."""
    try:
        return len(open_shard(codec, "", path).items)
    except (OSError, tarfile.TarError, ValueError):
        return 1


def code_shard(codec: Codec, name: str, path: str, output: Path, known: dict, pool: Executor) -> Iterator[tuple]:
    """(1, []) for each picture, and (0, lines of the manifest) once the whole shard is written, the last of them its own."""
    start, rows, target = time.perf_counter(), [], output / name
    try:
        shard = open_shard(codec, name, path)
    except (OSError, tarfile.TarError, ValueError) as error:
        yield 1, [line(name, name, 0.0, error=describe(error))]
        return
    if target.is_file() and known.get(name) == sha256_of(target):
        yield len(shard.items), []
        return
    with whole_file(target) as file, tarfile.open(fileobj=file, mode="w") as out, tarfile.open(path, "r:") as tar:
        files, waiting = {}, deque(shard.samples)
        shapes = [shape_of(codec, partial(tar.extractfile, member)) for member in shard.items]
        groups = groups_of(list(shard.items.values()), shapes, codec.batch_size)
        work = coded(codec, groups, lambda item: False, pool)
        for item, row, data in ahead(pool, partial(finish, codec), work, WRITE_BEHIND):
            files[item.name] = data
            rows.append(row)
            while waiting and all(shard.items[m.name].name in files for m in waiting[0] if m.name in shard.items):
                write_sample(out, tar, shard, waiting.popleft(), files)
            yield 1, []
        for sample in waiting:  # there is nothing to code in these
            write_sample(out, tar, shard, sample, files)
    facts = {"bytes": target.stat().st_size, "sha256": sha256_of(target)}
    yield 0, [*rows, line(name, name, time.perf_counter() - start, **facts)]


def write_sample(out: tarfile.TarFile, tar: tarfile.TarFile, shard: Shard, sample: list[tarfile.TarInfo], files: dict):
    """A sample with its pictures in their new form and all else as it was; nothing if one of its pictures failed."""
    members = {}
    for member in sample:
        item = shard.items.get(member.name)
        members[item.target if item else member.name] = files.pop(item.name) if item else tar.extractfile(member).read()
    if None in members.values():
        return
    for name, data in members.items():
        info = tarfile.TarInfo(name)  # nothing of the day or the user: the same input gives the same bytes
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
