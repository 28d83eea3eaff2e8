"""A codec of a few lines, folders and shards for the tests of `batch`."""

import hashlib
import io
import json
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from accelerate import PartialState
from PIL import Image

from diffusers_compress import batch, contract
from diffusers_compress.batch.manifest import MANIFEST, SETTINGS
from diffusers_compress.format import container


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


def break_inputs(folder, names):
    """A cut picture, a text, an empty file, one with too many pixels, one that is not there, by turns."""
    huge = bytearray(picture_file(0, (16, 16), "BMP"))
    huge[18:26] = (40_000).to_bytes(4, "little") * 2
    for i, name in enumerate(names):
        path = folder / name
        data = [path.read_bytes()[:-200], b"not a picture", b"", bytes(huge), None][i % 5]
        path.unlink()
        path.symlink_to("nothing") if data is None else path.write_bytes(data)
