"""Whole datasets: what comes out depends on what goes in, not on batches or broken neighbours."""

import errno
import hashlib
import io
import os
import random
import threading
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from batch_tools import ToyPipeline, break_inputs, decode, encode, make_folder, manifest, picture_file, tree
from PIL import Image

from diffusers_compress import batch, images
from diffusers_compress.batch import walk, work
from diffusers_compress.cli import terminal
from diffusers_compress.cli.batch import report


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """However slow this machine is now."""
    monkeypatch.setattr(terminal, "INTERVAL", 1e6)


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


class SmallMemory(ToyPipeline):
    """Has room for one picture, and for none while the numbers of an earlier call are there."""

    def compress(self, pictures, batch_size):
        numbers = np.zeros(1)
        if getattr(self, "earlier", lambda: None)() is not None or len(pictures) > 1:
            self.earlier = weakref.ref(numbers)
            raise MemoryError
        return super().compress(pictures, batch_size)


def test_a_batch_for_which_memory_is_short_is_let_go_before_its_pictures_are_coded_one_by_one(tmp_path):
    rows = encode(make_folder(tmp_path / "in", 8, [(16, 16)]), tmp_path / "out", pipe := SmallMemory())
    assert [row["error"] for row in rows] == [None] * 8 and pipe.calls == [1] * 8


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
