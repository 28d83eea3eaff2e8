"""The values of a network's weights, wherever offloading keeps them and however they are packed."""

import torch
from accelerate.utils import named_module_tensors
from safetensors import safe_open
from torch import Tensor, nn


def diffusers_hooks(module: nn.Module) -> dict[str, object]:
    """The hooks that diffusers put on a module itself, by name."""
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def disk_group(module: nn.Module):
    """The group of weights that diffusers keeps in a file until this module is called, or None."""
    group = getattr(diffusers_hooks(module).get("group_offloading"), "group", None)
    return group if group is not None and group._is_offloaded_to_disk else None


def stored(module: nn.Module) -> dict[str, Tensor]:
    """The state dictionary, with values that offloading keeps elsewhere: accelerate in a mapping, diffusers' groups in a file."""
    state, names, files = module.state_dict(), {}, {}
    for kind in (module.named_parameters, module.named_buffers):
        for name, tensor in kind(remove_duplicate=False):  # a tied weight has several
            names.setdefault(id(tensor), []).append(name)
    for path, part in module.named_modules():
        outer = getattr(part, "_hf_hook", None)
        for hook in getattr(outer, "hooks", [outer]):
            if getattr(hook, "weights_map", None) is not None:
                for name, tensor in named_module_tensors(part, recurse=hook.place_submodules):
                    if tensor.is_meta:
                        state[f"{path}.{name}".lstrip(".")] = hook.weights_map[name]
        group = disk_group(part)
        if group is not None:  # what the parameters hold is memory that nobody filled
            with safe_open(group.safetensors_file_path, "pt") as file:
                for tensor, key in group.tensor_to_key.items():
                    if files.setdefault(id(tensor), group.safetensors_file_path) != group.safetensors_file_path:
                        raise ValueError(
                            f"{names[id(tensor)][0]} is a tied weight, of which diffusers' group offloading to disk writes a second "
                            "file after the values are gone; offload to memory"
                        )
                    for name in names.get(id(tensor), []):
                        if name in state:  # some buffers are not
                            state[name] = file.get_tensor(key)
    return state


def plain(what: str, tensor: Tensor) -> tuple[Tensor, list[str]]:
    """An ordinary tensor with the same values, and the name of its kind if it is narrower than 16 bits. ValueError if there is none."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{what} is packed in a way that cannot be read back, as by torch's quantize_dynamic; load the model as it was saved, "
            "or quantize it with torchao's quantize_"
        )
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values; load the weights")
    tensor = tensor.detach()
    if type(tensor).dequantize is not Tensor.dequantize or tensor.is_quantized:
        return tensor.dequantize(), ["quantized"]
    if hasattr(tensor, "__tensor_flatten__"):
        raise ValueError(
            f"{what} is a {type(tensor).__name__}, whose values cannot be read here; load the model as ordinary tensors"
        )
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    return tensor.as_subclass(Tensor), [str(tensor.dtype).removeprefix("torch.")] if narrow else []


def portable(model):
    """A copy of a network of ours in float64 on the CPU, where what it computes depends on no setting, and on no hook of the model."""
    with torch.device("meta"):  # no weights are drawn, which would advance torch's global generator
        copy = type(model).from_config(model.config)
    weights = {name: plain(name, tensor)[0].cpu().double() for name, tensor in stored(model).items()}
    if other := copy.state_dict().keys() ^ weights.keys():
        raise ValueError(
            f"the layers of {type(model).__name__} were replaced ({min(other)}), as PEFT does; merge its adapters and unload them"
        )
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False).eval()
