"""One picture at one rate: encode, write, read, decode, measure."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image

from diffusers_compress import images, metrics
from diffusers_compress.contract import CODECS
from diffusers_compress.evaluation.baselines import BASELINES, largest_that_fits, save
from diffusers_compress.evaluation.clock import stopwatch
from diffusers_compress.evaluation.codec import Codec, load_pipeline
from diffusers_compress.evaluation.state import digest
from diffusers_compress.files import open_regular, read_text, write_file
from diffusers_compress.format import container
from diffusers_compress.metrics import distortion

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
NO_MEMORY = "not coded: out of memory"  # the note of a row that the next run tries again
TARGETS = {"target_psnr", "target_metric"}  # options of a codec that decide the rate in place of the report's


@cache
def load_metric(name: str) -> Callable:
    """A picture metric's function, once a process; one that raises the reason each time if it cannot be loaded."""
    logging.disable(logging.CRITICAL)  # the Hub's client tells of every retry
    try:
        return metrics.PICTURE_METRICS[name].load()
    except Exception as error:  # noqa: BLE001 - whatever it is, the row says so and the run goes on
        return partial(unavailable, metrics.reason(error))
    finally:
        logging.disable(logging.NOTSET)


def unavailable(why: str, *_):
    raise ValueError(why.removeprefix("not available: "))


@dataclass(frozen=True)
class Task:
    """One picture at one rate by codecs that share the file."""

    out: Path
    name: str  # of the picture, below its folder
    picture: Path
    target_bpp: float
    codecs: tuple[Codec, ...]
    metrics: tuple[str, ...]
    device: str
    dtype: str

    @property
    def state(self) -> str:
        codec = self.codecs[0]
        return digest(codec.name) if codec.name in BASELINES else digest(codec.name, codec.model, self.device, self.dtype)

    def path(self, kind: str, label: str, suffix: str) -> Path:
        folder = re.sub(r"[^\w.=-]+", "_", label)
        return self.out / kind / folder / f"{self.target_bpp:g}" / f"{self.name}{suffix}"


def open_original(path: Path) -> Image.Image:
    """The picture as every codec gets it: upright, 8-bit sRGB. OSError or ValueError if it cannot be read."""
    with open_regular(path) as file:
        image = images.read_image(file.read(), path)
    return images.to_output(images.to_tensor(image)[0][None])[0]


def run_task(task: Task) -> list[dict]:
    """The rows of a task, in the order of its codecs."""
    image = open_original(task.picture)
    try:
        return coded(task, image)
    except OUT_OF_MEMORY:  # this picture may be the largest: the run goes on
        return [{**identity(task, codec, image), "note": NO_MEMORY} for codec in task.codecs]


def coded(task: Task, image: Image.Image) -> list[dict]:
    path = task.path("files", task.codecs[0].encoding, task.codecs[0].suffix)
    try:
        encoded = encode(task, task.codecs[0], image, path)
    except ValueError as error:  # a rate that the codec refuses
        return [{**identity(task, codec, image), "note": f"not coded: {error}"} for codec in task.codecs]
    return [{**identity(task, codec, image), **encoded, **measure(task, codec, image, path)} for codec in task.codecs]


def identity(task: Task, codec: Codec, image: Image.Image) -> dict:
    facts = {"codec": codec.label, "picture": task.name, "target_bpp": task.target_bpp, "state": task.state}
    return {**facts, "width": image.width, "height": image.height, "device": task.device, "dtype": task.dtype}


def encode(task: Task, codec: Codec, image: Image.Image, path: Path) -> dict:
    """Write the picture's file, unless an earlier run has; what that took."""
    notes = path.with_name(path.name + ".json")
    if path.exists() and notes.exists():
        facts = json.loads(notes.read_text())
        if facts.pop("state") == task.state:
            return facts
    max_bytes = int(task.target_bpp * image.width * image.height / 8)
    if codec.name in BASELINES:
        with stopwatch() as clock:
            data, seconds = largest_that_fits(BASELINES[codec.name], image, max_bytes)
        clock["seconds"] = seconds
        facts = {}
    else:
        pipe = load_pipeline(codec.name, codec.model, task.device, task.dtype, task.target_bpp)
        with stopwatch(pipe) as clock:
            options = dict(codec.encode_options)
            if CODECS[codec.name].rate != "none" and TARGETS.isdisjoint(options):
                options["target_bpp"] = task.target_bpp
            data = pipe.compress(image, **options).bitstreams[0]
        facts = {"fingerprint": pipe.fingerprint().hex(), "header_bytes": container.read_header(data)[1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data, overwrite=True)
    facts |= {"reached": len(data) <= max_bytes, **{f"encode_{name}": value for name, value in clock.items()}}
    write_file(notes, json.dumps({**facts, "state": task.state}).encode(), overwrite=True)
    return facts


def measure(task: Task, codec: Codec, image: Image.Image, path: Path) -> dict:
    """Read the file, decode it, write the picture: bytes, bpp, what it took, and the metrics."""
    data, notes, drift = path.read_bytes(), [], None
    if codec.name in BASELINES:
        with stopwatch() as clock:
            decoded = BASELINES[codec.name].decode(data)
    else:
        pipe = load_pipeline(codec.name, codec.model, task.device, task.dtype, task.target_bpp)
        with stopwatch(pipe) as clock:
            output = pipe.decompress(data, **dict(codec.decode_options))
        decoded, notes, drift = output.images[0], list(output.notes[0]), (output.drift or [None])[0]
    target = task.path("decoded", codec.label, ".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, save(decoded, 1, "PNG", "compress_level"), overwrite=True)

    facts = {"bytes": len(data), "bpp": 8 * len(data) / (image.width * image.height), "file": str(path.relative_to(task.out))}
    facts |= {"drift": drift} | {f"decode_{name}": value for name, value in clock.items()}
    caption, text = task.picture.with_suffix(".txt"), ""
    try:
        text = read_text(caption).strip() if caption.exists() else ""
    except (OSError, ValueError) as error:
        notes.append(f"caption not read: {error}")
    x, x_hat = distortion.samples(image), distortion.samples(decoded)
    for name in task.metrics:
        try:
            where = "cpu" if name in metrics.WITHOUT_WEIGHTS else task.device
            facts[name] = load_metric(name)(x.to(where), x_hat.to(where), text)
        except Exception as error:  # noqa: BLE001 - a picture too small for a metric, weights that cannot be had: the run goes on
            facts[name] = None
            notes.append(f"{name} {metrics.reason(error)}")
    return {**facts, "decoded": str(target.relative_to(task.out)), "note": " | ".join(notes)}
