"""The command `diffusers-compress`: encode, decode, info, demo, batch, eval, calibrate, push. What loads torch is imported inside the
functions that need it, so that help and usage errors come at once."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from ast import literal_eval
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import typer
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffusers_compress import __version__, embedded_model
from diffusers_compress.bitstream import CODECS, DEFAULT_LIMITS, Header, Limits, read_header, write_file

DEMO_BPP = 0.05
SOME_FAILED = 3  # exit status of a batch that was coded but for some pictures
PIPELINES = {"diffc": "DiffCPipeline", "relic": "RelicPipeline", "perco": "PerCoPipeline"}

DASH = Path("-")  # stdin or stdout


def input_file(path: Path) -> Path:
    if path != DASH and (path.is_dir() or not path.exists()):
        raise typer.BadParameter(f"{path}: no such file")
    return path


Source = Annotated[Path, typer.Argument(metavar="IN", callback=input_file, show_default=False, help="- is stdin.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="- is stdout.")]
Photo = Annotated[
    Path | None, typer.Argument(metavar="[PHOTO]", exists=True, dir_okay=False, help="Default: a photo that matplotlib ships.")
]
Model = Annotated[str | None, typer.Option(help="Model folder or Hub id. Default: the embedded model.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, otherwise cpu.")]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the network's weights.")]
Bpp = Annotated[float | None, typer.Option(help="Bits per pixel not to exceed.")]
MaxBytes = Annotated[int | None, typer.Option(help="File size not to exceed.")]
Quality = Annotated[float | None, typer.Option(help="How far down the noise the stream goes, above 0 and up to 1.")]
Prompt = Annotated[str, typer.Option(help="What the picture shows; stored in the file.")]
Channel = Annotated[
    Literal["trellis", "trellis32", "poisson"],
    typer.Option(help="trellis32: slower, files 3 to 4 % smaller. poisson is the published coder, for comparison."),
]
Reconstruction = Annotated[Literal["flow", "ancestral", "denoised"], typer.Option(help="How the decoder finishes the picture.")]
Preview = Annotated[bool, typer.Option("--preview", help="One network call (diffc: --reconstruction denoised), or none (relic).")]
Realism = Annotated[float, typer.Option(help="relic: 1 for the denoised picture, 0 for the preview, or a blend.")]
Steps = Annotated[int | None, typer.Option(help="Network calls that finish the picture.")]
Guidance = Annotated[float | None, typer.Option(help="Above 1: guidance towards the prompt in the file. Default: 1, perco 3.")]
Seed = Annotated[int | None, typer.Option(help="For --reconstruction ancestral: the same seed gives the same picture.")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="Decode although the file was made with another model.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="That a file may claim; more only if you trust it.")]
Find = Annotated[
    list[Path] | None,
    typer.Option(exists=True, file_okay=False, help="Look below this folder for the model of the file. Repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Folder = Annotated[Path, typer.Option(help="Where the three files go.")]
Inputs = Annotated[
    str, typer.Argument(metavar="INPUT", help="Folder, glob, WebDataset tar shards or a text file of paths.", show_default=False)
]
Tree = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the same tree.", file_okay=False, show_default=False)]
Decode = Annotated[bool, typer.Option("--decode", help="The other way: .dfc files to PNG pictures.")]
CodecName = Annotated[Literal["diffc", "relic", "perco"], typer.Option(help="Which codec.")]
Preset = Annotated[
    str | None, typer.Option(help="perco: which of a model's grids, such as 0.0019. Default: by --bpp, or the smallest.")
]
Captioner = Annotated[
    str | None,
    typer.Option(help="perco: model that makes the prompt, such as Salesforce/blip2-opt-2.7b-coco or open_clip:MODEL/WEIGHTS."),
]
NoiseSeed = Annotated[int, typer.Option("--seed", help="perco: of the noise that a decoder starts from; stored in the file.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE, an argument of the codec's compress or decompress. Repeatable.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures of like size that share the network.")]
Pictures = Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="Pictures.", show_default=False)]
Report = Annotated[Path, typer.Option("--out", help="Folder of the report. A run that was stopped goes on there.")]
Codecs = Annotated[
    str,
    typer.Option(
        help="Commas between. diffc, relic and perco with :encode.NAME=VALUE:decode.NAME=VALUE; jpeg, webp, avif, jxl, jpeg2000."
    ),
]
Rates = Annotated[str, typer.Option(help="Bits per pixel not to exceed, commas between.")]
Metrics = Annotated[str, typer.Option(help="Commas between; 'all' for all. Default: those that need no downloaded weights.")]
Models = Annotated[list[str] | None, typer.Option(help="As elsewhere; several if given several times.")]
Every = Annotated[int, typer.Option(min=1, help="Take each n-th picture only.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes, of one thread each if there are several.")]
Anchor = Annotated[str, typer.Option(help="Codec that BD-rates compare with. Default: the first.")]
Calibrated = Annotated[Path, typer.Option("--out", help="New folder for the calibrated model.", show_default=False)]
MaxPictures = Annotated[int, typer.Option(min=1, help="Evenly from the folder. Each takes about a hundred network calls.")]
Repository = Annotated[
    str, typer.Argument(metavar="NAME/REPOSITORY", help="On the Hub; made if it is not there.", show_default=False)
]
CardPictures = Annotated[
    Path | None, typer.Option("--pictures", exists=True, file_okay=False, help="Folder, for the card's table of rates and PSNR.")
]
CardRates = Annotated[str, typer.Option("--bpp", help="Rates of that table, commas between.")]
License = Annotated[str | None, typer.Option(help="Default: that of the model's card.")]
Private = Annotated[bool, typer.Option("--private", help="For you alone, if the repository is new.")]
Anew = Annotated[bool, typer.Option("--force", help="Begin anew, also in a folder with other files or settings.")]

app = typer.Typer(add_completion=False, help="Photos to small files and back with diffusion models.")


# ----------------------------------------------------------------------------------------------------------------- commands


@app.command("encode")
def encode_command(
    source: Source,
    target: Target,
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    quality: Quality = None,
    prompt: Prompt = "",
    channel: Channel = "trellis",
    codec: CodecName = "diffc",
    preset: Preset = None,
    captioner: Captioner = None,
    seed: NoiseSeed = 0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Compress a picture. Give exactly one of --bpp, --max-bytes and --quality; for perco none is needed."""
    rate = chosen_rate(bpp, max_bytes, quality, codec)
    check_target(target, source, force)
    image = open_picture(source)
    pipe = load(model, device, dtype, codec, preset or bpp)
    options = {"prompt": prompt} | ({"channel": channel} if codec == "diffc" else {})
    if codec == "perco":
        options |= {"seed": seed, "captioner": load_captioner(captioner, pipe.device)}
    encode(pipe, image, target, force, **options, **rate)


@app.command("decode")
def decode_command(
    source: Source,
    target: Target,
    reconstruction: Reconstruction = "flow",
    preview: Preview = False,
    realism: Realism = 1.0,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    any_model: AnyModel = False,
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Decompress a file to a picture, in the format that the suffix of OUT says; PNG to stdout."""
    check_target(target, source, force)
    check_picture_suffix(target)
    data, limits = read_input(source), Limits(pixels=max_pixels)
    facts = describe(data, limits)
    codec = facts["codec"].lower()
    pipe = load(model, device, dtype, codec, facts.get("preset"))
    options = decoding(reconstruction, preview, steps, guidance, seed)
    if codec != "diffc":
        options = {name: value for name, value in options.items() if name in ("guidance_scale", "num_inference_steps")}
    if codec == "relic":
        options["realism"] = 0.0 if preview else realism
    seconds = decode(pipe, data, target, force, allow_other_model=any_model, limits=limits, **options)
    say(target, f"{target}: {facts['width']}x{facts['height']} pixels, {seconds:.1f} s")
    if not facts["complete"]:
        say(
            target, f"note: the file was cut short; the picture is made of {facts['steps_present']} of its {facts['steps']} steps"
        )


@app.command("info")
def info_command(source: Source, find: Find = None, max_pixels: MaxPixels = DEFAULT_LIMITS.pixels):
    """Say what a compressed file holds, without a model, and, asked to, which of your models it was made with."""
    data, limits = read_input(source), Limits(pixels=max_pixels)
    facts = describe(data, limits)
    width = max(map(len, facts))
    for name, value in facts.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:{width}}  {text if text.isprintable() else repr(text)}")  # a prompt must not steer the terminal
    if find:
        find_model(read_header(data, limits)[0], find)


@app.command("demo")
def demo_command(
    photo: Photo = None,
    folder: Folder = Path("demo"),
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    quality: Quality = None,
    prompt: Prompt = "",
    channel: Channel = "trellis",
    reconstruction: Reconstruction = "flow",
    preview: Preview = False,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """A photo to a file and back: writes the file, the decoded picture and both pictures side by side."""
    rate = {"target_bpp": DEMO_BPP} if (bpp, max_bytes, quality) == (None, None, None) else chosen_rate(bpp, max_bytes, quality)
    options = decoding(reconstruction, preview, steps, guidance, seed)
    photo = photo or demo_photo()
    coded, decoded, both = (folder / (photo.stem + suffix) for suffix in (".dfc", ".decoded.png", ".side_by_side.png"))
    for target in (coded, decoded, both):
        check_overwrite(target, photo, force)
    image = open_picture(photo)

    pipe = load(model, device, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    encode(pipe, image, coded, force, prompt=prompt, channel=channel, **rate)
    seconds = decode(pipe, coded.read_bytes(), decoded, force, **options)
    psnr, pair = compare(image, open_picture(decoded))
    write_file(both, picture_bytes(pair, both), overwrite=force)
    print(f"{decoded}: PSNR {psnr:.2f} dB, {seconds:.1f} s")
    print(f"{both}: the photo on the left, what the file holds on the right")


@app.command("batch")
def batch_command(
    source: Inputs,
    output: Tree,
    decode: Decode = False,
    codec: CodecName = "diffc",
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    quality: Quality = None,
    option: Options = None,
    batch_size: BatchSize = 8,
    preset: Preset = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Anew = False,
):
    """Compress whole datasets, or decompress them. Started again it goes on where it was; exit status 3: some pictures failed.

    `accelerate launch -m diffusers_compress.cli batch ...` shares the work among GPUs and machines.
    """
    options = dict(map(named_value, option or [])) | ({} if decode else chosen_rate(bpp, max_bytes, quality, codec))
    settings = {"input": source, "decode": decode, "codec": codec, "model": model, "dtype": dtype, "batch_size": batch_size}
    settings |= {"preset": preset} if preset else {}

    import torch
    from accelerate import PartialState

    from diffusers_compress import batch

    # Processes wait for the slowest of them at the end, however long it takes.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=365))
    pipe = load(model, device or str(state.device), dtype, codec, preset or bpp)
    pipe.set_progress_bar_config(disable=True)
    direction = (batch.decoder if decode else batch.encoder)(pipe, batch_size, **options)
    share = f"process 1 of {state.num_processes}" if state.num_processes > 1 else "coding"
    track = partial(progress_of, label=share) if state.is_main_process else lambda work, total: work
    start = time.perf_counter()
    batch.run(direction, source, output, settings | options, state, force, track)
    if state.is_main_process and report(output, batch.picture_lines(output), time.perf_counter() - start):
        raise typer.Exit(SOME_FAILED)


@app.command("eval")
def eval_command(
    folder: Pictures,
    out: Report,
    codec: Codecs = "diffc",
    bpp: Rates = "0.02,0.05,0.1",
    metrics: Metrics = "",
    model: Models = None,
    every: Every = 1,
    jobs: Jobs = 1,
    anchor: Anchor = "",
    device: Device = None,
    dtype: Dtype = "float32",
):
    """Measure codecs on a folder of pictures, through files: tables, plots, crops and one page, report.html."""
    import torch

    from diffusers_compress import evaluation
    from diffusers_compress.metrics import PICTURE_METRICS, SET_METRICS, WITHOUT_WEIGHTS
    from diffusers_compress.report import markdown, quality_table, summarise, write_report

    for library in ("bjontegaard", "matplotlib"):
        if find_spec(library) is None:
            raise ValueError(f'the report needs {library}: pip install "diffusers_compress[eval]"')
    quieten_libraries()
    names = [*PICTURE_METRICS, *SET_METRICS] if metrics == "all" else metrics.split(",") if metrics else list(WITHOUT_WEIGHTS)
    models = {model_source(name): Path(name).name if Path(name).exists() else name for name in model or []}
    codecs = [
        evaluation.parse_codec(text, *known)
        for text in codec.split(",")
        for known in (models or {embedded_model(text.partition(":")[0]): ""}).items()
    ]
    codecs = list(dict.fromkeys(codecs))  # a baseline has no model
    if anchor and anchor not in [known.label for known in codecs]:
        raise ValueError(f"--anchor is {anchor!r}, permitted are {', '.join(known.label for known in codecs)}")
    rates = [evaluation.parse_rate(text) for text in bpp.split(",")]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True)
    columns = TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=None)
        show = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        of_pictures = tuple(name for name in names if name not in SET_METRICS)
        rows = evaluation.evaluate(folder, out, codecs, rates, of_pictures, device, dtype, every, jobs, show)
    evaluation.write_rows(out, rows)
    figures = evaluation.set_figures(folder, out, rows, [name for name in names if name in SET_METRICS])
    given = {"--codec": codec, "--bpp": bpp, "--metrics": ",".join(names), "--every": every, "--jobs": jobs}
    words = [str(folder), "--out", str(out), *(str(word) for option in given.items() for word in option)]
    command = shlex.join(["diffusers-compress", "eval", *words, *(word for name in model or [] for word in ("--model", name))])
    page = write_report(folder, out, rows, command, figures, anchor)
    print(markdown(*quality_table(summarise(rows, figures))))
    print(f"{page}: {len(rows)} rows, also in {out / 'rows.csv'}")


@app.command("calibrate")
def calibrate_command(
    folder: Pictures,
    out: Calibrated,
    max_pictures: MaxPictures = 16,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
):
    """Measure a model on a folder of pictures, so that the codecs know its errors: files get smaller, textures right.

    Writes a copy of the model with what was found in its config. Files made with another calibration need that other copy.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; name a new folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    pictures = some_pictures(folder, max_pictures)
    pipe = load(model, device, dtype)

    from diffusers_compress import calibration

    with phase("calibrating", pipe) as clock:
        found = {"error": calibration.calibrate_error(pipe, pictures), "latent": calibration.calibrate_latent(pipe, pictures)}
    source = model_source(model)
    save_calibrated(source if Path(source).exists() else pipe.download(source), out, found)
    print(f"{out}: calibrated on {len(pictures)} pictures, {clock.seconds:.1f} s")
    for trained in ("variance_head", "parameter_network"):
        if (out / trained).is_dir():
            print(f"note: the model's {trained} was trained on top of another calibration; train it again")


@app.command("push")
def push_command(
    repository: Repository,
    pictures: CardPictures = None,
    max_pictures: MaxPictures = 16,
    bpp: CardRates = "0.05,0.1,0.2",
    license: License = None,
    private: Private = False,
    codec: CodecName = "diffc",
    preset: Preset = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
):
    """Share a model as a codec on the Hub, with a card that says how to load it and what it was measured to do."""
    rates = [float(rate) for rate in bpp.split(",")]
    measured = some_pictures(pictures, max_pictures) if pictures else []
    pipe = load(model, device, dtype, codec, preset)
    with phase("measuring and pushing", pipe):
        address = pipe.push_to_hub(repository, license, measured, rates, private=private or None)
    print(address)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False):
    if version:
        print(f"diffusers-compress {__version__}")
        raise typer.Exit


# -------------------------------------------------------------------------------------------------------------------- steps


def encode(pipe, image: Image.Image, target: Path, force: bool, **options):
    """Compress a picture to a file and say what came of it. `options` are those of `compress`."""
    with phase("encoding", pipe) as clock:
        out = pipe.compress(image, **options)
    write_output(target, out.bitstreams[0], force)
    say(target, f"{target}: {len(out.bitstreams[0]):,} bytes, {out.bpp[0]:.4f} bpp, {clock.seconds:.1f} s")
    for note in out.notes[0]:
        say(target, f"note: {note}")


def decode(pipe, data: bytes, target: Path, force: bool, **options) -> float:
    """Decompress a file to a picture file; the seconds it took. `options` are those of `decompress`."""
    from diffusers_compress import drift

    with phase("decoding", pipe) as clock:
        out = pipe.decompress(data, **options)
    write_output(target, picture_bytes(out.images[0], target), force)
    if out.drift and (out.drift[0] or 0) > drift.BOUND:
        say(target, f"note: {drift.message(out.drift[0])}")
    return clock.seconds


def find_model(header: Header, folders: list[Path]):
    """Say which model folders below these a file was made with. FileNotFoundError if none."""
    known = {index.parent: model_identity(index.parent, header) for folder in folders for index in model_indices(folder)}
    for folder, identity in known.items():
        if identity == header.fingerprint.hex():
            print(f"made with  {folder}")
    if header.fingerprint.hex() not in known.values():
        for folder, identity in known.items():
            print(f"not {folder}: {identity}", file=sys.stderr)
        raise FileNotFoundError(f"model {header.fingerprint.hex()} is none of the {len(known)} model folders there")


def model_indices(folder: Path) -> list[Path]:
    """Of pipelines, and of PerCo's adapters."""
    indices = {"model_index.json", "adapter.json"}
    return sorted(Path(path, name) for path, _, names in os.walk(folder) for name in indices.intersection(names))


def model_identity(folder: Path, header: Header) -> str:
    """The fingerprint that files of this codec made with a model folder bear, in hex, or why there is none."""
    try:
        return load(str(folder), "cpu", "bfloat16", CODECS[header.codec].lower()).fingerprint().hex()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one folder, the next may be the right one
        return explain(error)


def some_pictures(folder: Path, count: int) -> list[Image.Image]:
    """At most so many pictures of a folder's tree, evenly chosen."""
    from diffusers_compress.batch import PICTURES

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise FileNotFoundError(f"{folder}: no picture here with one of the suffixes {', '.join(sorted(PICTURES))}")
    return [open_picture(path) for path in paths[:: -(-len(paths) // count)]]


def save_calibrated(model: str, target: Path, calibration: dict):
    """A copy of a model's folder, all codecs' components included and in their own types, with the calibration in its config."""
    shutil.copytree(model, target)
    index = target / "model_index.json"
    config = json.loads(index.read_text(encoding="utf-8"))
    config["_calibration"] = (config.get("_calibration") or {}) | calibration
    index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def report(output: Path, rows: Iterable[dict], seconds: float) -> int:
    """Say what a batch came to; the number of pictures that failed."""
    good = failed = size = bpp = 0
    for row in rows:
        if row["error"]:
            failed += 1
            if failed <= 10:
                print(f"failed: {row['source']}: {row['error']}", file=sys.stderr)
        else:
            good, size, bpp = good + 1, size + row["bytes"], bpp + row["bpp"]
    if failed > 10:
        print(f"and {failed - 10:,} more: see {output / 'manifest.jsonl'}", file=sys.stderr)
    mean = f"{bpp / max(1, good):.4f} bpp on average"
    print(f"{output}: {good:,} of {good + failed:,} pictures, {size:,} bytes, {mean}, {seconds:.1f} s")
    return failed


def decoding(reconstruction: str, preview: bool, steps: int | None, guidance: float | None, seed: int | None) -> dict:
    """The options of `decompress` that the command line's options stand for."""
    options = {"reconstruction": "denoised" if preview else reconstruction}
    if guidance is not None:
        options["guidance_scale"] = guidance
    if steps is not None:
        options["num_inference_steps"] = steps
    if seed is not None:
        import torch

        options["generator"] = torch.Generator().manual_seed(seed)
    return options


def load_captioner(name: str | None, device):
    """What makes captions, if asked for."""
    if name is None:
        return None
    from diffusers_compress import captions

    with phase("loading the captioner"):
        return captions.load_captioner(name, str(device))


def chosen_rate(bpp: float | None, max_bytes: int | None, quality: float | None, codec: str = "diffc") -> dict:
    """The one rate argument of `compress` that was given; ValueError if it is not one. PerCo's model decides the rate, so that it
    takes at most one, and no quality."""
    rates = {"--bpp": ("target_bpp", bpp), "--max-bytes": ("max_bytes", max_bytes), "--quality": ("quality", quality)}
    given = {option: rate for option, rate in rates.items() if rate[1] is not None}
    if codec == "perco":
        if len(given) > 1 or quality is not None:
            raise ValueError(f"perco takes --bpp or --max-bytes, or neither; given: {', '.join(given)}")
    elif len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(rates)}; given: {', '.join(given) or 'none'}")
    return dict(given.values())


def named_value(text: str) -> tuple[str, object]:
    """NAME=VALUE as a pair; the value a number or a truth value where it reads as one, otherwise text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--option {text}: give NAME=VALUE")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def load(model: str | None, device: str | None, dtype: str, codec: str = "diffc", preset: str | float | None = None):
    """The pipeline of a folder or a Hub id, on its device. `preset`: of PerCo, see its `from_pretrained`."""
    model = model_source(model, codec)
    options = {"preset": preset} if codec == "perco" else {}
    with phase("loading the model"):
        import torch

        import diffusers_compress

        quieten_libraries()
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: there is no CUDA device here")
        return (
            getattr(diffusers_compress, PIPELINES[codec])
            .from_pretrained(model, dtype=getattr(torch, dtype), **options)
            .to(device)
        )


def model_source(model: str | None, codec: str = "diffc") -> str:
    """What `from_pretrained` is to load: a folder that holds a model, or what looks like a Hub id."""
    model = model or embedded_model(codec)
    if Path(model).exists():
        if not any(Path(model).glob(index) for index in ("model_index.json", "adapter.json", "*/adapter.json")):
            raise FileNotFoundError(f"{model}: no model here (a model folder holds model_index.json)")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise FileNotFoundError(f"{model}: no such model folder")
    return model


def demo_photo() -> Path:
    """The photo that matplotlib ships for its own examples: the official portrait of Commodore Grace M. Hopper, a U.S. Navy
    photograph (Wikimedia Commons, File:Grace_Hopper.jpg), in the public domain as a work of the U.S. federal government."""
    matplotlib = find_spec("matplotlib")
    photo = Path(matplotlib.origin).parent / "mpl-data/sample_data/grace_hopper.jpg" if matplotlib else None
    if photo is None or not photo.is_file():
        raise FileNotFoundError('no demo photo here: pip install "diffusers_compress[demo]", or name a photo of yours')
    return photo


def describe(data: bytes, limits: Limits) -> dict:
    """The facts of a compressed file; BitstreamError by kind if it is none."""
    header, _ = read_header(data, limits)  # a file that is none of ours is told at once

    return import_module(f"diffusers_compress.pipelines.{CODECS[header.codec].lower()}").describe(data, limits)


def open_picture(path: Path) -> Image.Image:
    from diffusers_compress import images

    return images.read_image(read_input(path), "stdin" if path == DASH else path)


def compare(image: Image.Image, decoded: Image.Image) -> tuple[float, Image.Image]:
    """PSNR in dB over 8-bit sRGB samples, and both pictures in one."""
    from diffusers_compress import images

    x, x_hat = images.to_tensor(image)[0], images.to_tensor(decoded)[0]
    psnr = 10 * (4 / (x - x_hat).square().mean()).log10()  # samples lie in [-1, 1], so the peak is 2
    return float(psnr), images.side_by_side(images.to_output(x[None])[0], decoded)


# -------------------------------------------------------------------------------------------------------------------- files


def check_target(target: Path, source: Path, force: bool):
    """Before any work: OSError if the result could not be written to `target`."""
    if target == DASH:
        if sys.stdout.isatty():
            raise OSError("OUT is -, and stdout is a terminal: send it to a file or a program")
        return
    check_overwrite(target, source, force)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target.parent}: this folder is read-only")


def check_overwrite(target: Path, source: Path, force: bool):
    """FileExistsError if `target` is there and must stay."""
    if target.exists():
        if not target.is_file():
            raise FileExistsError(f"{target}: exists and is not a file")
        if source != DASH and target.samefile(source):
            raise FileExistsError(f"{target}: is the input itself")
        if not force:
            raise FileExistsError(f"{target}: exists already; --force overwrites it")


def check_picture_suffix(target: Path):
    """ValueError unless Pillow writes pictures with this suffix."""
    Image.init()
    if target != DASH and Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{target}: no picture format has the suffix {target.suffix!r}; .png is one")


def picture_bytes(image: Image.Image, target: Path) -> bytes:
    """The picture as a file in the format that the suffix of `target` says, PNG for stdout."""
    buffer = BytesIO()
    image.save(buffer, format="PNG" if target == DASH else Image.registered_extensions()[target.suffix.lower()])
    return buffer.getvalue()


def read_input(source: Path) -> bytes:
    return sys.stdin.buffer.read() if source == DASH else source.read_bytes()


def write_output(target: Path, data: bytes, force: bool):
    if target == DASH:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_file(target, data, overwrite=force)


def say(target: Path, line: str):
    """A line to the user: to stdout, unless the result itself goes there."""
    print(line, file=sys.stderr if target == DASH else sys.stdout)


# -------------------------------------------------------------------------------------------------------------- the terminal


@contextmanager
def phase(label: str, pipe=None) -> Iterator[SimpleNamespace]:
    """On a terminal, a bar while the block runs, advanced by the pipeline's own steps. Afterwards `.seconds` tells how long."""
    console, clock, start = Console(stderr=True), SimpleNamespace(seconds=0.0), time.perf_counter()
    columns = SpinnerColumn(), TextColumn(label), BarColumn(), TextColumn("{task.completed:.0f} steps"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        if pipe is not None:
            bar = SimpleNamespace(update=lambda n=1: progress.advance(task, n))
            pipe.progress_bar = lambda iterable=None, total=None: nullcontext(bar)
        yield clock
    clock.seconds = time.perf_counter() - start


def progress_of(work: Iterable[tuple[int, list]], total: int, label: str) -> Iterator[tuple[int, list]]:
    """The work as it is, with a bar on a terminal and otherwise a line a minute: done, rate, remaining time."""
    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]:.1f}/s")
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
    start, said, done = time.monotonic(), time.monotonic(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total, rate=0.0)
        for advance, rows in work:
            done, now = done + advance, time.monotonic()
            rate = done / max(now - start, 1e-3)
            progress.update(task, advance=advance, rate=rate)
            if not console.is_terminal and now - said > 60:
                said = now
                print(f"{label}: {done:,} of {total:,}, {rate:.1f}/s, {(total - done) / rate:.0f} s left", file=sys.stderr)
            yield advance, rows


def quieten_libraries():
    """Keep the chatter of diffusers and transformers off the user's screen."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def explain(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted"
    if hasattr(error, "format_message"):  # a wrong option or argument
        return " ".join(error.format_message().split())
    message = str(error).strip()
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", message, re.IGNORECASE):
        return "out of memory: take a smaller picture, --dtype float16 or another --device"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first_line = message.partition("\n")[0]
    return first_line if first_line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first_line}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status. A failure prints one line to stderr."""
    if arguments is None:  # a process of its own: when it is told to end, it removes what it was about to write
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command = typer.main.get_command(app)
            status = command.main(arguments, prog_name="diffusers-compress", standalone_mode=False) or 0
            sys.stdout.flush()
            return status
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a user gets a line, never a traceback
        let_go_of_stdout()
        print(f"error: {explain(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def let_go_of_stdout():
    """If it is full or closed, Python would complain once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
