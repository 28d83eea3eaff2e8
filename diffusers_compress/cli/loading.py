"""Models for the commands."""

import re
from pathlib import Path

from diffusers_compress.cli.terminal import phase, quieten_libraries
from diffusers_compress.contract import CODECS, DEFAULT


def load_captioner(name: str | None, device):
    """What makes captions, if asked for."""
    if name is None:
        return None
    from diffusers_compress import captions

    with phase("loading the captioner"):
        return captions.load_captioner(name, str(device))


def load(model: str | None, device: str | None, dtype: str, codec: str = DEFAULT, preset: str | float | None = None, **options):
    """The pipeline of a folder or a Hub id, on its device. `preset`: where a model has several rates, a name or bits per pixel;
    options: of `from_pretrained`."""
    model = model_source(model, codec)
    options |= {"preset": preset} if CODECS[codec].presets else {}
    with phase("loading the model"):
        import torch

        quieten_libraries()
        place = torch.device(device_of(device))
        pipeline = CODECS[codec].pipeline_class()
        return pipeline.from_pretrained(model, dtype=getattr(torch, dtype), **options).to(place)


def device_of(name: str | None) -> str:
    """The device of this name; by default the GPU of whatever kind (cuda, mps, xpu), or the CPU where there is none."""
    import torch

    there = torch.accelerator.current_accelerator(check_available=True)
    kind = (name or "cpu").partition(":")[0]
    if kind in ("cuda", "mps", "xpu") and (there is None or there.type != kind):
        raise ValueError(f"--device {name}: there is no {kind.upper()} device here")
    return name or (there.type if there else "cpu")


def model_source(model: str | None, codec: str = DEFAULT) -> str:
    """What `from_pretrained` is to load: a folder that holds a model, or what looks like a Hub id."""
    model = model or CODECS[codec].embedded_model()
    if Path(model).exists():
        if not any(Path(model).glob(index) for index in ("model_index.json", "adapter.json", "*/adapter.json")):
            raise FileNotFoundError(f"{model}: no model here (a model folder holds model_index.json)")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise FileNotFoundError(f"{model}: no such model folder")
    return model
