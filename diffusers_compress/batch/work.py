"""Reading, coding and writing, one after the other and at the same time."""

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from diffusers_compress.batch.codec import Codec
from diffusers_compress.batch.manifest import has_digest, line, sha256
from diffusers_compress.batch.walk import Item
from diffusers_compress.files import open_regular, write_file

READ_AHEAD = 2  # groups
WRITE_BEHIND = 32  # files
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # that no name is to blame for
GIVE_UP = 100  # pictures in a row that were read and could not be coded: then it is not the pictures


def shape_of(codec: Codec, open_file: Callable[[], BinaryIO]) -> tuple[int, int]:
    """(columns, rows) in units of `multiple`; (0, 0) if the file does not tell: reading it in full will say why."""

    def size():
        with open_file() as file:
            return codec.size(file)

    found = attempt(size)
    width, height = (0, 0) if isinstance(found, Exception) else found
    return -(-width // codec.multiple), -(-height // codec.multiple)


def ahead(pool: Executor, function: Callable, arguments: Iterable, depth: int) -> Iterator:
    """function of each argument, in order, computed in the pool while the caller is at earlier ones, at most `depth` ahead."""
    waiting = deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_item(codec: Codec, item: Item) -> Any:
    """What the network takes."""
    with open_regular(item.path) as file:
        file.seek(item.start)
        return codec.load(file.read(item.length))


def attempt(function: Callable, *arguments) -> Any:
    """What the function returns, or the error that it raises: one picture's failure, of any kind, ends nothing else."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001
        # Tracebacks hold all that the call had in memory, which a smaller batch may need.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return error


def read_group(codec: Codec, is_done: Callable[[Item], bool], group: list[Item]) -> tuple[list[Item], list[Item], dict]:
    """(items done, items to do, item -> what was read). A group to be coded is read whole: in another company a picture's
    network outputs, and so its bytes, could differ."""
    done = [item for item in group if is_done(item)]
    to_do = [item for item in group if item not in done]
    return done, to_do, {item: attempt(read_item, codec, item) for item in group} if to_do else {}


def code_all(code: Callable[[list], list], inputs: list) -> list:
    """Result of each input, or its error. A batch that fails is coded one by one: the others need not fail with it."""
    results = attempt(code, inputs)
    if not isinstance(results, Exception):
        return results
    return [results] if len(inputs) == 1 else [code_all(code, [one])[0] for one in inputs]


def coded(codec: Codec, groups: Iterable, is_done: Callable[[Item], bool], pool: Executor) -> Iterator[tuple]:
    """(item, result, seconds) of every item, the result being None if the item was done before and an error if it failed."""
    failures = 0
    for done, to_do, read in ahead(pool, partial(read_group, codec, is_done), groups, READ_AHEAD):
        yield from ((item, None, 0.0) for item in done)
        results = {item: error for item, error in read.items() if isinstance(error, Exception)}
        good = [item for item in read if item not in results]
        start = time.perf_counter()
        if any(item in good for item in to_do):
            results.update(zip(good, code_all(codec.code, [read[item] for item in good])))
            failures = failures + len(good) if all(isinstance(results[item], Exception) for item in good) else 0
        seconds = (time.perf_counter() - start) / max(1, len(good))
        yield from ((item, results[item], seconds if item in good else 0.0) for item in to_do)
        if failures >= GIVE_UP:
            raise RuntimeError(f"{failures} pictures in a row failed, the last one: {describe(results[good[-1]])}")


def finish(codec: Codec, one: tuple) -> tuple[Item, dict | None, bytes | None]:
    """(item, its line of the manifest, its file) of one result; no line if it was done before, no file if it failed."""
    item, result, seconds = one
    if result is None:
        return item, None, None
    if isinstance(result, Exception):
        return item, line(item.name, item.target, seconds, error=describe(result)), None
    result, pixels, notes = result
    data = codec.dump(result)
    facts = {"bytes": len(data), "bpp": 8 * len(data) / pixels, "sha256": sha256(data), "notes": notes}
    return item, line(item.name, item.target, seconds, **facts), data


def describe(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"


def code_files(
    codec: Codec, groups: list[list[Item]], output: Path, known: dict, pool: Executor, record: Callable[[list[dict], int], None]
) -> None:
    """Code what was not done before. Of each picture, as soon as its file is written: record([its line of the manifest], 1)."""

    def write(one):
        item, row, data = finish(codec, one)
        if data is not None:
            try:
                target = output / item.target
                target.parent.mkdir(parents=True, exist_ok=True)
                write_file(target, data, overwrite=True)
            except OSError as error:  # a name that is too long here, or that of a folder: the next one may be good
                if error.errno in DISK_ERRORS:
                    raise
                row = line(item.name, item.target, row["seconds"], error=describe(error))
        record([row] if row else [], 1)

    def is_done(item):
        return has_digest(output / item.target, known.get(item.name))

    for _ in ahead(pool, write, coded(codec, groups, is_done, pool), WRITE_BEHIND):
        pass
