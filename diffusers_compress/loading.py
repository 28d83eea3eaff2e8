"""Checks of a model's files before they are loaded, and one line for what goes wrong: what, why, what to do."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open


def check_folder(folder: Path, names: Iterable[str], safetensors: bool = True) -> None:
    """Look at the folders of these components, so far as the model's index lists them.

    Raises:
        FileNotFoundError: one is missing, or has its weights in a format that may run code, while only safetensors are permitted.
        ValueError: a LoRA was saved inside a network. diffusers would leave the layers under it random, with a warning.
    """
    index = folder / "model_index.json"
    listed = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    for name in names:
        if not (isinstance(listed.get(name), list) and listed[name][0]):
            continue
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder}: the folder of the component {name} is missing; fetch or copy the model again")
        weights = sorted((folder / name).glob("*.safetensors"))
        pickles = sorted((folder / name).glob("*.bin"))
        if safetensors and pickles and not weights:
            raise FileNotFoundError(
                f"{folder}: the weights of {name} are a pickle ({pickles[0].name}), which can run code; convert them to safetensors, "
                "or load with use_safetensors=False if you trust their source"
            )
        for file in weights:
            with safe_open(file, "pt") as opened:
                if any(".base_layer." in key for key in opened.keys()):  # noqa: SIM118 - not a dictionary
                    raise ValueError(
                        f"{folder}: {name} was saved with a LoRA inside, which diffusers cannot load; call fuse_lora() and "
                        "unload_lora_weights() before saving, or save the LoRA apart from the model"
                    )


def with_dtypes(options: dict) -> dict:
    """The options of `from_pretrained`, with types that are given by name, such as "bfloat16", as torch's: diffusers would load float32.

    ValueError for a name that is none.
    """

    def typed(value):
        if isinstance(value, dict):
            return {component: typed(each) for component, each in value.items()}
        found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if isinstance(value, str) and not isinstance(found, torch.dtype):
            raise ValueError(f"dtype is {value!r}; permitted are float32, float16, bfloat16 and torch's other types")
        return found

    return {name: typed(value) if name in ("dtype", "torch_dtype") else value for name, value in options.items()}


@contextmanager
def explained(model: str, revision: str | None = None) -> Iterator[None]:
    """Around what loads a model: an OSError of one line for what went wrong with the Hub."""
    try:
        yield
    except OSError as error:
        if (said := reason(error, model, revision)) is None:
            raise
        raise OSError(said) from None


def reason(error: Exception, model: str, revision: str | None = None) -> str | None:
    """One line for an error that loading a model from the Hub ended with; None if it is of another kind."""
    found = {type(cause) for cause in causes(error)}
    if GatedRepoError in found:
        return f"{model}: the Hub gives this model to those only who accepted its terms; do so on its page, and give a token"
    if RepositoryNotFoundError in found:
        return f"{model}: neither a folder here nor a public model on the Hub; check the name, or give a token if it is private"
    if RevisionNotFoundError in found:
        return f"{model}: the model on the Hub has no revision {revision!r}"
    if LocalEntryNotFoundError in found:
        why = error.__cause__ or "local_files_only or HF_HUB_OFFLINE forbids to ask it"
        return f"{model}: the Hub cannot be reached ({why}), and the model is not in the cache; connect, or give a folder"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that led to it."""
    if error is not None:
        yield error
        yield from causes(error.__cause__)
        if error.__context__ is not error.__cause__:
            yield from causes(error.__context__)
