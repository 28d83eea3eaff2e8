"""The whole of a batch: what this process does, and what it leaves behind."""

import json
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from diffusers_compress.batch.codec import Codec
from diffusers_compress.batch.manifest import MANIFEST, PART, SETTINGS, close_manifest, open_output, read_manifest
from diffusers_compress.batch.shards import code_shard, pictures_in
from diffusers_compress.batch.walk import Item, find_inputs, groups_of, is_shard, shard_of, targets
from diffusers_compress.batch.work import WRITE_BEHIND, ahead, code_files, shape_of
from diffusers_compress.files import open_regular


def run(
    codec: Codec,
    source: str,
    output: Path,
    settings: dict,
    state: PartialState,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Code every input of `source` that is not done yet into the tree `output`; every process of `state` calls this.

    settings: what decides the files, as plain values; a restart must have the same. progress: called with this process's pictures
    that are done, and all of them. What came of it is in the manifest, which is whole when the main process returns. Returns name
    -> why of what was passed over in the input. FileNotFoundError, FileExistsError, ValueError before any work.
    """
    found: list = [None]
    if state.is_main_process:
        found = [find_inputs(source, codec.accepts)]
        if os.path.isdir(source) and output.resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"{output}: lies in the input folder; choose one outside")
        open_output(output, settings, force)
    ((inputs, skipped),) = broadcast_object_list(found)  # the view of one process: files may come while they look
    known = {row["source"]: row["sha256"] for row in read_manifest(output)}

    lock, done = Lock(), 0

    def record(rows, pictures):
        nonlocal done
        with lock:
            part.writelines(json.dumps(row) + "\n" for row in rows)
            part.flush()
            done += pictures
            progress(done, total)

    # The pool ends before the record is closed: whatever interrupts this, no file is written of which nobody knows.
    with (output / PART.format(state.process_index)).open("a", encoding="utf-8") as part, ThreadPoolExecutor() as pool:
        groups = my_groups(codec, {name: path for name, path in inputs.items() if not is_shard(path)}, state, pool)
        shards = [one for one in inputs.items() if is_shard(one[1])][state.process_index :: state.num_processes]
        total = sum(map(len, groups)) + sum(pictures_in(codec, path) for _, path in shards)
        code_files(codec, groups, output, known, pool, record)
        for name, path in shards:
            code_shard(codec, name, path, output, known, pool, record)
    state.wait_for_everyone()
    if state.is_main_process:
        close_manifest(output, lambda source: source in inputs or shard_of(source) in inputs)
    return {name: why for name, why in skipped.items() if name not in (MANIFEST, SETTINGS)}


def my_groups(codec: Codec, files: dict[str, str], state: PartialState, pool: Executor) -> list[list[Item]]:
    """This process's share of the batches. Each process looks at its share of the files, all learn all sizes."""
    target = targets(files, codec.makes)
    items = [Item(name, target[name], path) for name, path in files.items()]
    with state.split_between_processes(items) as mine:
        shapes = list(ahead(pool, lambda item: shape_of(codec, partial(open_regular, item.path)), mine, WRITE_BEHIND))
    return groups_of(items, gather_object(shapes), codec.batch_size)[state.process_index :: state.num_processes]
