"""What a codec's training changes in a UNet, as a small file over the untouched base: whole tensors, and low-rank differences.

Low rank: Hu et al. 2022 (LoRA), W = W_0 + up @ down, for linear layers and convolutions alike. A changed UNet is an ordinary
`UNet2DConditionModel` again once `merge` was called.
"""

import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

FILE, ABOUT = "unet_changes.safetensors", "adapter.json"
REMAINDER = "log2_remainder"  # of a `WienerUNet` around an estimate


class LowRank(nn.Module):
    """Parametrization of a weight [n_out, ...] by a difference of this rank; zero at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        columns = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def widen(unet, extra: int):
    """Give the UNet `extra` more input channels, which it ignores until trained. Careil et al. 2024, section 3.2."""
    old = unet.conv_in
    new = nn.Conv2d(old.in_channels + extra, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new.to(old.weight)
    unet.register_to_config(in_channels=unet.config.in_channels + extra)


def choose_trained(unet, rank: int | None, whole: str = ""):
    """Let gradients reach conv_in and either all tensors (rank None), or those whose name matches `whole` and low-rank differences of
    the other weights."""
    unet.requires_grad_(rank is None)
    if rank is None:
        return
    unet.conv_in.requires_grad_(True)
    for name, module in list(unet.named_modules()):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(parameter.requires_grad or bool(whole and re.match(whole, name)))
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad and rank:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank).to(module.weight))


def changes(unet) -> dict[str, Tensor]:
    """The trained tensors by name; a low-rank difference of `NAME` as `NAME.up` and `NAME.down`."""
    trained = {name: parameter.detach() for name, parameter in unet.named_parameters() if parameter.requires_grad}
    if REMAINDER in dict(unet.named_buffers()):
        trained[REMAINDER] = unet.get_buffer(REMAINDER)
    return {re.sub(r"parametrizations\.(\w+)\.0\.", r"\1.", name): tensor for name, tensor in trained.items()}


@torch.no_grad()
def load_trained(unet, folder: Path):
    """Put the file's tensors in the place of those that `choose_trained` chose. ValueError if one of them has no place there."""
    chosen = changes(unet)  # the parameters' own memory
    with safe_open(Path(folder, FILE), "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if name not in chosen or chosen[name].shape != tensor.shape:
                raise ValueError(
                    f"{folder} has {name} {list(tensor.shape)}, which is not trained here: give the options that it was made with"
                )
            chosen[name].copy_(tensor)


def merge(unet):
    """Make low-rank differences part of the weights."""
    for module in unet.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


def save(tensors: dict[str, Tensor], folder: Path, base: str, dtype=torch.float16):
    """Write the tensors and the name of the model that they change: a Hub id, or a folder as seen from this one."""
    save_file({name: tensor.to(dtype).contiguous().cpu() for name, tensor in tensors.items()}, Path(folder, FILE))
    Path(folder, ABOUT).write_text(json.dumps({"base": base}, indent=2) + "\n", encoding="utf-8")


def find(name: str | os.PathLike, preset: str | float | None = None, **options) -> Path | None:
    """The folder of an adapter, fetched from the Hub if need be; None if `name` is none. options: of `from_pretrained`.

    Of several adapters in a folder or repository, named by bits per pixel, the one called `preset`, or for a number the largest that is
    not above it; the smallest if there is no such one. ValueError for a name that is none of them.
    """
    if Path(name).is_dir():
        return choose(Path(name), preset)
    where = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=["model_index.json", ABOUT, f"*/{ABOUT}"], **where))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
        return None  # for `from_pretrained` to say
    chosen = choose(folder, preset)
    if chosen is None:
        return None  # a whole pipeline
    within = chosen.relative_to(folder)
    files = [(within / file).as_posix() for file in (ABOUT, FILE, "hyper_encoder/*", "controlnet/*", "estimator/*")]
    return Path(snapshot_download(str(name), allow_patterns=files, **where)) / within


def choose(folder: Path, preset: str | float | None) -> Path | None:
    """The folder itself if it is an adapter, one of the adapters in it, or None if there are none."""
    if (folder / ABOUT).is_file():
        return folder
    presets = {path.parent.name: path.parent for path in folder.glob(f"*/{ABOUT}")}
    if not presets:
        return None
    if isinstance(preset, str):
        if preset not in presets:
            raise ValueError(f"preset is {preset!r}, {folder} has {', '.join(sorted(presets))}")
        return presets[preset]
    within = [rate for rate in presets if preset is not None and float(rate) <= preset]
    return presets[max(within, key=float, default=min(presets, key=float))]


def base_of(folder: Path) -> str:
    """The model that an adapter changes, for `from_pretrained`."""
    base = json.loads(Path(folder, ABOUT).read_text(encoding="utf-8"))["base"]
    return str(folder / base) if (folder / base).is_dir() else base


def dtype_of(options: dict, component: str) -> torch.dtype | None:
    """The type that options of `from_pretrained` give to a component."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    return dtype.get(component, dtype.get("default")) if isinstance(dtype, dict) else dtype


def with_float32(options: dict, component: str) -> dict:
    """The options, but float32 for this component."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    if dtype is None:
        return options
    every = dtype if isinstance(dtype, dict) else {"default": dtype}
    return {name: option for name, option in options.items() if name != "torch_dtype"} | {
        "dtype": every | {component: torch.float32}
    }


@torch.no_grad()
def apply(unet, folder: Path, dtype: torch.dtype | None = None):
    """Change a base UNet as the folder's file says, then cast it; conv_in is widened as needed.

    The base should have float32: rounded first, a weight near zero may get another sign than its sum has, and the model another
    fingerprint. ValueError if the file is of another UNet.
    """
    with safe_open(Path(folder, FILE), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    widen(unet, tensors["conv_in.weight"].shape[1] - unet.conv_in.in_channels)
    if REMAINDER in tensors:
        unet.centre_on_estimate()
    targets = dict(unet.named_parameters()) | dict(unet.named_buffers())
    for name, tensor in tensors.items():
        if name.endswith(".down"):
            continue
        low_rank = name.endswith(".up")
        target = targets.get(name.removesuffix(".up"))
        if low_rank:
            tensor = tensor.float() @ tensors[name.removesuffix("up") + "down"].float()
        if target is None or target.numel() != tensor.numel():
            raise ValueError(f"{folder} changes {name} of another UNet than this one")
        tensor = tensor.view_as(target)
        target.copy_(target.float() + tensor.to(target.device) if low_rank else tensor)
    nn.Module.to(unet, dtype)
