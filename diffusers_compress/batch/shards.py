"""WebDataset tar shards: a shard in, a shard out, with its pictures in their new form."""

import io
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffusers_compress.batch.codec import Codec
from diffusers_compress.batch.manifest import has_digest, line, sha256_of
from diffusers_compress.batch.walk import Item, groups_of, targets
from diffusers_compress.batch.work import DISK_ERRORS, WRITE_BEHIND, ahead, coded, describe, finish, shape_of
from diffusers_compress.files import open_regular, whole_file, why_skipped


class Shard(NamedTuple):
    """A WebDataset tar: its name and path, its samples (lists of members), the items to code by their members' names, and what is
    named like one but is a link or a device."""

    name: str
    path: str
    samples: list[list[tarfile.TarInfo]]
    items: dict[str, Item]
    no_files: list[str]


@contextmanager
def opened(path: str) -> Iterator[tarfile.TarFile]:
    with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        yield tar


def open_shard(codec: Codec, name: str, path: str) -> Shard:
    """OSError, tarfile.TarError or ValueError if it is not a whole tar file of different names."""
    with opened(path) as tar:
        everything, members, rest = list(tar), [], []
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
            raise ValueError(f"{path}: cut or damaged: the end of the archive is missing")
    for member in everything:
        member.name = PurePosixPath(member.name).as_posix()  # `tar -cf shard.tar .` writes ./photo.jpg
        (members if member.isreg() and not member.issparse() else rest).append(member)
    if len({member.name for member in members}) < len(members):
        raise ValueError(f"{path}: holds several files of one name")
    pictures = [member for member in members if not why_skipped(member.name, codec.accepts)]
    others = {member.name for member in members} - {member.name for member in pictures}
    target = targets([member.name for member in pictures], codec.makes, others)
    items = {m.name: Item(f"{name}::{m.name}", target[m.name], path, m.offset_data, m.size) for m in pictures}
    no_files = [member.name for member in rest if not member.isdir() and not why_skipped(member.name, codec.accepts)]
    return Shard(name, path, samples_of(members), items, no_files)


def samples_of(members: list[tarfile.TarInfo]) -> list[list[tarfile.TarInfo]]:
    """As WebDataset has it, neighbours whose paths are the same up to the first dot of the name. A file that it passes over, for
    it has no dot or begins with one, stays with the sample before it."""
    samples, last = [], None
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        key = (folder, stem) if stem and dot else last
        if key != last or not samples:
            samples.append([])
        samples[-1].append(member)
        last = key
    return samples


def pictures_in(codec: Codec, path: str) -> int:
    """Pictures of a shard; 1 if it cannot be read, which takes one line of the manifest to say."""
    try:
        return len(open_shard(codec, "", path).items)
    except (OSError, tarfile.TarError, ValueError):
        return 1


def code_shard(codec: Codec, name: str, path: str, output: Path, known: dict, pool: Executor, record: Callable) -> None:
    """record([], 1) for each picture, and record(lines of the manifest, 0) once the whole shard is written, the last its own."""
    try:
        shard = open_shard(codec, name, path)
    except (OSError, tarfile.TarError, ValueError) as error:
        record([line(name, name, 0.0, error=describe(error))], 1)
        return
    if has_digest(output / name, known.get(name)):
        record([], len(shard.items))
        return
    try:
        record(write_shard(codec, shard, output / name, pool, record), 0)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        record([line(name, name, 0.0, error=describe(error))], 0)


def write_shard(codec: Codec, shard: Shard, target: Path, pool: Executor, record: Callable) -> list[dict]:
    """Code a shard into the file `target`; its lines of the manifest."""
    start = time.perf_counter()
    rows = [line(f"{shard.name}::{name}", name, 0.0, error="a link or device, not a file") for name in shard.no_files]
    with whole_file(target) as file, tarfile.open(fileobj=file, mode="w") as out, opened(shard.path) as tar:
        files, waiting = {}, deque(shard.samples)
        pictures = [member for sample in shard.samples for member in sample if member.name in shard.items]
        shapes = [shape_of(codec, partial(tar.extractfile, member)) for member in pictures]
        groups = groups_of(list(shard.items.values()), shapes, codec.batch_size)
        work = coded(codec, groups, lambda item: False, pool)
        for item, row, data in ahead(pool, partial(finish, codec), work, WRITE_BEHIND):
            files[item.name] = data
            rows.append(row)
            while waiting and all(shard.items[m.name].name in files for m in waiting[0] if m.name in shard.items):
                write_sample(out, tar, shard, waiting.popleft(), files)
            record([], 1)
        for sample in waiting:  # there is nothing to code in these
            write_sample(out, tar, shard, sample, files)
    facts = {"bytes": target.stat().st_size, "sha256": sha256_of(target)}
    return [*rows, line(shard.name, shard.name, time.perf_counter() - start, **facts)]


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
