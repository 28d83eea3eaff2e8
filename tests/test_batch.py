"""Whole datasets: what comes out depends on what goes in, not on processes, kills or broken neighbours."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from diffusers_compress import batch, cli, contract, images
from diffusers_compress.batch import shards, walk, work
from diffusers_compress.batch.manifest import MANIFEST, SETTINGS
from diffusers_compress.cli import terminal
from diffusers_compress.cli.batch import SOME_FAILED, report
from diffusers_compress.cli.options import named_value
from diffusers_compress.cli.terminal import progress
from diffusers_compress.format import container


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """However slow this machine is now."""
    monkeypatch.setattr(terminal, "INTERVAL", 1e6)


class ToyPipeline:
    """A codec whose files tell which pictures shared the network, so that any other grouping gives other bytes."""

    vae_scale_factor = 8

    def __init__(self, seconds=0.0):
        self.seconds, self.calls = seconds, []

    def compress(self, pictures, batch_size):
        self.calls.append(len(pictures))
        time.sleep(self.seconds)
        if any(picture.getpixel((0, 0)) == (13, 13, 13) for picture in pictures):
            raise ValueError("an unlucky picture")
        company = b"".join(hashlib.sha256(picture.tobytes()).digest() for picture in pictures)
        files = []
        for picture in pictures:
            payload = hashlib.sha256(picture.tobytes() + company).digest()
            files.append(container.pack(container.Header(contract.DIFFC, *picture.size, bytes(4), b""), payload))
        return SimpleNamespace(bitstreams=files, notes=[["toy"]] * len(files))

    def decompress(self, files, batch_size):
        self.calls.append(len(files))
        headers = [container.read_header(data)[0] for data in files]
        pictures = [Image.new("RGB", (header.width, header.height)) for header in headers]
        return SimpleNamespace(images=pictures, notes=[["drifted"]] * len(files))


def encode(source, output, pipe=None, batch_size=4, **options):
    """The manifest's lines of the pictures."""
    codec = batch.encoder(pipe or ToyPipeline(), batch_size)
    batch.run(codec, str(source), Path(output), {"batch_size": batch_size}, PartialState(cpu=True), **options)
    return list(batch.picture_lines(Path(output)))


def decode(source, output):
    batch.run(batch.decoder(ToyPipeline(), 4), str(source), Path(output), {}, PartialState(cpu=True))


def picture_file(number, size=(16, 16), kind="PNG"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(20, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=kind)
    return buffer.getvalue()


def make_folder(folder, count, sizes=((16, 16), (24, 16), (16, 40))):
    for i in range(count):
        path = Path(folder) / f"part {i % 2}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_file(i, sizes[i % len(sizes)]))
    return folder


def make_shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tree(folder):
    """Name -> bytes of all files but those that tell of the run."""
    own = {MANIFEST, SETTINGS}
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name not in own
    }


def members(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def manifest(folder):
    return {row["source"]: row for row in map(json.loads, (Path(folder) / MANIFEST).read_text().splitlines())}


# --------------------------------------------------------------------------------------------------------------- the files


def test_the_same_tree_and_a_line_a_picture(tmp_path):
    make_folder(tmp_path / "in", 11)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(picture_file(0))
    rows = encode(tmp_path / "in", tmp_path / "out")
    files = tree(tmp_path / "out")
    assert files.keys() == {f"part {i % 2}/{i:04}.dfc" for i in range(11)}
    assert [row["source"] for row in rows] == sorted(f"part {i % 2}/{i:04}.png" for i in range(11))
    assert manifest(tmp_path / "out") == {row["source"]: row for row in rows}
    for row in rows:
        data, size = files[row["target"]], Image.open(tmp_path / "in" / row["source"]).size
        assert (row["bytes"], row["bpp"]) == (len(data), 8 * len(data) / (size[0] * size[1]))
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["error"] is None and row["notes"] == ["toy"] and row["seconds"] >= 0


def test_decode_is_the_inverse(tmp_path):
    encode(make_folder(tmp_path / "in", 7), tmp_path / "coded")
    decode(tmp_path / "coded", tmp_path / "out")
    files = tree(tmp_path / "out")
    assert files.keys() == {f"part {i % 2}/{i:04}.png" for i in range(7)}
    for name, data in files.items():
        assert Image.open(io.BytesIO(data)).size == Image.open(tmp_path / "in" / name).size


def test_what_the_decoder_notes_is_in_the_manifest_and_on_the_terminal(tmp_path, capsys):
    encode(make_folder(tmp_path / "in", 3), tmp_path / "coded")
    decode(tmp_path / "coded", tmp_path / "out")
    rows = list(batch.picture_lines(tmp_path / "out"))
    assert [row["notes"] for row in rows] == [["drifted"]] * 3
    assert report(tmp_path / "out", rows, 1.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"note: {rows[0]['source']} and 2 more: drifted" and lines[1].startswith(f"{tmp_path / 'out'}: 3 of 3 ")


def test_like_sizes_share_the_network_in_full_batches(tmp_path):
    pipe = ToyPipeline()
    encode(make_folder(tmp_path / "in", 24), tmp_path / "out", pipe)
    assert pipe.calls == [4] * 6
    # 15 and 16 pixels are alike in units of 8, and so is a picture that EXIF turns by a quarter.
    folder = make_folder(tmp_path / "alike", 3, [(24, 16), (23, 15), (24, 16)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 24)).save(folder / "turned.jpg", exif=exif)
    pipe = ToyPipeline()
    encode(folder, tmp_path / "out of alike", pipe)
    assert pipe.calls == [4]


@pytest.mark.parametrize("kind", ["folder", "list", "glob", "braces", "file"])
def test_ways_to_name_inputs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(make_folder(tmp_path, 6))
    Path("list").write_text("part 0/0002.png\n\npart 1/0005.png\n")
    Path("other.txt").write_text("no picture")
    every = {f"part {i % 2}/{i:04}.png" for i in range(6)}
    source, names = {
        "folder": (".", every),
        "list": ("list", {"part 0/0002.png", "part 1/0005.png"}),
        "glob": ("part */000[1-3].png", {"part 1/0001.png", "part 0/0002.png", "part 1/0003.png"}),
        "braces": ("part 0/{0002,0004}.png", {"0002.png", "0004.png"}),
        "file": ("part 1/0001.png", {"0001.png"}),
    }[kind]
    found = batch.find_inputs(source, {".png"}).files
    assert found.keys() == names and list(found) == sorted(found)
    assert all(Path(path).is_file() and path.endswith(name) for name, path in found.items())


def test_inputs_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=".dfc"):
        batch.find_inputs(str(make_folder(tmp_path / "in", 2)), {".dfc"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        batch.find_inputs(str(tmp_path / "nowhere"), {".png"})
    (tmp_path / "list").write_text("../secret.png\n")
    with pytest.raises(ValueError, match="secret"):
        batch.find_inputs(str(tmp_path / "list"), {".png"})
    with pytest.raises(ValueError, match="input folder"):
        encode(tmp_path / "in", tmp_path / "in" / "out")


def test_absolute_paths_in_a_list_keep_their_folders(tmp_path):
    (tmp_path / "list").write_text(f"{tmp_path}/photo.png\n")
    (tmp_path / "photo.png").write_bytes(picture_file(0))
    encode(tmp_path / "list", tmp_path / "out")
    assert (tmp_path / "out" / tmp_path.relative_to("/") / "photo.dfc").is_file()


def test_names_that_differ_in_the_suffix_alone():
    assert walk.targets(["a/x.jpg", "a/x.png", "b/x.png"], ".dfc") == {
        "a/x.jpg": "a/x.jpg.dfc",
        "a/x.png": "a/x.png.dfc",
        "b/x.png": "b/x.dfc",
    }
    with pytest.raises(ValueError, match="x.jpg.dfc"):
        walk.targets(["x.jpg", "x.png", "x.jpg.gif"], ".dfc")


# ---------------------------------------------------------------------------------------------------- reading ahead of coding


def test_ahead_keeps_order_and_never_runs_far_ahead():
    started, taken = [], 0
    with ThreadPoolExecutor(8) as pool:
        for result in work.ahead(pool, lambda i: started.append(i) or i, range(50), 5):
            assert result == taken
            taken += 1
            assert len(started) <= taken + 5
    assert taken == 50


def test_reading_and_writing_go_on_while_the_network_works(tmp_path, monkeypatch):
    """Each call of the network waits for a picture of the batch behind it to be read, and for a file of the one before."""
    read, written = [threading.Event() for _ in range(6)], [threading.Event() for _ in range(6)]
    load_picture, write_file = batch.codec.load_picture, work.write_file

    def load(data):
        picture = load_picture(data)
        read[picture.width // 16 - 1].set()
        return picture

    def write(path, data, overwrite):
        write_file(path, data, overwrite=overwrite)
        if path.suffix == ".dfc":
            written[int(path.stem) // 2].set()

    class WaitingPipeline(ToyPipeline):
        def compress(self, pictures, batch_size):
            i = pictures[0].width // 16 - 1
            assert i == 5 or read[i + 1].wait(60)
            assert i == 0 or written[i - 1].wait(60)
            return super().compress(pictures, batch_size)

    monkeypatch.setattr(batch.codec, "load_picture", load)
    monkeypatch.setattr(work, "write_file", write)
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i:02}.png").write_bytes(picture_file(i, (16 * (i // 2 + 1), 16)))
    rows = encode(tmp_path / "in", tmp_path / "out", WaitingPipeline(), batch_size=2)
    assert len(rows) == 12 and all(row["error"] is None for row in rows)


# ------------------------------------------------------------------------------------------------------------ what is broken


def break_inputs(folder, names):
    """A cut picture, a text, an empty file, one with too many pixels, one that is not there, by turns."""
    huge = bytearray(picture_file(0, (16, 16), "BMP"))
    huge[18:26] = (40_000).to_bytes(4, "little") * 2
    for i, name in enumerate(names):
        path = folder / name
        data = [path.read_bytes()[:-200], b"not a picture", b"", bytes(huge), None][i % 5]
        path.unlink()
        path.symlink_to("nothing") if data is None else path.write_bytes(data)


def test_pictures_are_read_as_everywhere_else():
    """With what Pillow drops of a file: here, that its colours are linear."""
    cicp = b"cICP" + bytes([1, 8, 0, 1])
    chunk = (4).to_bytes(4, "big") + cicp + zlib.crc32(cicp).to_bytes(4, "big")
    plain = picture_file(0)
    linear = plain[:33] + chunk + plain[33:]
    notes = images.to_tensor(batch.codec.load_picture(linear))[1]
    assert notes == ["colours converted to sRGB (cICP)"]
    assert images.to_tensor(batch.codec.load_picture(plain))[1] == []


def test_thirty_broken_ones_among_a_thousand(tmp_path):
    folder = make_folder(tmp_path / "in", 1000)
    names = random.Random(0).sample(sorted(tree(folder)), 30)
    break_inputs(folder, names)
    rows = encode(folder, tmp_path / "out", batch_size=16)
    failed = {row["source"]: row["error"] for row in rows if row["error"]}
    assert failed.keys() == set(names)
    for reason in ("truncated", "not a picture", "limit", "No such file"):
        assert any(reason in error for error in failed.values())
    good = [row for row in rows if not row["error"]]
    assert len(good) == 970
    files = tree(tmp_path / "out")
    assert files.keys() == {row["target"] for row in good}
    assert all(hashlib.sha256(files[row["target"]]).hexdigest() == row["sha256"] for row in good)


def test_a_picture_that_the_codec_refuses_does_not_take_its_batch_along(tmp_path):
    folder = make_folder(tmp_path / "in", 8, [(16, 16)])
    Image.new("RGB", (16, 16), (13, 13, 13)).save(folder / "part 0" / "0002.png")
    rows = encode(folder, tmp_path / "out", batch_size=8)
    assert [(row["source"], row["error"]) for row in rows if row["error"]] == [
        ("part 0/0002.png", "ValueError: an unlucky picture")
    ]
    assert len(tree(tmp_path / "out")) == 7


def test_a_run_in_which_everything_fails_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "GIVE_UP", 6)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (13, 13, 13)).save(folder / f"{i}.png")
    with pytest.raises(RuntimeError, match="8 pictures in a row .* an unlucky picture"):
        encode(folder, tmp_path / "out")


def test_pipes_and_names_that_cannot_be_are_errors_of_their_own(tmp_path):
    folder = make_folder(tmp_path / "in", 4, [(16, 16)])
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.tar")
    (folder / f"{'x' * 251}.png").write_bytes(picture_file(0))  # is found, and so are 255 characters
    (folder / f"{'y' * 250}.jpg").write_bytes(picture_file(1))
    (folder / f"{'y' * 250}.png").write_bytes(picture_file(1))  # both keep their suffix: 258 characters
    (folder / "part 0.dfc").mkdir()
    (folder / "part 0.dfc" / "in.png").write_bytes(picture_file(2))
    (folder / "part 0.png").write_bytes(picture_file(3))  # becomes a file where the folder is to be, or the other way
    rows = encode(folder, tmp_path / "out", batch_size=1)
    failed = {row["source"]: row["error"] for row in rows if row["error"]}
    assert all("not a regular file" in failed.pop(name) for name in ("pipe.png", "pipe.tar"))
    assert all("too long" in failed.pop(f"{'y' * 250}.{suffix}") for suffix in ("jpg", "png"))
    (which,) = failed
    assert which in ("part 0.png", "part 0.dfc/in.png")
    assert len(rows) == 11 and len(tree(tmp_path / "out")) == 6
    assert len(encode(folder, tmp_path / "out", batch_size=1)) == 11  # and the run can be started again


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    def write(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(work, "write_file", write)
    with pytest.raises(OSError, match="No space"):
        encode(make_folder(tmp_path / "in", 4), tmp_path / "out")


def test_lists_as_windows_writes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path, 2))
    Path("list.txt").write_bytes("part 0/0000.png\r\npart 1/0001.png\r\n".encode("utf-16"))
    assert all(row["error"] is None for row in encode("list.txt", tmp_path / "out"))
    assert len(tree(tmp_path / "out")) == 2


# ------------------------------------------------------------------------------------------------------- restarts, processes


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
from test_batch import encode
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


# ------------------------------------------------------------------------------------------------------------------- shards


def test_a_shard_keeps_its_order_and_all_that_is_no_picture(tmp_path):
    sizes = [(16, 16), (24, 16), (16, 16), (16, 40)]
    files = [("about.txt", b"first")]
    for i in range(9):
        files += [(f"s/{i}.cls", str(i).encode()), (f"s/{i}.jpg", picture_file(i, sizes[i % 4], "JPEG"))]
    make_shard(tmp_path / "in.tar", files)
    rows = encode(tmp_path / "in.tar", tmp_path / "out")
    coded = members(tmp_path / "out" / "in.tar")
    assert [name for name, _ in coded] == [name.replace(".jpg", ".dfc") for name, _ in files]
    assert [data for name, data in coded if name.endswith(".cls")] == [str(i).encode() for i in range(9)]
    assert len(rows) == 9
    for row in rows:
        assert row["source"] == f"in.tar::{row['target'].replace('.dfc', '.jpg')}"
        assert row["sha256"] == hashlib.sha256(dict(coded)[row["target"]]).hexdigest()

    decode(tmp_path / "out" / "in.tar", tmp_path / "back")
    back = members(tmp_path / "back" / "in.tar")
    assert [name for name, _ in back] == [name.replace(".jpg", ".png") for name, _ in files]
    assert Image.open(io.BytesIO(dict(back)["s/1.png"])).size == (24, 16)


def test_names_of_tar_of_a_folder(tmp_path):
    """`tar -cf in.tar .` has names with ./, and macOS puts its own files between; a sample stays whole for WebDataset."""
    files = []
    for i in range(3):
        files += [
            (f"./._{i}.png", b"macOS"),
            (f"./{i}.png", picture_file(i)),
            (f"./._{i}.txt", b"macOS"),
            (f"./{i}.txt", b"text"),
        ]
    files[5] = (files[5][0], b"not a picture")
    make_shard(tmp_path / "in.tar", files)
    rows = encode(tmp_path / "in.tar", tmp_path / "out")
    assert [row["source"] for row in rows] == [f"in.tar::{i}.png" for i in range(3)]
    assert [row["error"] is None for row in rows] == [True, False, True]
    coded = [name for name, _ in members(tmp_path / "out" / "in.tar") if not name.startswith("._")]
    assert coded == ["0.dfc", "0.txt", "2.dfc", "2.txt"]


def test_links_in_a_shard_are_told(tmp_path):
    (tmp_path / "0.png").write_bytes(picture_file(0))
    os.link(tmp_path / "0.png", tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for i in range(3):
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
    rows = encode(tmp_path / "in.tar", tmp_path / "out")
    assert {row["source"]: row["error"] for row in rows} == {
        "in.tar::0.png": None,
        "in.tar::1.png": "a link or device, not a file",
        "in.tar::2.png": "a link or device, not a file",
    }


def test_a_shard_that_is_cut_anywhere_is_noticed(tmp_path):
    make_shard(
        tmp_path / "in.tar",
        [(f"{i}.{kind}", picture_file(i) if kind == "png" else b"7") for i in range(3) for kind in ("png", "txt")],
    )
    data, codec = (tmp_path / "in.tar").read_bytes(), batch.encoder(ToyPipeline(), 4)
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for cut in [*range(0, end, 128), *range(end, end + 512, 17)]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        with pytest.raises((tarfile.TarError, ValueError)):
            shards.open_shard(codec, "cut.tar", tmp_path / "cut.tar")
    for place in range(512, end, 512):  # where a header is no header any more, all behind it is lost
        (tmp_path / "bad.tar").write_bytes(data[:place] + b"\1" * 512 + data[place + 512 :])
        with suppress(tarfile.TarError, ValueError):
            assert len(shards.open_shard(codec, "bad.tar", tmp_path / "bad.tar").items) == 3
    assert len(shards.open_shard(codec, "in.tar", tmp_path / "in.tar").items) == 3


def test_a_shard_that_is_missing_from_a_numbered_row_is_told(tmp_path):
    for i in (0, 2):
        make_shard(tmp_path / f"{i}.tar", [("0.png", picture_file(i))])
    rows = encode(tmp_path / "{0..2}.tar", tmp_path / "out")
    assert [(row["source"], row["error"] is None) for row in rows] == [
        ("0.tar::0.png", True),
        ("1.tar", False),
        ("2.tar::0.png", True),
    ]


def test_a_picture_beside_its_coded_form_overwrites_nothing(tmp_path):
    make_shard(tmp_path / "in.tar", [("0.dfc", b"precious"), ("0.png", picture_file(0))])
    encode(tmp_path / "in.tar", tmp_path / "out")
    (first, data), (second, _) = members(tmp_path / "out" / "in.tar")
    assert (first, data, second) == ("0.dfc", b"precious", "0.png.dfc")


def test_a_sample_whose_picture_fails_is_left_out_whole(tmp_path):
    files = [(f"{i}.{kind}", picture_file(i) if kind == "png" else b"7") for i in range(6) for kind in ("cls", "png", "txt")]
    files[4 * 3 + 1] = ("4.png", b"not a picture")
    make_shard(tmp_path / "in.tar", files)
    rows = encode(tmp_path / "in.tar", tmp_path / "out")
    assert [row["source"] for row in rows if row["error"]] == ["in.tar::4.png"]
    names = [name for name, _ in members(tmp_path / "out" / "in.tar")]
    assert names == [f"{i}.{kind}" for i in (0, 1, 2, 3, 5) for kind in ("cls", "dfc", "txt")]
    pipe = ToyPipeline()
    assert encode(tmp_path / "in.tar", tmp_path / "out", pipe) == rows
    assert pipe.calls == []


def test_a_damaged_shard_is_coded_again_and_a_broken_one_reported(tmp_path):
    (tmp_path / "in").mkdir()
    for s in range(3):
        make_shard(tmp_path / "in" / f"{s}.tar", [(f"{i}.png", picture_file(4 * s + i)) for i in range(4)])
    broken = tmp_path / "in" / "1.tar"
    broken.write_bytes(broken.read_bytes()[:3000])
    rows = encode(tmp_path / "in", tmp_path / "out")
    assert [row["source"] for row in rows if row["error"]] == ["1.tar"]
    whole = tree(tmp_path / "out")
    assert whole.keys() == {"0.tar", "2.tar"}

    (tmp_path / "out" / "2.tar").write_bytes(whole["2.tar"][:-100])
    pipe = ToyPipeline()
    assert len(encode(tmp_path / "in", tmp_path / "out", pipe)) == len(rows) == 9
    assert pipe.calls == [4]
    assert tree(tmp_path / "out") == whole


# ------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        photo.crop((i, i, 64 + i, 48 + i)).save(folder / f"{i}.png")
    return folder


def run(*arguments):
    return cli.main(["batch", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("codec", ["diffc", "relic"])
def test_the_command_is_the_pipelines_compress_and_decompress(photos, tiny_sd_folder, tmp_path, capsys, codec):
    model = ["--model", tiny_sd_folder, "--codec", codec]
    assert run(photos, tmp_path / "coded", "--max-bytes", 120, *model) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'coded'}: 3 of 3 pictures, ") and err == ""
    pipe = contract.CODECS[codec].pipeline_class().from_pretrained(tiny_sd_folder)
    expected = pipe.compress([Image.open(photos / f"{i}.png") for i in range(3)], max_bytes=120).bitstreams
    assert tree(tmp_path / "coded") == {f"{i}.dfc": data for i, data in enumerate(expected)}

    assert run(tmp_path / "coded", tmp_path / "decoded", "--decode", "--option", "num_inference_steps=2", *model) == 0
    pictures = pipe.decompress(expected, num_inference_steps=2).images
    for i, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "decoded" / f"{i}.png")), np.asarray(picture))


def test_the_exit_status_tells_of_partial_failure(photos, tiny_sd_folder, tmp_path, capsys):
    (tmp_path / "list").write_text(f"{photos}/0.png\n{photos}/none.png\n")
    assert run(tmp_path / "list", tmp_path / "out", "--max-bytes", 120, "--model", tiny_sd_folder) == SOME_FAILED
    out, err = capsys.readouterr()
    assert "1 of 2 pictures" in out
    assert "none.png: FileNotFoundError" in err


def test_the_command_refuses_before_it_works(photos, tmp_path, capsys):
    assert run(photos, tmp_path / "out") == 2
    assert "--bpp" in capsys.readouterr().err
    assert run(photos, tmp_path / "out", "--bpp", 1, "--option", "colour=blue") == 2
    assert "--option colour: diffc" in capsys.readouterr().err
    assert run(photos, tmp_path / "out", "--bpp", 1, "--option", "colour") == 2
    assert "NAME=VALUE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_option_is_a_number_where_it_reads_as_one():
    assert list(map(named_value, ["a=5", "b=0.5", "c=True", "d=flow", "e=x=y", "f="])) == [
        ("a", 5),
        ("b", 0.5),
        ("c", True),
        ("d", "flow"),
        ("e", "x=y"),
        ("f", ""),
    ]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "INTERVAL", 0.01)
    said = threading.Event()
    complain = terminal.complain
    monkeypatch.setattr(
        terminal, "complain", lambda line: (complain(line), said.set() if line.startswith("coding: 6 of 8") else None)
    )
    with progress("coding") as show:
        show(6, 8)
        assert said.wait(60)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("coding: 6 of 8, ") and " s left" in line for line in lines)
