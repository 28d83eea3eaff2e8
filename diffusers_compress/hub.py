"""A codec's pipeline as a repository: its index, the files by which plain diffusers loads it, its card, and the way to the Hub."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, LocalTokenNotFoundError

from diffusers_compress import images
from diffusers_compress.contract import CODECS, key_of
from diffusers_compress.metrics import distortion

OURS = "diffusers_compress"
RATES = (0.05, 0.1, 0.2)  # bits per pixel of a card's table
PIPELINE_FILE = "pipeline"
# diffusers reads the file and the class of `_class_name`, and prints all of it where it cannot load such a pipeline.
HINT = "of the package diffusers_compress: take DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
WEIGHTS = [
    f"{stem}{variant}.{suffix}"
    for stem in ("model", "pytorch_model", "diffusion_pytorch_model")
    for variant in ("", ".fp16", ".bf16", ".non_ema")
    for suffix in ("safetensors", "bin")
]

# ----------------------------------------------------------------------------------------------------------------- the index


def tidy_index(config: dict) -> dict:
    """A pipeline's config as model_index.json keeps it: no absent parts, no path of this machine, and what is ours under a name that
    other pipelines pass over."""
    config = {name: value for name, value in config.items() if value is not None and value not in ([None, None], (None, None))}
    config.pop("_name_or_path", None)
    if "calibration" in config:
        config["_calibration"] = config.pop("calibration")
    return config


def known_index(config: dict, known: set[str]) -> dict:
    """A model_index.json as the pipeline class with these arguments reads it: undoes `tidy_index` and `write_loaders`, and leaves out
    components that it does not know, with their weights."""
    config = dict(config)
    calibration = config.pop("_calibration", None)
    if calibration is not None and "calibration" in known:
        config["calibration"] = calibration
    if isinstance(config.get("_class_name"), list):
        config["_class_name"] = config["_class_name"][1]
    for name, value in list(config.items()):
        if isinstance(value, (list, tuple)) and not name.startswith("_"):
            if value[0] == module_of(name):
                config[name] = [OURS, value[1]]
            if name not in known:
                config.pop(name)
                config.setdefault("_ignore_files", []).extend(f"{name}/{file}" for file in WEIGHTS)
    return config


def module_of(component: str) -> str:
    return f"modeling_{component}"


def write_loaders(folder: Path) -> None:
    """Make `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` load a saved pipeline: a file for its class, and one for
    each component of ours, that take them from the package."""
    index = folder / "model_index.json"
    config = json.loads(index.read_text(encoding="utf-8"))
    write_loader(folder / f"{PIPELINE_FILE}.py", config["_class_name"])
    config["_class_name"] = [PIPELINE_FILE, config["_class_name"], HINT]
    for name, value in config.items():
        if isinstance(value, list) and value[0] == OURS:
            write_loader(folder / name / f"{module_of(name)}.py", value[1])
            config[name] = [module_of(name), value[1]]
    index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def forget_paths(folder: Path) -> None:
    """Take out of the components' configs where they were loaded from."""
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.keys() & {"_name_or_path", "name_or_path"}:
            kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "name_or_path")}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_loader(path: Path, name: str) -> None:
    path.write_text(
        f'"""From the package diffusers_compress."""\n\nfrom {OURS} import {name}\n\n__all__ = ["{name}"]\n',
        encoding="utf-8",
    )


# ------------------------------------------------------------------------------------------------------------------ the card


def rate_table(pipe: DiffusionPipeline, pictures: Sequence, rates: Sequence[float] = RATES) -> list[dict]:
    """For each rate in bits per pixel: {"asked", "bpp", "bytes", "psnr"}, means over the pictures, through files.

    Of a codec that needs no rate there is one row, at the model's own: "asked" is None.
    """
    rows, chosen = [], CODECS[key_of(pipe)].rate == "required"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.dfc")
        for rate in rates if chosen else [None]:
            measured, options = [], {"target_bpp": rate} if chosen else {}
            for picture in pictures:
                file.write_bytes(pipe.compress(picture, **options).bitstreams[0])
                decoded = pipe.decompress(file.read_bytes()).images[0]
                x, x_hat = images.to_tensor(picture)[0], images.to_tensor(decoded)[0]
                size = file.stat().st_size
                measured.append((8 * size / x[0].numel(), size, distortion.psnr(x / 2, x_hat / 2)))
            means = (sum(column) / len(pictures) for column in zip(*measured))
            rows.append({"asked": rate} | dict(zip(("bpp", "bytes", "psnr"), means)))
    return rows


def licence_of(source: str) -> str | None:
    """The licence that the card of a model's folder or Hub id names, if it does."""
    card = Path(source, "README.md") if Path(source).is_dir() else source
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (EntryNotFoundError, ValueError):  # there is no card
        return None


def model_card(pipe: DiffusionPipeline, repo_id: str, license: str, rates: list[dict] | None = None) -> ModelCard:
    """What a visitor of the repository reads; `rates` are the rows of `rate_table`, or None if nothing was measured."""
    name, source = type(pipe).__name__, str(pipe.config.get("_name_or_path") or "")
    base = source if source and not Path(source).exists() else None
    codec = name.removesuffix("Pipeline")
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        license=license,
        pipeline_tag="image-to-image",
        tags=["image-compression", OURS, codec.lower()],
    )
    calibration = pipe.config.get("calibration")
    measured = f"measured: {', '.join(sorted(calibration))}" if calibration else "none; the codec takes its built-in expectations"
    table = "Nothing was measured of this model."
    if rates:
        lines = [
            f"| {'-' if row['asked'] is None else format(row['asked'], 'g')} | {row['bpp']:.4f} | {row['bytes']:.0f} | {row['psnr']:.2f} |"
            for row in rates
        ]
        table = "\n".join(["| bpp asked | bpp | bytes | PSNR, dB |", "|--|--|--|--|", *lines])
    return ModelCard(CARD.format(header=data.to_yaml(), codec=codec, name=name, repo_id=repo_id, measured=measured, table=table,
                                 family=pipe.kind, model=pipe.fingerprint().hex(),
                                 base=f" Made from `{base}`." if base else ""))  # fmt: skip


CARD = """---
{header}
---

# {repo_id}

The image codec {codec} on a {family} model, for [diffusers](https://github.com/huggingface/diffusers) with the package
`diffusers_compress`.{base}

```python
from diffusers_compress import {name}

pipe = {name}.from_pretrained("{repo_id}")
out = pipe.compress(image, target_bpp=0.1)  # a PIL picture
open("picture.dfc", "wb").write(out.bitstreams[0])
image = pipe.decompress(open("picture.dfc", "rb").read()).images[0]
```

Or by diffusers alone, with the package installed:
`DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)`.

Files know their model, this one by `{model}`: they are decoded with this repository.

## Calibration

Calibration: {measured}.

## Rates

Means over the pictures given, through files; bits per pixel are 8 bytes / (width height).

{table}
"""

# ------------------------------------------------------------------------------------------------------------------- the Hub


def write_repository(
    pipe: DiffusionPipeline,
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    pictures: Sequence = (),
    rates: Sequence[float] = RATES,
    **options,
) -> None:
    """Everything that a repository on the Hub holds: components, loaders, index and card. `options` are those of `save_pretrained`.

    ValueError if the licence is neither given nor named by the card of the model that the pipeline was loaded from.
    """
    license = license or licence_of(str(pipe.config.get("_name_or_path") or ""))
    if not license:
        raise ValueError("the model's card names no licence; give the one that it is under, such as license='openrail++'")
    pipe.save_pretrained(folder, **options)
    forget_paths(Path(folder))
    rows = rate_table(pipe, pictures, rates) if len(pictures) else None
    model_card(pipe, repo_id, license, rows).save(Path(folder, "README.md"))


def check_account(token: str | None = None) -> None:
    """OSError if the Hub cannot be reached, or there is no token that it takes."""
    try:
        HfApi(token=token).whoami()
    except LocalTokenNotFoundError:
        raise OSError("pushing needs a token of the Hub: store one with `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # the client's kinds are those of its own library for HTTP
        why = str(error).strip().partition("\n")[0]
        raise OSError(f"the Hub cannot be reached or does not take the token ({why}); nothing was pushed") from error


def push(
    pipe: DiffusionPipeline,
    repo_id: str,
    license: str | None = None,
    pictures: Sequence = (),
    rates: Sequence[float] = RATES,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    **options,
) -> str:
    """`write_repository` to the Hub, in one commit. Returns the commit's address. OSError before any work if the Hub refuses."""
    check_account(token)
    with tempfile.TemporaryDirectory() as folder:
        write_repository(pipe, folder, repo_id, license, pictures, rates, **options)
        return upload(pipe, Path(folder), repo_id, private, token, commit_message, create_pr)


def upload(
    pipe: DiffusionPipeline,
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """A folder to the Hub, in one commit. Returns the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = commit_message or f"{type(pipe).__name__} by {OURS}"
    return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message, create_pr=create_pr))


@contextmanager
def with_loaders(pipe: DiffusionPipeline, folder: Path, options: dict, push: bool) -> Iterator[None]:
    """Around diffusers' `save_pretrained`: what it writes to the folder gets loaders, and goes to the Hub with them if `push`. Of the
    `options` those for the Hub are taken out. OSError before any work if the Hub refuses."""
    sharing = {name: options.pop(name) for name in signature(upload).parameters if push and name in options}
    if push:
        check_account(sharing.get("token"))
    yield
    write_loaders(folder)
    if push:
        upload(pipe, folder, **({"repo_id": folder.name} | sharing))
