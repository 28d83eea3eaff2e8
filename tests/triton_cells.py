"""A process of its own for the kernels of search_triton.py. Run by test_search.py; prints a line of JSON.

"compare", with TRITON_INTERPRET=1: cell -> whether the kernels find what the search without them does.
"compile": kernel and compute capability -> bytes of shared memory, as compiled for NVIDIA without a GPU.
"""

import json
import sys

import numpy as np
import torch

from diffusers_compress.coding.channels import search, search_numpy, search_triton

CELLS = {"lone": [14], "short": [3], "a run": [14, 4, 4], "an odd end": [14, 4, 4, 4, 2]}
FOLLOWED = 20  # the interpreter is slow


def runs_of(bits, levels=None):
    """Scores of two pictures, in runs as they come; with few levels many totals are equal."""
    shape = 2, len(bits), 2**search.CODEBOOK_BITS
    scores = torch.randint(levels, shape).float() if levels else torch.randn(shape)
    return [run for run in scores.split([1, min(2, len(bits) - 1), max(0, len(bits) - 3)], 1) if run.shape[1]]


def compare():
    search_triton.TILE = 128  # so that there are several
    found = {}
    for name, bits in CELLS.items():
        runs = runs_of(bits)
        found[name, "viterbi"] = np.array_equal(*(search.viterbi(bits, runs, way.follow) for way in (search, search_triton)))
        bits = [min(6, bits[0]), *bits[1:]]
        same = (search.m_algorithm(bits, runs, FOLLOWED, way.survivors) for way in (search_numpy, search_triton))
        found[name, "m_algorithm"] = np.array_equal(*same)
        tied = runs_of(bits, levels=3)
        totals = [way.survivors(bits, tied, FOLLOWED)[0].sort().values for way in (search_numpy, search_triton)]
        found[name, "ties"] = torch.equal(*totals)
    search_triton.TILE = 2**17  # quick
    ours, kernels = ((search.follow, search_numpy.survivors), (search_triton.follow, search_triton.survivors))
    found["at first use"] = search.compare(ours, kernels, "cpu") is None
    return {str(name): bool(equal) for name, equal in found.items()}


def compiled():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    scores, integers = "*fp32", "*i32"
    viterbi = {"scores": scores, "total": scores, "came_from": "*i16", "stride": "i32", "segments": "i32", "WIDTH": "constexpr"}
    pointers = {
        "scores": scores,
        "widths": integers,
        "totals": scores,
        "states": integers,
        "places": integers,
        "chosen": integers,
    }
    numbers = dict.fromkeys(("start", "segments", "count", "followed", "other"), "i32")
    kernels = [
        (search_triton.viterbi_kernel, viterbi, {"WIDTH": 4}),
        (search_triton.m_algorithm_kernel, {**pointers, **numbers, "TILE": "constexpr"}, {"TILE": search_triton.TILE}),
    ]
    options = {"num_warps": search_triton.WARPS, "num_stages": 1}
    found = {}
    for kernel, signature, constants in kernels:
        for capability in (80, 90):
            source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32)
            found[f"{kernel.__name__}, {capability}"] = compile(source, target=target, options=options).metadata.shared
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(compare() if "compare" in sys.argv else compiled()))
