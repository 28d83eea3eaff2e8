"""Four bytes that tell one set of weights from another, whatever their floating-point type or device."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model

SAMPLES = 65_536


def fingerprint(modules: Mapping[str, torch.nn.Module], config: Mapping) -> bytes:
    """4 bytes from names, shapes and signs of the weights of `modules`, and from `config`, the plain values that decide decoding.

    A weight's sign bit survives rounding to any narrower IEEE-like type, underflow to -0.0 included, so float32, float16 and
    bfloat16 loads of the same weights agree. At most 65,536 evenly spaced elements of each tensor count. A change that flips none
    of their signs, such as a rescaled layer, goes unseen: no threshold other than zero is safe from rounding. This guards against
    mistakes, not forgery. ValueError if weights are on the meta device, or if `config` holds anything but plain values.
    """
    digest = hashlib.blake2b(digest_size=4)
    digest.update(_json(dict(config)))
    for component, module in sorted(modules.items()):
        # Prefixes that depend on torch.compile and on the version of transformers, not on what the module computes.
        state = _state(module).items()
        weights = {name.replace("_orig_mod.", "").replace("text_model.", ""): tensor for name, tensor in state}
        for name, tensor in sorted(weights.items()):
            if tensor.is_meta:
                raise ValueError(f"{component}.{name} is on the meta device and has no values; load the weights")
            digest.update(_json([component, name, list(tensor.shape)]))
            digest.update(_samples(tensor))
    return digest.digest()


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dictionary, also of a module whose weights sequential offloading keeps elsewhere."""
    if any(hasattr(part, "_hf_hook") and any(p.is_meta for p in part.parameters(recurse=False)) for part in module.modules()):
        return get_state_dict_offloaded_model(module)
    return module.state_dict()


def _samples(tensor: torch.Tensor) -> bytes:
    """Sign bits of a floating-point tensor, raw little-endian elements of any other, thinned out by an odd stride."""
    if not isinstance(tensor, torch.nn.Parameter) and type(tensor) is not torch.Tensor:
        tensor = tensor.dequantize()  # a quantization library's own class
    stride = -(-tensor.numel() // SAMPLES) | 1  # odd: an even one would meet the same columns of a matrix again and again
    tensor = tensor.detach().reshape(-1)[::stride]
    if tensor.is_floating_point():
        return np.packbits(torch.signbit(tensor.float()).cpu().numpy()).tobytes()
    elements = tensor.cpu().numpy()
    return elements.astype(elements.dtype.newbyteorder("<")).tobytes()


def _json(value) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False).encode()
    except TypeError as error:
        raise ValueError(f"config may hold numbers, strings, lists and None only: {error}") from error
