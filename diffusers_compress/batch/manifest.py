"""The record of a batch: one line of a manifest for each picture, and the settings of the run."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from diffusers_compress.batch.walk import is_shard
from diffusers_compress.files import whole_file, write_file

MANIFEST = "manifest.jsonl"  # one line a picture; while a run goes on, each process adds to a part of its own
SETTINGS = "batch.json"
PART = "manifest.part-{}.jsonl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, digest: str | None) -> bool:
    """Whether a file is there and as the manifest says."""
    return digest is not None and os.path.isfile(path) and sha256_of(path) == digest  # Path.is_file fears long names


def line(source: str, target: str, seconds: float, **facts) -> dict:
    """One line of the manifest. seconds: this picture's share of its batch; bytes, bpp, sha256: of the file that was written."""
    return {"source": source, "target": target, "bytes": None, "bpp": None, "sha256": None, "notes": [], "error": None} | {
        "seconds": round(seconds, 6),
        **facts,
    }


def read_manifest(output: Path) -> Iterator[dict]:
    """The lines of the manifest, then those of the parts that a run in progress or killed has left: of one source, the last counts."""
    for path in [output / MANIFEST, *output.glob(PART.format("*"))]:
        with path.open(encoding="utf-8") if path.is_file() else nullcontext([]) as lines:
            for text in lines:
                with suppress(ValueError):  # the last line of a killed run may be cut
                    yield json.loads(text)


def picture_lines(output: Path) -> Iterator[dict]:
    """The lines of the manifest that stand for one picture each, or for a shard that could not be read."""
    return (row for row in read_manifest(output) if row["error"] or not is_shard(row["source"]))


def open_output(output: Path, settings: dict, force: bool) -> None:
    """Make `output` ready: new, or as a run of the same settings left it. FileExistsError if it is anything else."""
    path, text = output / SETTINGS, json.dumps(settings, indent=1, sort_keys=True)
    if not force and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"{output}: holds a run with other settings, see {SETTINGS}; --force begins anew")
    if not force and not path.is_file() and output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output}: exists and holds no batch run; --force writes into it")
    output.mkdir(parents=True, exist_ok=True)
    if force:
        for old in output.glob(PART.format("*")):
            old.unlink()
        write_file(output / MANIFEST, b"", overwrite=True)
    for left in output.rglob(".*.tmp"):  # by a killed run, see `files.write_file`
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", left.name):
            left.unlink()
    write_file(path, text.encode(), overwrite=True)
    close_manifest(output, lambda source: True)


def close_manifest(output: Path, wanted: Callable[[str], bool]) -> None:
    """One line for each source that is wanted, sorted, in one file, and no parts."""
    lines = {row["source"]: json.dumps(row).encode() for row in read_manifest(output) if wanted(row["source"])}
    with whole_file(output / MANIFEST) as file:
        file.writelines(lines[source] + b"\n" for source in sorted(lines))
    for part in output.glob(PART.format("*")):
        part.unlink()
