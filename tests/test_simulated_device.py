"""Every codec, family and coder on a device that refuses what a GPU refuses, and what a coded step costs there."""

import importlib.util
import json
from pathlib import Path

import pytest

CELLS = Path(__file__).parent / "device_cells.py"


def said(python, *arguments):
    return json.loads(python.run([CELLS, *arguments], check=True, text=True).stdout.splitlines()[-1])


def test_files_and_pictures_are_those_of_the_cpu(python):
    cells = said(python, "equal")
    assert len(cells) == 32 and [name for name, equal in cells.items() if not equal] == []


@pytest.mark.parametrize("search, compress", [([], [185, 8]), (["kernels"], [420, 8])], ids=["on the CPU", "kernels"])
def test_a_coded_step_costs_no_more_than_this(python, search, compress):
    """[launches, copies] of DiffC's default coder at 256x256 and 400 bits a step, without the network's; 500 and 8 are too many."""
    if search and not importlib.util.find_spec("triton"):
        pytest.skip("Triton comes with PyTorch for CUDA only")
    bounds = {
        "compress": compress,
        "compress, further picture": [20, 0],
        "decompress": [150, 4],
        "decompress, further picture": [20, 0],
        "fingerprint": [20, 1],
    }
    counts = said(python, "counts", *search)
    assert counts.keys() == bounds.keys()
    for part, found in counts.items():
        assert all(value <= bound for value, bound in zip(found, bounds[part], strict=True)), (part, found)
