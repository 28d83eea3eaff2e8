"""Shards: tar archives of pictures and what belongs to them keep their order and all that is no picture."""

import hashlib
import io
import os
import tarfile
from contextlib import suppress

import pytest
from batch_tools import ToyPipeline, decode, encode, make_shard, members, picture_file, tree
from PIL import Image

from diffusers_compress import batch
from diffusers_compress.batch import shards


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
