"""The options and arguments of the commands."""

from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffusers_compress.cli.terminal import DASH, UsageError
from diffusers_compress.contract import CODECS, unknown_options


def codec_name(name: str) -> str:
    if name not in CODECS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(CODECS)}")
    return name


def input_file(path: Path) -> Path:
    if path != DASH and (path.is_dir() or not path.exists()):
        raise typer.BadParameter(f"{path}: no such file")
    return path


Source = Annotated[Path, typer.Argument(metavar="IN", callback=input_file, show_default=False, help="- is stdin.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="- is stdout.")]
Photo = Annotated[
    Path | None,
    typer.Argument(metavar="[PHOTO]", exists=True, dir_okay=False, help="Default: a photo that comes with the package."),
]
Model = Annotated[str | None, typer.Option(help="Model folder or Hub id. Default: the embedded model.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda, mps or xpu if there is one, otherwise cpu.")]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the network's weights.")]
Bpp = Annotated[float | None, typer.Option(help="Bits per pixel not to exceed.")]
MaxBytes = Annotated[int | None, typer.Option(help="File size not to exceed.")]
Fidelity = Annotated[float | None, typer.Option(help="How far down the noise the stream goes, above 0 and up to 1.")]
Psnr = Annotated[float | None, typer.Option(help="PSNR in dB that the decoded picture reaches, in place of a rate.")]
TargetMetric = Annotated[
    str | None, typer.Option("--metric", metavar="NAME=VALUE", help="As --psnr, of another metric: lpips, dists, wd, ms_ssim.")
]
Prompt = Annotated[str | None, typer.Option(help="What the picture shows; stored in the file.")]
Coder = Annotated[
    Literal["trellis", "trellis32", "poisson"] | None,
    typer.Option(
        show_default="trellis32", help="trellis: faster, files 3 to 4 % larger. poisson is the published coder, for comparison."
    ),
]
Reconstruction = Annotated[
    Literal["flow", "ancestral", "denoised"] | None,
    typer.Option(show_default="flow", help="How the decoder finishes the picture."),
]
Preview = Annotated[bool, typer.Option("--preview", help="A quick picture, in one network call or none.")]
Realism = Annotated[
    float | None, typer.Option(show_default="1", help="From 0, the picture of least error, to 1, the one with natural texture.")
]
Steps = Annotated[int | None, typer.Option(help="Network calls that finish the picture.")]
Guidance = Annotated[float | None, typer.Option(help="Above 1: guidance towards the prompt in the file. Default: the codec's.")]
Finisher = Annotated[
    str | None,
    typer.Option(
        help="Student that finishes the picture in one call or --steps: [SCHEDULER@]FOLDER_OR_ID, such as LCM@FOLDER; or embedded."
    ),
]
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
CodecName = Annotated[
    str,
    typer.Option(callback=codec_name, autocompletion=lambda: list(CODECS), metavar="NAME", help=f"One of {', '.join(CODECS)}."),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Of a model with several rates: which, such as 0.0019. Default: by --bpp, or the smallest."),
]
Captioner = Annotated[
    str | None,
    typer.Option(
        help="Model that makes the prompt, such as Salesforce/blip2-opt-2.7b-coco, open_clip:MODEL/WEIGHTS or invert:MODEL/WEIGHTS."
    ),
]
NoiseSeed = Annotated[
    int | None, typer.Option("--seed", help="Of the noise that a decoder starts from; stored in the file. Default: 0.")
]
BaseCodec = Annotated[
    str | None,
    typer.Option(
        "--base",
        show_default="jpeg",
        help="Of refine: jpeg, webp, avif, jxl, jpeg2000, diffc or relic, which the file holds whole.",
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="Where the bits go: a mask picture, boxes LEFT,TOP,RIGHT,BOTTOM;..., 'saliency', or MODEL:LABEL of a segmentation model."
    ),
]
Lossless = Annotated[bool, typer.Option("--lossless", help="The file holds every pixel; the rate is that of its lossy part.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE, an argument of the codec's compress or decompress. Repeatable.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures of like size that share the network.")]
Pictures = Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="Pictures.", show_default=False)]
Report = Annotated[Path, typer.Option("--out", help="Folder of the report. A run that was stopped goes on there.")]
Codecs = Annotated[
    str,
    typer.Option(
        help=f"Commas between. {', '.join(CODECS)} with :encode.NAME=VALUE:decode.NAME=VALUE; jpeg, webp, avif, jxl, jpeg2000."
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


# Option -> argument of `compress` and of `decompress`.
RATES = {
    "--bpp": "target_bpp",
    "--max-bytes": "max_bytes",
    "--fidelity": "fidelity",
    "--psnr": "target_psnr",
    "--metric": "target_metric",
}
ENCODING = RATES | {
    "--prompt": "prompt",
    "--coder": "coder",
    "--captioner": "captioner",
    "--seed": "seed",
    "--base": "base",
    "--importance": "importance",
    "--lossless": "lossless",
}
DECODING = {
    "--reconstruction": "reconstruction",
    "--realism": "realism",
    "--steps": "num_inference_steps",
    "--guidance": "guidance_scale",
    "--seed": "generator",
    "--finisher": "finisher",
}


def given_rates(codec: str, *rates: float | str | None) -> dict[str, Any]:
    """Of `rates`, in the order of RATES, those that were given, by option; UsageError unless they are as many as the codec takes, and in
    range."""
    given: dict[str, Any] = {option: rate for option, rate in zip(RATES, rates) if rate is not None}
    kind, names = CODECS[codec].rate, ", ".join(given) or "none"
    if kind == "required" and len(given) != 1:
        raise UsageError(f"give exactly one of {', '.join(RATES)}; given: {names}")
    if kind == "cap" and len(given) > 1:
        raise UsageError(f"give at most one of {', '.join(RATES)} to {codec}; given: {names}")
    if "--metric" in given:
        given["--metric"] = named_value(given["--metric"], "--metric")
    for option, rate in given.items():
        number = rate[1] if option == "--metric" else rate
        if not isinstance(number, int | float) or not number > 0 or (option == "--fidelity" and number > 1):
            raise UsageError(f"{option} must be above 0{' and at most 1' if option == '--fidelity' else ''}, not {number}")
    return given


def check_preset(codec: str, preset: str | None) -> None:
    """UsageError if a preset is given to a codec whose models have one rate."""
    if preset is not None and not CODECS[codec].presets:
        raise UsageError(f"--preset: {codec} has no such option")


def arguments_of(
    codec: str, method: str, names: dict[str, str], options: dict[str, Any], extra: list[str] | None = None
) -> dict[str, Any]:
    """Arguments of a codec's `compress` or `decompress`: of the `options` that were given, not None, and of --option NAME=VALUE.

    UsageError for an option that this codec does not know: nothing that was typed is passed over in silence.
    """
    typed = {option: (names[option], value) for option, value in options.items() if value is not None}
    typed |= {f"--option {name}": (name, value) for name, value in map(named_value, extra or [])}
    check_known(codec, method, {option: name for option, (name, _) in typed.items()})
    return dict(typed.values())


def check_known(codec: str, method: str, typed: dict[str, str]) -> None:
    """UsageError unless the codec's method knows the arguments of these options."""
    if not typed:
        return  # and nothing is imported
    function: Callable = getattr(CODECS[codec].pipeline_class(), method)
    for option, name in typed.items():
        if unknown_options(function, [name]):
            raise UsageError(f"{option}: {codec} has no such option {'in decoding' if method == 'decompress' else 'in encoding'}")


def preview_arguments(codec: str, typed: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `decompress` for --preview, beside others; UsageError if the codec has none, or another says the same."""
    preview = CODECS[codec].preview
    if not preview:
        raise UsageError(f"--preview: {codec} has no such option in decoding")
    for option, name in DECODING.items():
        if name in preview.keys() & typed.keys():
            raise UsageError(f"give --preview or {option}, not both")
    return preview


def named_value(text: str, option: str = "--option") -> tuple[str, object]:
    """NAME=VALUE as a pair; the value a number or a truth value where it reads as one, otherwise text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"{option} {text}: give NAME=VALUE")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
