"""Generated kernels get through Triton's compiler, which refuses what its interpreter runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_specs import SPECS

pytest.importorskip("triton")

SHARED_MEMORY = 99 * 1024
"""Bytes that a block may use on the GPUs with least of it (compute capability 8.6)."""
OFTEN = ("sparse_slopes_odd_sizes",)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("--hopper", *OFTEN), id="often"),
        *(pytest.param((each,), marks=pytest.mark.thorough, id=each) for each in SPECS),
    ],
)
def test_kernels_compile_without_a_gpu(names, tmp_path):
    """Kernels compile in a process of their own, since this one interprets them."""
    given = {each: value for each, value in os.environ.items() if each != "TRITON_INTERPRET"}
    folders = {"TRITON_CACHE_DIR": str(tmp_path), "LYCHEE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "compiled_kernels.py", *names], cwd=Path(__file__).parents[1] / "helpers",
        capture_output=True, text=True, check=False, env=given | folders,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    assert shared
    assert {each: size for each, size in shared.items() if size > SHARED_MEMORY} == {}
