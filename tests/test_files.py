"""Which files are inputs, and how they are read: one rule for all commands."""

import os
import socket

import pytest

from diffusers_compress.batch import find_inputs
from diffusers_compress.files import PICTURE_SUFFIXES, WALKED, find_files, open_regular, read_text, skip_notes
from diffusers_compress.images import open_image


@pytest.fixture
def folder(tmp_path):
    """Files that people have in their folders; none is a picture, for none is opened."""
    for name in (
        *(
            "a.png",
            "B.PNG",
            "sub/c.JPG",
            "sub/deep/d.jfif",
            "new\nline.png",
            "日本 \U0001f600.png",
            "dir.png/in.png",
            "two.dots.png",
        ),
        *("notes.txt", "sub/README", ".hidden.png", "._a.png", ".git/e.png", "sub/.png", "../other/f.png"),
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.png")).touch()
    links = {"loop": ".", "again": "sub", "other": "../other", "third": "../other", "link.png": "a.png", "broken.png": "none"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    return tmp_path / "in"


PICTURES = {"a.png", "B.PNG", "sub/c.JPG", "sub/deep/d.jfif", "new\nline.png", "日本 \U0001f600.png", "dir.png/in.png"}
PICTURES |= {"two.dots.png", os.fsdecode(b"caf\xe9.png"), "link.png", "other/f.png"}
UNREADABLE = {"broken.png", "pipe.png"}
SKIPPED = {"notes.txt": "suffix .txt", "sub/README": "no suffix"}
SKIPPED |= dict.fromkeys((".hidden.png", "._a.png", ".git", "sub/.png"), "hidden")
SKIPPED |= dict.fromkeys(("loop", "again", "third"), WALKED)


def test_every_file_is_found_or_said_to_be_skipped(folder):
    found = find_files(folder)
    assert found.files.keys() == PICTURES | UNREADABLE and list(found.files) == sorted(found.files)
    assert found.skipped == SKIPPED
    assert all(os.path.samefile(path, folder / name) for name, path in found.files.items() if name in PICTURES)
    assert find_inputs(str(folder), PICTURE_SUFFIXES) == found
    with pytest.raises(FileNotFoundError):
        find_files(folder / "none")


def test_a_pattern_skips_as_a_folder_does(folder):
    found = find_inputs(str(folder / "**" / "*"), PICTURE_SUFFIXES)
    assert {"a.png", "sub/c.JPG", "pipe.png", "two.dots.png"} <= found.files.keys()
    assert set(found.skipped.values()) == {"suffix .txt", "no suffix", WALKED}
    assert "loop/a.png" in found.skipped and not any(name.startswith(("loop", "again", "third")) for name in found.files)


def test_a_folder_that_cannot_be_read_is_told(folder, monkeypatch):
    def scandir(path, scan=os.scandir):
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_files(folder)
    assert found.skipped["sub/deep"] == "a folder that cannot be read (Permission denied)"
    assert found.files.keys() == (PICTURES | UNREADABLE) - {"sub/deep/d.jfif"}


def test_a_line_for_each_reason():
    assert skip_notes({}) == []
    assert skip_notes({"a.txt": "suffix .txt", ".b": "hidden", "c.txt": "suffix .txt"}) == [
        "passed over: 2, such as a.txt (suffix .txt)",
        "passed over: .b (hidden)",
    ]


def test_what_might_never_end_is_not_opened(folder, tmp_path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.png"))
    for path in (folder / "pipe.png", tmp_path / "socket.png", "/dev/null", folder):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(OSError, match="not a regular file"):
            open_image(path)
    server.close()
    with pytest.raises(FileNotFoundError):
        open_regular(folder / "broken.png")


TEXT = "photos/caf\u00e9.png\n\u65e5\u672c.png\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_text_as_windows_and_others_write_it(tmp_path, encoding, ending):
    (tmp_path / "list").write_bytes(TEXT.replace("\n", ending).encode(encoding))
    assert read_text(tmp_path / "list") == TEXT


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a\ncaf\u00e9.png\n".encode("latin-1"), "not text in UTF-8 (byte 0xe9 at 5); save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "not a text file"),
        (b"PK\3\4\0\0binary", "not a text file"),
        (b"\xff\xfea", "not text in UTF-16"),
    ],
)
def test_what_is_no_text_is_refused_in_a_line(tmp_path, data, words):
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_text(tmp_path / "list")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="an input is a picture"):
        find_inputs(str(tmp_path / "list"), PICTURE_SUFFIXES)
