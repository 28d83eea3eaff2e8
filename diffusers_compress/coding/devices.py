"""What a codec has to know of a device: copies to it are slow, each, and some have no float64."""

import functools

import numpy as np
import torch
from torch import Tensor


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Tensors of the CPU, those with the largest elements first, on the device: with one copy for all."""
    if device.type == "cpu":
        return list(tensors)
    sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
    copied = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]).to(device)
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(copied.split(sizes), tensors)]


def order_of(keys: Tensor) -> Tensor:
    """Positions of integers [..., n] in rising order, equal ones in the order that they have [..., n]; |keys| below 2^32."""
    if keys.device.type != "cpu":
        return keys.sort(stable=True).indices
    # On a CPU numpy sorts plain integers several times as fast: each holds a key and its position.
    n = keys.shape[-1]
    bits = n.bit_length()
    return torch.from_numpy(np.sort((keys << bits | torch.arange(n)).numpy())) & 2**bits - 1


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def double(x: Tensor) -> Tensor:
    """x in float64: on the CPU, if its device has none."""
    return (x if has_float64(x.device) else x.cpu()).double()
