"""A run over a folder of pictures, in one process or several."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from diffusers_compress import metrics
from diffusers_compress.evaluation.baselines import read
from diffusers_compress.evaluation.codec import Codec
from diffusers_compress.evaluation.rows import read_rows
from diffusers_compress.evaluation.state import software
from diffusers_compress.evaluation.task import NO_MEMORY, Task, open_original, run_task, unavailable
from diffusers_compress.files import find_files, write_file
from diffusers_compress.metrics import distortion

SKIPPED = "skipped.json"


def evaluate(
    folder: Path,
    out: Path,
    codecs: list[Codec],
    bpps: list[float],
    names: tuple[str, ...] = metrics.WITHOUT_WEIGHTS,
    device: str = "cpu",
    dtype: str = "float32",
    every: int = 1,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Rows of every codec, rate and picture, in that order. What `out` has already is not done again, unless
    software, model, device or dtype have changed.

    Args:
        folder: where the pictures are (`files.find_files`); each `every`-th by name is taken. A text file of a picture's name is
            its caption. What is passed over, or cannot be read, is in `skipped.json`, name -> why.
        bpps: targets, bits per pixel not to exceed: 8 * bytes / (width * height).
        names: of `metrics.PICTURE_METRICS`.
        jobs: processes; with more than one each has one thread, and seconds are those of one thread among as many.
        progress: called with tasks done and in all.

    Raises:
        ValueError: for an argument out of its range.
    """
    pictures, skipped = pictures_of(folder, every)
    check_arguments(folder, out, pictures, codecs, bpps, names, jobs)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / SKIPPED, json.dumps(skipped, indent=1).encode(), overwrite=True)
    write_file(out / "software.json", json.dumps(software(), indent=1).encode(), overwrite=True)
    groups = {}  # by file
    for codec in codecs:
        groups.setdefault(codec.encoding, []).append(codec)
    tasks = [
        Task(out, name, path, bpp, tuple(group), tuple(names), device, dtype)
        for group in groups.values()
        for bpp in bpps
        for name, path in pictures.items()
    ]
    rows = read_rows(out)
    todo = [task for task in tasks if not all(finished(task, rows.get(key)) for key in keys(task))]
    progress(len(tasks) - len(todo), len(tasks))
    with open(out / "rows.jsonl", "a", encoding="utf-8") as file:
        for done, (task, found) in enumerate(run_tasks(todo, jobs), len(tasks) - len(todo) + 1):
            for key, row in zip(keys(task), found):
                rows[key] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress(done, len(tasks))
    wanted = [(codec.label, bpp, name) for codec in codecs for bpp in bpps for name in pictures]
    return [rows[key] for key in wanted]


def pictures_of(folder: Path, every: int = 1) -> tuple[dict[str, Path], dict[str, str]]:
    """(name -> path of the pictures that can be read, name -> why of what is passed over)."""
    found = find_files(folder)
    captions = {str(Path(name).with_suffix(".txt")) for name in found.files}
    pictures, skipped = {}, {name: why for name, why in found.skipped.items() if name not in captions}
    for name in list(found.files)[::every]:
        try:
            path = Path(found.files[name])
            open_original(path)
            pictures[name] = path
        except (OSError, ValueError) as error:
            skipped[name] = f"{type(error).__name__}: {error}"
    return pictures, skipped


def check_arguments(folder, out, pictures, codecs, bpps, names, jobs):
    if not pictures:
        raise ValueError(f"{folder}: no pictures here that can be read")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out}: lies in the folder of the pictures; choose one outside")
    labels = [codec.label for codec in codecs]
    if not codecs or len(set(labels)) < len(labels):
        raise ValueError(f"name at least one codec, and none twice, not {', '.join(labels) or 'none'}")
    if not bpps or min(bpps) <= 0:
        raise ValueError(f"rates must be above 0 bits per pixel, not {', '.join(map(str, bpps)) or 'none'}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    for name in names:
        if name not in metrics.PICTURE_METRICS:
            raise ValueError(f"metric is {name!r}, permitted are {', '.join([*metrics.PICTURE_METRICS, *metrics.SET_METRICS])}")


def keys(task: Task) -> list[tuple]:
    return [(codec.label, task.target_bpp, task.name) for codec in task.codecs]


def finished(task: Task, row: dict | None) -> bool:
    """Whether a row of an earlier run stands: nothing that decides it has changed, all metrics taken, its file as it was."""
    if row is None or row["state"] != task.state:
        return False
    if "bytes" not in row:
        return row["note"] != NO_MEMORY
    path = task.out / row["file"]
    return all(name in row for name in task.metrics) and path.exists() and path.stat().st_size == row["bytes"]


def run_tasks(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, list[dict]]]:
    """(task, its rows) as they come."""
    if jobs == 1:
        yield from ((task, run_task(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker) as pool:
        futures = {pool.submit(run_task, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker():
    """One thread for the numbers, and none of us survives the process that started us."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=follow, daemon=True).start()


def set_figures(folder: Path, out: Path, rows: list[dict], names: list[str]) -> dict:
    """(codec, rate) -> figures of `metrics.SET_METRICS`, or a note why there are none."""
    try:
        function = metrics.SET_METRICS[names[0]].load() if names else None
    except Exception as error:  # noqa: BLE001 - as for picture metrics
        function = partial(unavailable, metrics.reason(error))
    figures = {}
    for key in dict.fromkeys((row["codec"], row["target_bpp"]) for row in rows):
        mine = [row for row in rows if (row["codec"], row["target_bpp"]) == key and "decoded" in row]
        if names:
            try:
                originals = (distortion.samples(open_original(folder / row["picture"])) for row in mine)
                figures[key] = function(
                    originals, (distortion.samples(read((out / row["decoded"]).read_bytes())) for row in mine)
                )
            except ValueError as error:
                figures[key] = {"note": f"{', '.join(names)} {metrics.reason(error)}"}
    return figures
