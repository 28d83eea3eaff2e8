"""Whole datasets: what comes out does not depend on kills, restarts or the number of processes."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_tools import ToyPipeline, break_inputs, encode, make_folder, make_shard, manifest, picture_file, tree

from diffusers_compress import batch


class InterruptedPipeline(ToyPipeline):
    """Ctrl-C while the network works, at the third batch."""

    def compress(self, pictures, batch_size):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().compress(pictures, batch_size)


def test_an_interruption_leaves_no_file_of_which_nobody_knows(tmp_path):
    folder, shown, pipe = make_folder(tmp_path / "in", 16, [(16, 16)]), [], ToyPipeline()
    with pytest.raises(KeyboardInterrupt):
        encode(folder, tmp_path / "out", InterruptedPipeline(), progress=lambda *count: shown.append(count))
    files = [name for name in tree(tmp_path / "out") if name.endswith(".dfc")]
    assert len(files) == 8 and shown == [(i + 1, 16) for i in range(8)]
    assert {row["target"] for row in batch.picture_lines(tmp_path / "out")} == set(files)
    encode(folder, tmp_path / "out", pipe)
    assert pipe.calls == [4, 4]


def test_a_restart_does_what_is_missing_or_damaged_and_nothing_else(tmp_path):
    folder = make_folder(tmp_path / "in", 24)
    encode(folder, tmp_path / "out")
    whole = tree(tmp_path / "out")

    pipe = ToyPipeline()
    encode(folder, tmp_path / "out", pipe)
    assert pipe.calls == []

    first, second = sorted(whole)[:2]
    (tmp_path / "out" / first).unlink()
    (tmp_path / "out" / second).write_bytes(b"damaged")
    (tmp_path / "out" / ".0123456789abcdef.tmp").write_bytes(b"left by a killed run")
    rows = encode(folder, tmp_path / "out", pipe)
    assert 0 < len(pipe.calls) <= 2
    assert tree(tmp_path / "out") == whole
    assert len(rows) == 24


def test_a_broken_input_that_was_mended_or_removed(tmp_path):
    folder = make_folder(tmp_path / "in", 8)
    names = sorted(tree(folder))[:2]
    good = (folder / names[0]).read_bytes()
    break_inputs(folder, names)
    assert sum(row["error"] is not None for row in encode(folder, tmp_path / "out")) == 2
    (folder / names[0]).write_bytes(good)
    (folder / names[1]).unlink()
    rows = encode(folder, tmp_path / "out")
    assert len(rows) == 7 and all(row["error"] is None for row in rows)


def test_other_settings_need_force(tmp_path):
    folder = make_folder(tmp_path / "in", 6)
    encode(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="other settings"):
        encode(folder, tmp_path / "out", batch_size=3)
    pipe = ToyPipeline()
    encode(folder, tmp_path / "out", pipe, batch_size=3, force=True)
    assert sum(pipe.calls) == 6

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="no batch run"):
        encode(folder, tmp_path / "mine")
    encode(folder, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "precious"


def count_files(folder):
    return sum(path.suffix in (".dfc", ".tar") for path in folder.rglob("*") if not path.name.startswith("."))


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_killed_five_times_ends_in_the_same_set(tmp_path, kind):
    if kind == "files":
        folder, total = make_folder(tmp_path / "in", 240), 240
    else:
        (folder := tmp_path / "in").mkdir()
        total = 30
        for s in range(total):
            make_shard(folder / f"{s:02}.tar", [(f"{i}.png", picture_file(8 * s + i)) for i in range(8)])
    encode(folder, tmp_path / "once")

    process = multiprocessing.get_context("fork")
    rng = random.Random(0)
    for round in range(5):
        wanted = count_files(tmp_path / "out") + rng.randrange(1, total // 8)
        run = process.Process(target=encode, args=(folder, tmp_path / "out", ToyPipeline(0.01)))
        run.start()
        while count_files(tmp_path / "out") < wanted and run.is_alive():
            time.sleep(rng.uniform(0, 0.01))
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        assert run.exitcode == -signal.SIGKILL, f"round {round} ended before it was killed"
        whole = tree(tmp_path / "once")
        for name, data in tree(tmp_path / "out").items():
            assert name.endswith((".tmp", ".jsonl")) or data == whole[name]
    assert 0 < count_files(tmp_path / "out") < total

    rows = encode(folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "once")
    assert manifest(tmp_path / "out").keys() == manifest(tmp_path / "once").keys()
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in encode(folder, tmp_path / "once")]


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from batch_tools import encode
encode(*sys.argv[2:4])
"""


@pytest.mark.slow
def test_two_processes_give_exactly_the_files_of_one(tmp_path):
    folder = make_folder(tmp_path / "in", 50)
    for s in range(3):
        make_shard(folder / f"{s}.tar", [(f"{i}.png", picture_file(8 * s + i)) for i in range(6)])
    break_inputs(folder, sorted(tree(folder))[10:13])
    encode(folder, tmp_path / "one")
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "driver.py"]
    subprocess.run([*command, Path(__file__).parent, folder, tmp_path / "two"], check=True, capture_output=True)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    one, two = ({s: row["sha256"] for s, row in manifest(tmp_path / name).items()} for name in ("one", "two"))
    assert one == two
