"""All that wants a GPU, on one page.

    python benchmarks/gpu.py --all                        # on a GPU; on a CPU the same in small, to see that it works
    python benchmarks/gpu.py --only exchange offloading

Each section is a process of its own, and one that fails or takes too long is told on the page and ends no other. Random weights of
Stable Diffusion 1.5's shape stand for a model: sizes, times and agreement of decoders mean something, pictures do not.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
SECONDS = 400  # of a section at most


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["--"] * len(head), *rows))


def output(*command):
    """What a command of this repository prints."""
    result = subprocess.run([sys.executable, *map(str, command)], check=False, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or result.stdout.strip()).splitlines()[-1])
    return result.stdout.strip()


# --------------------------------------------------------------------------------------------------------------------- sections


def tests(small):
    """Those with the mark; without a GPU they say that they are skipped."""
    files = [f"tests/test_{name}.py" for name in ("trellis", "randomness", "fingerprint")]
    return output("-m", "pytest", "-q", "-n0", "-m", "gpu", *files).splitlines()[-1]


def shape(small):
    """Seconds by part and memory: small and large batches, compiled, and a large picture in tiles."""
    if small:
        sizes = "--size", 64, 64, "--steps", 2, "--decoding-steps", 2, "--bpp", 0.2
        runs = [(*sizes, "--batch", 1, 2)]
    else:
        runs = [
            ("--channels-last", "--bpp", 0.05, "--steps", 12, "--batch", 1, 8, 32),
            ("--channels-last", "--bpp", 0.05, "--steps", 12, "--batch", 1, "--channels", "trellis"),
            ("--channels-last", "--compile", "--bpp", 0.05, "--steps", 12, "--batch", 1),
            ("--channels-last", "--size", 2048, 2048, "--tiling", "--bpp", 0.03, "--steps", 12, "--batch", 1),
        ]
    told = [
        f"`python benchmarks/sd15_shape.py {' '.join(map(str, run))}`\n\n{output('benchmarks/sd15_shape.py', *run)}"
        for run in runs
    ]
    return "\n\n".join(told)


def launches(small):
    """As `tests/test_simulated_device.py` counts them, and the kernels that a GPU's profiler saw."""
    counts = json.loads(output("tests/device_cells.py", "counts").splitlines()[-1])
    rows = [[part, f"{kernels:g}", f"{copies:g}"] for part, (kernels, copies) in counts.items()]
    text = table(["a coded step of DiffC, 256x256, 400 bits, without the network", "launches", "copies"], rows)
    return text if small else f"{text}\n\n{profiled()}"


def profiled():
    """Kernels of a DiffC round trip with the embedded model, the network's among them."""
    import torch
    from golden import make
    from torch.profiler import ProfilerActivity, profile

    pipe, picture = make.pipeline("diffc", "embedded").to("cuda"), make.picture(256, 256)
    sent = pipe.compress(picture, max_bytes=620, num_coding_steps=12).bitstreams
    rows = []
    for name, call in {
        "compress, 12 steps": lambda: pipe.compress(picture, max_bytes=620, num_coding_steps=12),
        "decompress, 12 + 10 steps": lambda: pipe.decompress(sent, num_inference_steps=10),
    }.items():
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            call()
        events = found.events()
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        copies = sum("Memcpy" in event.name for event in kernels)
        rows.append([name, len(kernels) - copies, copies])
    return table(["embedded model, 256x256, profiler", "kernels", "copies"], rows)


def exchange(small):
    """Files between the CPU in float32 and the GPU in float16: every codec with its embedded model, and DiffC at Stable Diffusion's shape."""
    import numpy as np
    import robustness
    import torch
    from sd15_shape import pictures, random_model

    ends = ["float32", "float16"] if small else ["float32", "float16 cuda"]
    every = table(["codec", "made in", *(f"decoded in {end}" for end in ends)], robustness.exchange_rows(ends))
    side = 64 if small else 256
    (picture,), pipes = pictures(argparse.Namespace(photo=None, size=(side, side)), 1), {}
    for end in ends:
        dtype, _, device = end.partition(" ")
        pipes[end] = random_model(4 if small else 1, "cpu").to(device or "cpu", getattr(torch, dtype))
        pipes[end].set_progress_bar_config(disable=True)
    rows = []
    for sender in ends:
        sent = pipes[sender].compress(picture, max_bytes=2100 if not small else 100, num_coding_steps=4).bitstreams
        found = {end: pipes[end].decompress(sent, num_inference_steps=4) for end in ends}
        images = {end: np.asarray(out.images[0], dtype=float) for end, out in found.items()}
        drift = [str(out.drift[0]) for out in found.values()]
        rows.append([sender, *(f"{robustness.psnr(images[sender], image):.1f}" for image in images.values()), *drift])
    head = ["made in", *(f"decoded in {end}, dB" for end in ends), *(f"drift, {end}" for end in ends)]
    return f"{every}\n\nStable Diffusion 1.5's shape, {side}x{side}:\n\n{table(head, rows)}"


def offloading(small):
    """A model that lies in the CPU's memory, group by group on the device: seconds, memory of the device, and whether the file is the same."""
    import torch
    from sd15_shape import pictures, random_model

    device, side = torch.device("cpu" if small else "cuda"), 64 if small else 512
    (picture,) = pictures(argparse.Namespace(photo=None, size=(side, side)), 1)
    ways = {
        "all on the device": lambda pipe: pipe.to(device),
        "model offloading": lambda pipe: pipe.enable_model_cpu_offload(device=device),
        "group offloading, by leaves": lambda pipe: pipe.enable_group_offload(device, offload_type="leaf_level"),
        "the same, with a stream": lambda pipe: pipe.enable_group_offload(
            device, offload_type="leaf_level", use_stream=not small
        ),
    }
    rows, expected = [], None
    for name, place in ways.items():
        pipe = random_model(4 if small else 1, "cpu").to(torch.float32 if small else torch.float16)
        pipe.set_progress_bar_config(disable=True)
        place(pipe)
        times = []
        for _ in range(2):  # the first is a warm-up
            if not small:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            sent = pipe.compress(picture, max_bytes=60 if small else 1000, num_coding_steps=2 if small else 6).bitstreams
            pipe.decompress(sent, num_inference_steps=2 if small else 10)
            times.append(time.perf_counter() - start)
        expected = expected or sent
        peak = "" if small else f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
        rows.append([name, f"{times[-1]:.2f}", peak, "yes" if sent == expected else "NO"])
        del pipe
    return table([f"round trip, {side}x{side}", "seconds", "peak GiB of the device", "same file"], rows)


SECTIONS = {"tests": tests, "shape": shape, "launches": launches, "exchange": exchange, "offloading": offloading}


# ------------------------------------------------------------------------------------------------------------------- the page


def conditions():
    import diffusers
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: everything in small, on the CPU"
    return f"GPU: {device}. torch {torch.__version__}, CUDA {torch.version.cuda}, diffusers {diffusers.__version__}."


def told(name):
    """The section as text, and whether it went well."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--part", name]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
        good = result.returncode == 0
        text = result.stdout.strip() if good else f"FAILED: {(result.stderr.strip() or 'no word').splitlines()[-1]}"
    except subprocess.TimeoutExpired:
        good, text = False, f"FAILED: took more than {SECONDS} s"
    return f"## {name}\n\n{text}\n\n{time.perf_counter() - start:.0f} s for this section.\n", good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true")
    which.add_argument("--only", nargs="+", choices=list(SECTIONS))
    which.add_argument("--part", choices=list(SECTIONS), help="this one in this process, printed")
    parser.add_argument("--out", type=Path, help="the page; default: stdout")
    args = parser.parse_args()
    if args.part:
        import torch

        print(SECTIONS[args.part](small=not torch.cuda.is_available()))
        return
    page, all_good = f"# On a GPU\n\n`python benchmarks/gpu.py --all`. {conditions()}\n", True
    for name in args.only or SECTIONS:
        text, good = told(name)
        print(text, file=sys.stderr, flush=True)
        page, all_good = f"{page}\n{text}", all_good and good
        if args.out:
            args.out.write_text(page, encoding="utf-8")
    if not args.out:
        print(page)
    sys.exit(not all_good)


if __name__ == "__main__":
    main()
