"""The kernels for a GPU, without one: Triton's interpreter runs them on the CPU, and its compiler needs no device."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton comes with PyTorch for CUDA only")
CELLS = Path(__file__).parent / "triton_cells.py"


def said(what, **environment):
    """Triton must find its environment when it is first imported: no forked process will do."""
    environment = {**os.environ, "PYTHONPATH": str(CELLS.parents[1]), **environment}
    result = subprocess.run([sys.executable, CELLS, what], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def test_kernels_find_the_messages_of_a_search_without_them():
    cells = said("compare", TRITON_INTERPRET="1")
    assert len(cells) == 13 and [cell for cell, equal in cells.items() if not equal] == []


def test_kernels_compile_and_need_little_shared_memory(tmp_path):
    """For A100 and H100. 48 KiB is what every NVIDIA GPU gives a block."""
    shared = said("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert len(shared) == 4 and max(shared.values()) <= 48 * 2**10
