"""Codecs on a folder of pictures, measured through files: each picture is written, read back, decoded and compared.

A report's folder holds everything: `rows.csv` and `rows.parquet` (one row a picture and rate), `files/` (what the codecs wrote),
`decoded/` (what came of them), and `rows.jsonl`, where a run that was stopped goes on.
"""

import csv
import io
import json
import logging
import multiprocessing
import os
import re
import sys
import threading
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_compress import bitstream, images, metrics

# Our codecs: name -> file in pipelines, class, suffix of its files.
PIPELINES = {
    "diffc": ("diffc", "DiffCPipeline", ".dfc"),
    "relic": ("relic", "RelicPipeline", ".dfc"),
    "perco": ("perco", "PerCoPipeline", ".dfc"),
}
LIBRARIES = """diffusers_compress torch torchvision diffusers transformers constriction numpy Pillow imagecodecs torchmetrics
torch-fidelity open_clip_torch bjontegaard""".split()
NO_PART_OF_IT = {"cli.py", "report.py", "batch.py", "hub.py", "training.py", "calibration.py"}  # of what decides a row
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm"}


# ---------------------------------------------------------------------------------------------------------------- baselines


@dataclass(frozen=True)
class Baseline:
    """A codec of today: `encode(image, knob)` -> bytes, for knobs from the smallest file to the largest."""

    suffix: str
    knobs: tuple
    encode: Callable
    decode: Callable


def save(image: Image.Image, knob, format: str, knob_name: str = "quality", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **{knob_name: knob}, **options)
    return file.getvalue()


def read(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def save_jxl(image: Image.Image, distance: float) -> bytes:
    import imagecodecs

    return imagecodecs.jpegxl_encode(np.asarray(image), distance=distance, effort=7, numthreads=1)


def read_jxl(data: bytes) -> Image.Image:
    import imagecodecs

    return Image.fromarray(imagecodecs.jpegxl_decode(data, numthreads=1)).convert("RGB")


BASELINES = {
    "jpeg": Baseline(
        ".jpg", tuple(range(1, 101)), partial(save, format="JPEG", subsampling="4:2:0", optimize=True, progressive=True), read
    ),
    "webp": Baseline(".webp", tuple(range(101)), partial(save, format="WEBP", method=6), read),
    "avif": Baseline(".avif", tuple(range(101)), partial(save, format="AVIF", speed=6, max_threads=1), read),
    "jxl": Baseline(".jxl", tuple(25 * 0.96**step for step in range(160)), save_jxl, read_jxl),
    "jpeg2000": Baseline(
        ".j2k",
        tuple((4096 * 0.96**step,) for step in range(200)),  # compression ratio
        partial(save, format="JPEG2000", knob_name="quality_layers", quality_mode="rates", irreversible=True, no_jp2=True),
        read,
    ),
}


def largest_that_fits(baseline: Baseline, image: Image.Image, max_bytes: int) -> tuple[bytes, float]:
    """The file of the highest knob within `max_bytes`, found by bisection, and the seconds that encoding it once takes.

    The file of the lowest knob if none fits.
    """
    low, high = 0, len(baseline.knobs) - 1
    best = timed(lambda: baseline.encode(image, baseline.knobs[0]))
    while low < high:
        middle = (low + high + 1) // 2
        tried = timed(lambda: baseline.encode(image, baseline.knobs[middle]))
        if len(tried[0]) <= max_bytes:
            low, best = middle, tried
        else:
            high = middle - 1
    return best


# ------------------------------------------------------------------------------------------------------- a codec and its parts


@dataclass(frozen=True)
class Codec:
    """What is evaluated under one label: a name of `PIPELINES` or `BASELINES`; for ours a model, its name, and call options."""

    name: str
    model: str = ""
    model_name: str = ""
    encode_options: tuple = ()
    decode_options: tuple = ()

    @property
    def encoding(self) -> str:
        """What decides the file, in words: codecs that share it share files."""
        model = f"@{self.model_name}" if self.model_name else ""
        return "".join([self.name, model, *(f":encode.{name}={value}" for name, value in self.encode_options)])

    @property
    def label(self) -> str:
        return "".join([self.encoding, *(f":decode.{name}={value}" for name, value in self.decode_options)])

    @property
    def suffix(self) -> str:
        return BASELINES[self.name].suffix if self.name in BASELINES else PIPELINES[self.name][2]


def parse_codec(text: str, model: str = "", model_name: str = "") -> Codec:
    """`NAME[:encode.OPTION=VALUE][:decode.OPTION=VALUE]...`, the options those of `compress` and `decompress`; ValueError."""
    name, *parts = text.split(":")
    if name not in {**PIPELINES, **BASELINES}:
        raise ValueError(f"codec is {name!r}, permitted are {', '.join([*PIPELINES, *BASELINES])}")
    if name in BASELINES:
        if parts:
            raise ValueError(f"codec {name} takes no options, not {':'.join(parts)!r}")
        if name == "jxl" and find_spec("imagecodecs") is None:
            raise ValueError('codec jxl needs imagecodecs: pip install "diffusers_compress[eval]"')
        return Codec(name)
    options = {"encode": [], "decode": []}
    for part in parts:
        match = re.fullmatch(r"(encode|decode)\.(\w+)=(.*)", part)
        if not match:
            raise ValueError(f"codec option is {part!r}, permitted are encode.NAME=VALUE and decode.NAME=VALUE")
        options[match[1]].append((match[2], plain_value(match[3])))
    if find_spec(f"diffusers_compress.pipelines.{PIPELINES[name][0]}") is None:
        raise ValueError(f"codec {name} is not part of this installation")
    return Codec(name, model, model_name, tuple(options["encode"]), tuple(options["decode"]))


def parse_rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"rate is {text!r}, permitted are numbers of bits per pixel") from None


def plain_value(text: str):
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@cache
def load_pipeline(name: str, model: str, device: str, dtype: str, target_bpp: float | None = None):
    """One of our pipelines on its device, silent, once a process. `target_bpp`: for PerCo, whose rate is the model's."""
    module, class_name, _ = PIPELINES[name]
    pipeline = getattr(import_module(f"diffusers_compress.pipelines.{module}"), class_name)
    options = {"preset": target_bpp} if name == "perco" else {}
    pipe = pipeline.from_pretrained(model, dtype=getattr(torch, dtype), **options).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


# --------------------------------------------------------------------------------------------------------- time and memory


def timed(function: Callable):
    """What the function returns, and wall seconds."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def stopwatch(pipe=None) -> Iterator[dict]:
    """Wall seconds of the block, those of them inside the denoiser and the autoencoder, the denoiser's calls, peak memory."""
    figures = {"seconds": 0.0, "denoiser_seconds": 0.0, "autoencoder_seconds": 0.0, "calls": 0, "peak_mib": None}
    parts = [("denoiser", pipe.denoiser)] if pipe else []
    if pipe and pipe.vae is not None:
        parts += [("autoencoder", pipe.vae.encoder), ("autoencoder", pipe.vae.decoder)]
    started, hooks = [], []

    def enter(*_):
        synchronize()
        started.append(time.perf_counter())

    def leave(name, *_):
        synchronize()
        figures[f"{name}_seconds"] += time.perf_counter() - started.pop()
        figures["calls"] += name == "denoiser"

    for name, module in parts:
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(partial(leave, name))]
    has_peak = reset_peak_memory()
    synchronize()
    start = time.perf_counter()
    try:
        yield figures
    finally:
        synchronize()
        figures["seconds"] = time.perf_counter() - start
        figures["peak_mib"] = peak_memory() if has_peak else None
        for hook in hooks:
            hook.remove()


def reset_peak_memory() -> bool:
    """Start counting anew, if the device or the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux
    except OSError:
        return False
    return True


def peak_memory() -> float:
    """MiB at most since the reset: allocated on the GPU, or resident of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


# --------------------------------------------------------------------------------------------------------------- one picture


@dataclass(frozen=True)
class Task:
    """One picture at one rate by codecs that share the file."""

    out: Path
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
        return self.out / kind / folder / f"{self.target_bpp:g}" / f"{self.picture.name}{suffix}"


def open_original(path: Path) -> Image.Image:
    """The picture as every codec gets it: upright, 8-bit sRGB."""
    return images.to_output(images.to_tensor(images.open_image(path))[0][None])[0]


def run_task(task: Task) -> list[dict]:
    """The rows of a task, in the order of its codecs."""
    image = open_original(task.picture)
    path = task.path("files", task.codecs[0].encoding, task.codecs[0].suffix)
    try:
        encoded = encode(task, task.codecs[0], image, path)
    except ValueError as error:  # a rate that the codec refuses
        return [{**identity(task, codec, image), "note": f"not coded: {error}"} for codec in task.codecs]
    return [{**identity(task, codec, image), **encoded, **measure(task, codec, image, path)} for codec in task.codecs]


def identity(task: Task, codec: Codec, image: Image.Image) -> dict:
    facts = {"codec": codec.label, "picture": task.picture.name, "target_bpp": task.target_bpp, "state": task.state}
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
        pipe = load_pipeline(codec.name, codec.model, task.device, task.dtype, task.target_bpp if codec.name == "perco" else None)
        with stopwatch(pipe) as clock:
            data = pipe.compress(image, target_bpp=task.target_bpp, **dict(codec.encode_options)).bitstreams[0]
        facts = {"fingerprint": pipe.fingerprint().hex(), "header_bytes": bitstream.read_header(data)[1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    bitstream.write_file(path, data, overwrite=True)
    facts |= {"reached": len(data) <= max_bytes, **{f"encode_{name}": value for name, value in clock.items()}}
    bitstream.write_file(notes, json.dumps({**facts, "state": task.state}).encode(), overwrite=True)
    return facts


def measure(task: Task, codec: Codec, image: Image.Image, path: Path) -> dict:
    """Read the file, decode it, write the picture: bytes, bpp, what it took, and the metrics."""
    data = path.read_bytes()
    if codec.name in BASELINES:
        with stopwatch() as clock:
            decoded = BASELINES[codec.name].decode(data)
    else:
        pipe = load_pipeline(codec.name, codec.model, task.device, task.dtype, task.target_bpp if codec.name == "perco" else None)
        with stopwatch(pipe) as clock:
            decoded = pipe.decompress(data, **dict(codec.decode_options)).images[0]
    target = task.path("decoded", codec.label, ".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    bitstream.write_file(target, save(decoded, 1, "PNG", "compress_level"), overwrite=True)

    facts = {"bytes": len(data), "bpp": 8 * len(data) / (image.width * image.height), "file": str(path.relative_to(task.out))}
    facts |= {f"decode_{name}": value for name, value in clock.items()}
    caption = task.picture.with_suffix(".txt")
    text = caption.read_text(encoding="utf-8").strip() if caption.exists() else ""
    x, x_hat, notes = metrics.samples(image), metrics.samples(decoded), []
    for name in task.metrics:
        try:
            facts[name] = load_metric(name)(x, x_hat, text)
        except Exception as error:  # noqa: BLE001 - a picture too small for a metric, weights that cannot be had: the run goes on
            facts[name] = None
            notes.append(f"{name} {metrics.reason(error)}")
    return {**facts, "decoded": str(target.relative_to(task.out)), "note": "; ".join(notes)}


# -------------------------------------------------------------------------------------------------------------------- a run


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
        folder: where the pictures are; each `every`-th by name is taken. A text file of a picture's name is its caption.
        bpps: targets, bits per pixel not to exceed: 8 * bytes / (width * height).
        names: of `metrics.PICTURE_METRICS`.
        jobs: processes; with more than one each has one thread, and seconds are those of one thread among as many.
        progress: called with tasks done and in all.

    Raises:
        ValueError: for an argument out of its range.
    """
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)[::every]
    check_arguments(folder, pictures, codecs, bpps, names, jobs)
    out.mkdir(parents=True, exist_ok=True)
    bitstream.write_file(out / "software.json", json.dumps(software(), indent=1).encode(), overwrite=True)
    groups = {}  # by file
    for codec in codecs:
        groups.setdefault(codec.encoding, []).append(codec)
    tasks = [
        Task(out, picture, bpp, tuple(group), tuple(names), device, dtype)
        for group in groups.values()
        for bpp in bpps
        for picture in pictures
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
    wanted = [(codec.label, bpp, picture.name) for codec in codecs for bpp in bpps for picture in pictures]
    return [rows[key] for key in wanted]


def check_arguments(folder, pictures, codecs, bpps, names, jobs):
    if not pictures:
        raise ValueError(f"{folder}: no pictures here")
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
    return [(codec.label, task.target_bpp, task.picture.name) for codec in task.codecs]


def finished(task: Task, row: dict | None) -> bool:
    """Whether a row of an earlier run stands: nothing that decides it has changed, all metrics taken, its file as it was."""
    if row is None or row["state"] != task.state:
        return False
    if "bytes" not in row:
        return True
    path = task.out / row["file"]
    return all(name in row for name in task.metrics) and path.exists() and path.stat().st_size == row["bytes"]


def read_rows(out: Path) -> dict:
    """Rows of earlier runs by codec, rate and picture. A last line that was cut is left out."""
    rows, path = {}, out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["codec"], row["target_bpp"], row["picture"]] = row
    if lines:
        bitstream.write_file(path, "".join(json.dumps(row) + "\n" for row in rows.values()).encode(), overwrite=True)
    return rows


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
                originals = (metrics.samples(open_original(folder / row["picture"])) for row in mine)
                figures[key] = function(originals, (metrics.samples(read((out / row["decoded"]).read_bytes())) for row in mine))
            except ValueError as error:
                figures[key] = {"note": f"{', '.join(names)} {metrics.reason(error)}"}
    return figures


# --------------------------------------------------------------------------------------------------------- what is written


@cache
def software() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


@cache
def digest(codec: str, model: str = "", *settings: str) -> str:
    """8 hexadecimal digits that change with what decides a codec's rows: versions, our own code as it is, the model's files."""
    package = Path(__file__).parent
    if codec in BASELINES:
        paths = [package / f"{module}.py" for module in ("evaluation", "images", "metrics")]
    else:
        pipelines = Path(import_module("diffusers_compress.pipelines.diffc").__file__).parent
        paths = {path for path in [*package.rglob("*.py"), *pipelines.glob("*.py")] if path.name not in NO_PART_OF_IT}
    files = [path for path in Path(model).rglob("*") if path.is_file()] if model and Path(model).is_dir() else []
    stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    state = blake2b(json.dumps([software(), settings, model if not files else stamps]).encode(), digest_size=4)
    for content in sorted(path.read_bytes() for path in paths):
        state.update(content)
    return state.hexdigest()


def write_rows(out: Path, rows: list[dict]):
    """`rows.csv`, and `rows.parquet` where pyarrow is there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    bitstream.write_file(out / "rows.csv", text.getvalue().encode(), overwrite=True)
    if find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in columns}), out / "rows.parquet")
