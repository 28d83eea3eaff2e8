"""The options and arguments of the commands."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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
