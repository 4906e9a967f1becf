r"""Runs of every kernel on little data, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized_kernels
    compute-sanitizer --tool racecheck --kernel-name-exclude kns=reduce_kernel \
        python -m benchmarks.sanitized_kernels

PyTorch's own reductions share memory within a warp without a barrier, which racecheck reports.
Therefore the second command leaves them out.
"""

from __future__ import annotations

import argparse

import sympy
import torch

from benchmarks.common.decode_kernels import load_module
from lychee_compile.codegen.specification import (
    KV,
    AttentionSpec,
    Captured,
    Q,
    S,
    SparseSpec,
    TileSpec,
)
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, run_prefill


def main() -> None:
    """Run the kernels of decoding and of prefill."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    decode()
    prefill()


def decode() -> None:
    """Decode with tokens scanned flat and by pages, exact and sparse, across a block's start."""
    last = torch.zeros((), dtype=torch.int64, device="cuda")
    causal = Q + sympy.Symbol("last", integer=True) >= KV
    captured = (Captured("last", "int64", 0),)
    for head_dim, group, flat_tokens in ((128, 4, 65536), (80, 3, 0)):
        sparse = SparseSpec("lychee", 256, 16, 64, 2, flat_tokens)
        spec = AttentionSpec(
            "bfloat16", group, head_dim, head_dim, S / 8, causal, captured, sparse=sparse
        )
        module = load_module(spec)
        slots, length = 9000, 8190
        key, value = (
            torch.randn(1, 2, slots, head_dim, dtype=torch.bfloat16, device="cuda")
            for _ in range(2)
        )
        query = torch.randn(1, 2 * group, 1, head_dim, dtype=torch.bfloat16, device="cuda")
        index = SketchIndex(SketchLayout.over(key), key.device)
        for step in range(length, length + 4):  # into a new block
            last.fill_(step)
            written = last[None].clone()
            operands = AttentionOperands(query, key, value, [last])
            run_exact(module, operands)
            run_lychee(module, operands, IndexOperands(index.layout, index.parts, written))
            if step == length:
                index.build(module, key, [length + 1])
        torch.cuda.synchronize()
        print("ran", spec.name)


def prefill() -> None:
    """Prefill sequences whose length fills no tile."""
    for head_dim, group in ((128, 4), (80, 3)):
        tiles = TileSpec("lychee", 16, 64)
        spec = AttentionSpec("bfloat16", group, head_dim, head_dim, S / 8, KV <= Q, tiles=tiles)
        module = load_module(spec)
        query, key, value = (
            torch.randn(1, heads, 2001, head_dim, dtype=torch.bfloat16, device="cuda")
            for heads in (2 * group, 2, 2)
        )
        run_prefill(module, AttentionOperands(query, key, value), PrefillBudget(0.2))
        torch.cuda.synchronize()
        print("ran", spec.name)


if __name__ == "__main__":
    main()
