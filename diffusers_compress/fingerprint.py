"""Four bytes that tell one set of weights from another, whatever their names, floating-point type or device."""

import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_compress.weights import diffusers_hooks, disk_group, plain, stored

SAMPLES = 16_384
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
# Hooks of diffusers that leave a module's output as it is. All others skip or reuse parts of the computation.
HARMLESS_HOOKS = {
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
}


def fingerprint(modules: Mapping[str, nn.Module], config: Mapping, fused: bool = False) -> bytes:
    """4 bytes from the shapes and signs of the weights that compute, and from `config`, the plain values that decide decoding.

    A weight's sign bit survives rounding to any narrower IEEE-like type, underflow to -0.0 included, so float32, float16 and bfloat16
    loads of the same weights agree. At most 16,384 evenly spaced elements of each tensor count. The names and order of tensors and
    adapters do not, nor does where the weights are kept. A change that flips no sampled sign, such as a rescaled layer, goes unseen: no
    threshold other than zero is safe from rounding. This guards against mistakes, not forgery.

    Args:
        modules: the model's networks by component name.
        config: numbers, strings, lists, dictionaries and None.
        fused: what the fingerprint would be if the active PEFT adapters were merged into the weights, in the type they have now; those
            of layers whose weights are offloaded one by one or in groups stay as they are.

    Raises:
        ValueError: for weights that have no values here or that cannot be read, for a network whose output depends on more than a file
            says, and for `config` with other values.
    """
    digest, networks, samples = hashlib.blake2b(_json(dict(config)), digest_size=4), [], []
    for component, module in sorted(modules.items()):
        weights = list(_weights(component, module, fused))
        networks.append((component, module, [facts for _, facts in weights]))
        samples += _samples([tensor for tensor, _ in weights])
    found = iter(_bytes(samples))
    for component, module, weights in networks:
        digest.update(_json([component, *_free_u(module)]))
        # A set: tied weights stand in the state dictionary once or twice, as the library pleases.
        each = {hashlib.blake2b(_json(facts) + next(found), digest_size=16).digest() for facts in weights}
        digest.update(b"".join(sorted(each)))
    return digest.digest()


def has_adapters(modules: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT adapters that are not fused compute in any of these networks."""
    layers = [layer for module in modules.values() for layer in _tuner_layers(dict(module.named_modules())).values()]
    return any(map(_active, layers))


def checksum(modules: Mapping[str, nn.Module]) -> list:
    """What changes with any value or type of the weights that compute: for what is kept in memory, not for files."""
    weights = [(tensor, facts) for name, module in sorted(modules.items()) for tensor, facts in _weights(name, module, False)]
    sums = [torch.hash_tensor(tensor.view(INTEGERS[tensor.itemsize])).view(torch.int64) for tensor, _ in weights]
    totals = torch.stack([total.cpu() for total in sums]).tolist()
    return [(str(tensor.dtype), facts, total) for (tensor, facts), total in zip(weights, totals)]


# --------------------------------------------------------------------------------------------------- the weights that compute


def _weights(component: str, module: nn.Module, fused: bool) -> Iterator[tuple[Tensor, list]]:
    """Each tensor that takes part in the computation, with what else counts of it: its shape and, where there are such, the kind
    and scale of its adapter, and the name of a type that is narrower than 16 bits."""
    parts = dict(module.named_modules())
    _check_calls(component, module, parts)
    state, adapters = stored(module), {}
    for path, layer in _tuner_layers(parts).items():
        active = _active(layer)
        if fused and active and not any(diffusers_hooks(part) or hasattr(part, "_hf_hook") for part in layer.modules()):
            layer_fused = copy.deepcopy(layer)  # PEFT's own arithmetic, in the type of the weights
            layer_fused.merge()
            base = {f"{path}.base_layer.{name}": tensor for name, tensor in layer_fused.get_base_layer().state_dict().items()}
            state, active = state | base, {}
        for kind in layer.adapter_layer_names:
            for name in getattr(layer, kind, {}):
                adapters[f"{path}.{kind}.{name}"] = [kind, f"{active[name]:.6g}"] if name in active else None
    for name, tensor in state.items():
        adapter = next((adapters[prefix] for prefix in _prefixes(name) if prefix in adapters), [])
        if adapter is not None:
            tensor, kind = plain(f"{component}.{name}", tensor)
            yield tensor, [list(tensor.shape), *adapter, *kind]


def _tuner_layers(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that PEFT put in the place of others, by name. ValueError for a kind whose state is unknown."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = {}
    for path, layer in parts.items():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{path} is PEFT's {type(layer).__name__}, which is not supported; merge the adapter into the model first"
            )
        if isinstance(layer, BaseTunerLayer):
            if layer.merged and layer.disable_adapters:
                layer.unmerge()  # as it would at its next call
            layers[path] = layer
    return layers


def _active(layer: nn.Module) -> dict[str, float]:
    """The adapters of a PEFT layer that it adds to its base when it is called, with their scales."""
    if layer.merged or layer.disable_adapters:
        return {}
    scaling = getattr(layer, "scaling", {})
    present = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}
    scales = {name: float(scaling.get(name, 1)) for name in layer.active_adapters if name in present}
    return {name: scale for name, scale in scales.items() if scale}


# ------------------------------------------------------------------------------------------------ what else decides the output


def _check_calls(component: str, module: nn.Module, parts: dict[str, nn.Module]) -> None:
    """ValueError for a network that needs more than a file says, or does not compute all of its output at each call."""
    if getattr(getattr(module, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(f"{component} expects a picture as a prompt (IP-Adapter), which no file holds; call unload_ip_adapter()")
    if hasattr(module, "encode") and disk_group(module) and disk_group(module).tensor_to_key:
        raise ValueError(
            f"{component} is called by other methods than forward, so diffusers' group offloading to disk never reads some of its weights; "
            f'offload it by "leaf_level" or leave it out: exclude_modules=["{component}"]'
        )
    names = {name for part in parts.values() for name in diffusers_hooks(part)} - HARMLESS_HOOKS
    if names:
        raise ValueError(
            f"{component} has the hook {min(names)} of diffusers, with which its output depends on earlier calls or leaves layers out; "
            f"files would not decode elsewhere: call {component}.disable_cache(), or load the model again"
        )


def _free_u(module: nn.Module) -> list[float]:
    """The factors of FreeU (Si et al. 2023), if they are in use: `unet.enable_freeu`."""
    blocks = getattr(module, "up_blocks", None) or [None]
    factors = [getattr(blocks[0], name, None) for name in ("s1", "s2", "b1", "b2")]
    return factors if all(factors) else []


# ------------------------------------------------------------------------------------------------------------------- bytes


def _samples(tensors: list[Tensor]) -> list[tuple[Tensor, torch.dtype]]:
    """Of each tensor the elements 0, s, 2s, ... with the smallest odd s that leaves at most 16,384: whether the sign bit of a
    floating-point type is set, elements of any other as they are; and the tensor's type."""
    groups, found = {}, [(torch.empty(0), tensor.dtype) for tensor in tensors]
    for i, tensor in enumerate(tensors):
        stride = -(-tensor.numel() // SAMPLES) | 1  # odd: an even one would meet the same columns of a matrix again and again
        groups.setdefault((tensor.device, tensor.dtype), []).append((i, tensor.reshape(-1)[::stride]))
    for (_, dtype), group in groups.items():
        together = torch.cat([sample for _, sample in group])
        if dtype.is_floating_point:
            # the sign bit, whatever the processor does to subnormal numbers
            together = together.view(INTEGERS[dtype.itemsize]) < 0
        for (i, _), own in zip(group, together.split([sample.numel() for _, sample in group])):
            found[i] = own, dtype
    return found


def _bytes(samples: list[tuple[Tensor, torch.dtype]]) -> list[bytes]:
    """Signs packed, eight to a byte, and other elements little-endian. One copy to the CPU for all tensors of a device."""
    found = [b""] * len(samples)
    for device in {sample.device for sample, _ in samples}:
        own = [i for i, (sample, _) in enumerate(samples) if sample.device == device]
        raw = [samples[i][0].view(torch.uint8) for i in own]
        copied = torch.cat(raw).cpu().numpy()
        for i, elements in zip(own, np.split(copied, np.cumsum([part.numel() for part in raw]))):
            dtype = samples[i][1]
            if dtype.is_floating_point:
                found[i] = np.packbits(elements).tobytes()
            else:
                integers = elements.copy().view(torch.empty(0, dtype=dtype).numpy().dtype)
                found[i] = integers.astype(integers.dtype.newbyteorder("<")).tobytes()
    return found


def _prefixes(name: str) -> Iterator[str]:
    """The name, then all that it lies in: a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _json(value) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False).encode()
    except TypeError as error:
        raise ValueError(f"config may hold numbers, strings, lists and None only: {error}") from error
