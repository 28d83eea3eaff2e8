"""A simulated accelerator: the device "simulated", which refuses what a GPU refuses, and counts what a GPU would wait for.

Its tensors keep their values in the CPU's memory, but PyTorch takes them for those of another device: tensors of two devices do not mix,
`numpy()` and generators of the CPU are refused. Import this module, and the device is there for the whole process, as a backend in
Python (`torch.utils.backend_registration`): so it is for processes of its own, see `device_cells.py`.

Counted are kernel launches, and copies between the device and the CPU. A copy to the CPU, of a single number too, waits until the device
has done all its work.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "simulated"
ROOT = Path(__file__).resolve().parents[1]
OURS = (f"{ROOT}/diffusers_compress/", f"{ROOT}/pipelines/")

launches, copies = Counter(), Counter()  # by place in our code
narrow = False  # whether the device lacks float64, as Apple's does

# Operations that compute nothing on the device
VIEWS = {
    *(
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "lift_fresh",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
    ),
    *("squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_real", "_reshape_alias", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size"),
}
# Kernels of an operation that has several, about
KERNELS = {"sort": 6, "topk": 8, "argsort": 6, "nonzero": 4, "cumsum": 2, "index_put_": 3, "native_group_norm": 2}
# The length of what they return is read from the device.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
INDEXING = {"index", "index_put_", "_unsafe_index", "_index_put_impl_"}  # these take indices of the CPU too


class Simulated(torch.Tensor):
    """A tensor on the device; `held`: the values, an ordinary tensor."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=f"{DEVICE}:0", **shape)
        made.held = held
        return made

    def __repr__(self):
        return f"Simulated({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def run(function, arguments, options):
    """What PyTorch does with an operation that has a tensor on the device among its arguments, or makes one there."""
    name = function.__name__.partition(".")[0]
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Simulated) and tensor.dim()]
    if name == "_local_scalar_dense":
        copies[place()] += 1
        return arguments[0].held.item()
    if name == "_to_copy":
        return moved(arguments[0], **options)
    if name == "copy_":
        target, source = arguments[:2]
        crossing = isinstance(target, Simulated) != isinstance(source, Simulated)
        (copies if crossing else launches)[place()] += 1
        held(target).copy_(held(source))
        return target
    if elsewhere and not (name in INDEXING and isinstance(arguments[0], Simulated)):
        raise RuntimeError(f"{name}: tensors are on two devices, {DEVICE} and cpu, at {place()}")
    generator = options.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: the generator is of the CPU, at {place()}")

    masks = [tensor for tensor in tensors if tensor.dtype in (torch.bool, torch.uint8)] if name in INDEXING else []
    waits = name in WAITING or name == "repeat_interleave" and options.get("output_size") is None
    kernels, crossing = 0 if name in VIEWS else KERNELS.get(name, 1), len(elsewhere) + len(masks) + waits
    if kernels or crossing:
        where = place()
        launches[where] += kernels
        copies[where] += crossing
    given = {name: torch.device("cpu") if name == "device" else value for name, value in options.items() if name != "pin_memory"}
    result = function(*tree_map(held, arguments), **tree_map(held, given))
    if function._schema.is_mutable and isinstance(arguments[0], Simulated):
        return arguments[0]
    return tree_map(there, result)


def moved(tensor, dtype=None, device=None, memory_format=None, **_):
    """A copy with another type or on another device."""
    leaves, stays = isinstance(tensor, Simulated), device is None or torch.device(device) == tensor.device
    (launches if stays else copies)[place()] += 1
    target = leaves if device is None else torch.device(device).type == DEVICE
    made = torch.ops.aten._to_copy(held(tensor), dtype=dtype, memory_format=memory_format)
    return there(made) if target else made


def held(value):
    return value.held if isinstance(value, Simulated) else value


def there(value):
    if not isinstance(value, torch.Tensor) or isinstance(value, Simulated):
        return value
    if narrow and value.dtype == torch.float64:
        raise TypeError(f"the device has no float64, at {place()}")
    return Simulated(value)


def place():
    """Line of our code that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def attention(query, key, value, *arguments, **options):
    """scaled_dot_product_attention, which has no implementation for a new device."""
    if not isinstance(query, Simulated):
        return original_attention(query, key, value, *arguments, **options)
    launches[place()] += 1
    arguments, options = tree_map(held, (arguments, options))
    return there(original_attention(held(query), held(key), held(value), *arguments, **options))


def count(*arguments, device, pin_memory=None, layout=None, **options):
    """torch.arange, whose implementation for all devices gives an empty tensor another length in place: a wrapper cannot follow."""
    launches[place()] += 1
    return there(torch.arange(*arguments, **options))


backend_registration._setup_privateuseone_for_python_backend(DEVICE)
library = torch.library.Library("_", "IMPL")
library.fallback(lambda keys, function, *arguments, **options: run(function, arguments, options), "PrivateUse1", with_keyset=True)
counting = torch.library.Library("aten", "IMPL", "PrivateUse1")
for overload in ("arange", "arange.start", "arange.start_step"):
    counting.impl(overload, count)
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) makes it on the CPU first
torch.__future__.set_overwrite_module_params_on_conversion(True)
original_attention = torch.nn.functional.scaled_dot_product_attention
torch.nn.functional.scaled_dot_product_attention = attention
