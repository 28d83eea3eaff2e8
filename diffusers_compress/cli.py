"""The command `diffusers-compress`: encode, decode, info, demo. What loads torch is imported inside the functions that need it,
so that help and usage errors come at once."""

import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from diffusers_compress import __version__, embedded_model
from diffusers_compress.bitstream import read_header, write_file

DEMO_BPP = 0.05

Source = Annotated[Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, readable=True, show_default=False)]
Target = Annotated[Path, typer.Argument(metavar="OUT", show_default=False)]
Photo = Annotated[
    Path | None, typer.Argument(metavar="[PHOTO]", exists=True, dir_okay=False, help="Default: a photo that matplotlib ships.")
]
Model = Annotated[str | None, typer.Option(help="Stable-Diffusion folder or Hub id. Default: the embedded model.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, otherwise cpu.")]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the network's weights.")]
Bpp = Annotated[float | None, typer.Option(help="Bits per pixel not to exceed.")]
MaxBytes = Annotated[int | None, typer.Option(help="File size not to exceed.")]
Quality = Annotated[float | None, typer.Option(help="How far down the noise the stream goes, above 0 and up to 1.")]
Prompt = Annotated[str, typer.Option(help="What the picture shows; stored in the file.")]
Channel = Annotated[Literal["trellis", "poisson"], typer.Option(help="poisson is the published coder, for comparison.")]
Reconstruction = Annotated[Literal["flow", "ancestral", "denoised"], typer.Option(help="How the decoder finishes the picture.")]
Preview = Annotated[bool, typer.Option("--preview", help="Same as --reconstruction denoised: one network call.")]
Steps = Annotated[int | None, typer.Option(help="Network calls that finish the picture.")]
Guidance = Annotated[float, typer.Option(help="Above 1: guidance towards the prompt in the file.")]
Seed = Annotated[int | None, typer.Option(help="For --reconstruction ancestral: the same seed gives the same picture.")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="Decode although the file was made with another model.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Folder = Annotated[Path, typer.Option(help="Where the three files go.")]

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
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Compress a picture. Give exactly one of --bpp, --max-bytes and --quality."""
    rate = chosen_rate(bpp, max_bytes, quality)
    check_target(target, source, force)
    image = open_picture(source)
    pipe = load(model, device, dtype)
    encode(pipe, image, target, force, prompt=prompt, channel=channel, **rate)


@app.command("decode")
def decode_command(
    source: Source,
    target: Target,
    reconstruction: Reconstruction = "flow",
    preview: Preview = False,
    steps: Steps = None,
    guidance: Guidance = 1.0,
    seed: Seed = None,
    any_model: AnyModel = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Decompress a file to a picture, in the format that the suffix of OUT says."""
    check_target(target, source, force)
    check_picture_suffix(target)
    facts = describe_file(source)
    pipe = load(model, device, dtype)
    options = decoding(reconstruction, preview, steps, guidance, seed)
    seconds = decode(pipe, source, target, force, allow_other_model=any_model, **options)
    print(f"{target}: {facts['width']}x{facts['height']} pixels, {seconds:.1f} s")
    if not facts["complete"]:
        print(f"note: the file was cut short; the picture is made of {facts['steps_present']} of its {facts['steps']} steps")


@app.command("info")
def info_command(source: Source):
    """Say what a compressed file holds, without a model."""
    facts = describe_file(source)
    width = max(map(len, facts))
    for name, value in facts.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:{width}}  {text if text.isprintable() else repr(text)}")  # a prompt must not steer the terminal


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
    guidance: Guidance = 1.0,
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
    seconds = decode(pipe, coded, decoded, force, **options)
    psnr, pair = compare(image, open_picture(decoded))
    write_file(both, picture_bytes(pair, both), overwrite=force)
    print(f"{decoded}: PSNR {psnr:.2f} dB, {seconds:.1f} s")
    print(f"{both}: the photo on the left, what the file holds on the right")


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
    write_file(target, out.bitstreams[0], overwrite=force)
    print(f"{target}: {len(out.bitstreams[0]):,} bytes, {out.bpp[0]:.4f} bpp, {clock.seconds:.1f} s")
    for note in out.notes[0]:
        print(f"note: {note}")


def decode(pipe, source: Path, target: Path, force: bool, **options) -> float:
    """Decompress a file to a picture file; the seconds it took. `options` are those of `decompress`."""
    with phase("decoding", pipe) as clock:
        image = pipe.decompress(source.read_bytes(), **options).images[0]
    write_file(target, picture_bytes(image, target), overwrite=force)
    return clock.seconds


def decoding(reconstruction: str, preview: bool, steps: int | None, guidance: float, seed: int | None) -> dict:
    """The options of `decompress` that the command line's options stand for."""
    options = {"reconstruction": "denoised" if preview else reconstruction, "guidance_scale": guidance}
    if steps is not None:
        options["num_inference_steps"] = steps
    if seed is not None:
        import torch

        options["generator"] = torch.Generator().manual_seed(seed)
    return options


def chosen_rate(bpp: float | None, max_bytes: int | None, quality: float | None) -> dict:
    """The one rate argument of `compress` that was given; ValueError if it is not one."""
    rates = {"--bpp": ("target_bpp", bpp), "--max-bytes": ("max_bytes", max_bytes), "--quality": ("quality", quality)}
    given = {option: rate for option, rate in rates.items() if rate[1] is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(rates)}; given: {', '.join(given) or 'none'}")
    return dict(given.values())


def load(model: str | None, device: str | None, dtype: str):
    """The pipeline of a folder or a Hub id, on its device."""
    model = model_source(model)
    with phase("loading the model"):
        import torch

        from diffusers_compress import DiffCPipeline

        quieten_libraries()
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: there is no CUDA device here")
        return DiffCPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)


def model_source(model: str | None) -> str:
    """What `from_pretrained` is to load: a folder that holds a model, or what looks like a Hub id."""
    model = model or embedded_model()
    if Path(model).exists():
        if not Path(model, "model_index.json").is_file():
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


def describe_file(source: Path) -> dict:
    """The facts of a compressed file; BitstreamError by kind if it is none."""
    data = source.read_bytes()
    read_header(data)  # a file that is none of ours is told at once

    from diffusers_compress.pipelines.diffc import describe

    return describe(data)


def open_picture(path: Path) -> Image.Image:
    from diffusers_compress import images

    return images.open_image(path)


def compare(image: Image.Image, decoded: Image.Image) -> tuple[float, Image.Image]:
    """PSNR in dB over 8-bit sRGB samples, and both pictures in one."""
    from diffusers_compress import images

    x, x_hat = images.to_tensor(image)[0], images.to_tensor(decoded)[0]
    psnr = 10 * (4 / (x - x_hat).square().mean()).log10()  # samples lie in [-1, 1], so the peak is 2
    return float(psnr), images.side_by_side(images.to_output(x[None])[0], decoded)


# -------------------------------------------------------------------------------------------------------------------- files


def check_target(target: Path, source: Path, force: bool):
    """Before any work: OSError if the result could not be written to `target`."""
    check_overwrite(target, source, force)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")


def check_overwrite(target: Path, source: Path, force: bool):
    """FileExistsError if `target` is there and must stay."""
    if target.exists():
        if not target.is_file():
            raise FileExistsError(f"{target}: exists and is not a file")
        if target.samefile(source):
            raise FileExistsError(f"{target}: is the input itself")
        if not force:
            raise FileExistsError(f"{target}: exists already; --force overwrites it")


def check_picture_suffix(target: Path):
    """ValueError unless Pillow writes pictures with this suffix."""
    Image.init()
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{target}: no picture format has the suffix {target.suffix!r}; .png is one")


def picture_bytes(image: Image.Image, target: Path) -> bytes:
    """The picture as a file in the format that the suffix of `target` says."""
    buffer = BytesIO()
    image.save(buffer, format=Image.registered_extensions()[target.suffix.lower()])
    return buffer.getvalue()


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
        return f"{error.filename}: {error.strerror}"
    first_line = message.partition("\n")[0]
    return first_line if first_line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first_line}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status. A failure prints one line to stderr."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command = typer.main.get_command(app)
            return command.main(arguments, prog_name="diffusers-compress", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a user gets a line, never a traceback
        print(f"error: {explain(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())
