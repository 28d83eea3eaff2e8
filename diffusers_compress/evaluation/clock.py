"""Time and memory."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch


def timed(function: Callable):
    """What the function returns, and wall seconds."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def synchronize():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def stopwatch(pipe=None) -> Iterator[dict]:
    """Wall seconds of the block, those of them inside the denoiser and the autoencoder, the denoiser's calls, peak memory: of the GPU,
    if the pipeline is on one, else of this process."""
    figures: dict[str, Any] = {"seconds": 0.0, "denoiser_seconds": 0.0, "autoencoder_seconds": 0.0, "calls": 0, "peak_mib": None}
    denoiser, vae = getattr(pipe, "denoiser", None), getattr(pipe, "vae", None)
    parts = [("denoiser", denoiser)] if denoiser is not None else []
    if vae is not None:
        parts += [("autoencoder", vae.encoder), ("autoencoder", vae.decoder)]
    started, hooks = [], []

    def enter(*_):
        synchronize()
        started.append(time.perf_counter())

    def leave(name, *_):
        synchronize()
        figures[f"{name}_seconds"] += time.perf_counter() - started.pop()
        figures["calls"] += name == "denoiser"

    for name, module in parts:
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(partial(leave, name))]
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    has_peak = reset_peak_memory(device)
    synchronize()
    start = time.perf_counter()
    try:
        yield figures
    finally:
        synchronize()
        figures["seconds"] = time.perf_counter() - start
        figures["peak_mib"] = peak_memory(device) if has_peak else None
        for hook in hooks:
            hook.remove()


def reset_peak_memory(device: torch.device) -> bool:
    """Start counting anew, if the device or the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> float:
    """MiB at most since the reset: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**10
