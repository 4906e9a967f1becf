"""Time of one decode attention over caches that hold something else than bfloat16 keys and values.

    python -m benchmarks.stored_keys [--contexts 32k 128k] [--batch 1] [--budget 1024]
        [--forms bfloat16 int8 ...] [--seconds 0.2]

Each form is read exactly, and sparsely by the policy "lychee". Keys and values are dequantised, and
rotated or gathered from pages, by the kernels. The shape is that of Llama-3.1-8B. A CUDA graph
holds several calls, which rotate through two caches. `--device cpu` tries the benchmark out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from benchmarks.common.decode_kernels import load_module, newest_slot, sketch_layout, sparse_spec
from benchmarks.common.lengths import length_name, tokens
from benchmarks.common.terminal import make_console
from benchmarks.common.timing import time_calls
from lychee_compile.codegen.specification import (
    KV,
    AttentionSpec,
    B,
    Captured,
    D,
    H,
    LoadSpec,
    Q,
    S,
    Stored,
)
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.loads import Load

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16


@dataclass(frozen=True)
class Form:
    """A way to store keys or values."""

    text: str
    """Expression as `kernels.reference.loads` evaluates it."""
    element: Callable[..., sympy.Expr]
    """The same of the elements of the tensors."""
    make: Callable[[int, int, torch.device], list[Tensor]]
    """Makes the tensors for a batch, a context and a device."""


def _bytes(batch: int, context: int, device: torch.device) -> Tensor:
    shape = batch, KV_HEADS, context, HEAD_DIM
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _scale(batch: int, context: int, device: torch.device) -> Tensor:
    return 0.01 + 0.005 * torch.rand(batch, KV_HEADS, context, 1, device=device)


def _int8(batch: int, context: int, device: torch.device) -> list[Tensor]:
    return [_bytes(batch, context, device), _scale(batch, context, device)]


def _float8(batch: int, context: int, device: torch.device) -> list[Tensor]:
    return [(_bytes(batch, context, device) / 64).to(torch.float8_e4m3fn)]


def _rotated(batch: int, context: int, device: torch.device) -> list[Tensor]:
    rate = 10_000 ** (torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angle = torch.arange(context, device=device)[:, None] / rate
    tables = [each.to(torch.bfloat16) for each in (angle.cos(), angle.sin())]
    return [*_int8(batch, context, device), *tables]


def _rotation(
    cache: sympy.IndexedBase, scale: sympy.IndexedBase, *tables: sympy.IndexedBase
) -> sympy.Expr:
    half, (cos, sin) = HEAD_DIM // 2, tables

    def number(channel: sympy.Expr) -> sympy.Expr:
        return cache[B, H, KV, channel] * scale[B, H, KV, 0]

    low = number(D) * cos[KV, D] - number(D + half) * sin[KV, D]
    high = number(D) * cos[KV, D - half] + number(D - half) * sin[KV, D - half]
    return sympy.Piecewise((low, sympy.Lt(D, half)), (high, True))


def _pages(batch: int, context: int, device: torch.device) -> list[Tensor]:
    count = -(-context // PAGE)
    table = torch.randperm(batch * count, device=device).view(batch, count).to(torch.int32)
    shape = batch * count, PAGE, KV_HEADS, HEAD_DIM
    cache = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    return [table, cache, 0.01 + 0.005 * torch.rand(*shape[:3], 1, device=device)]


def _paged(
    table: sympy.IndexedBase, cache: sympy.IndexedBase, scale: sympy.IndexedBase
) -> sympy.Expr:
    page = sympy.Mod(table[B, sympy.floor(KV / PAGE)], 2**30), sympy.Mod(KV, PAGE), H
    return cache[(*page, D)] * scale[(*page, 0)]


_SCALED = "at(0, b, h, kv, d)*at(1, b, h, kv, 0)"
_PARTNER = f"at(0, b, h, kv, (d + {HEAD_DIM // 2})%{HEAD_DIM})*at(1, b, h, kv, 0)"
_ANGLE = f"kv, d%{HEAD_DIM // 2}"
_PAGED = f"entry(0, b, kv//{PAGE}), kv%{PAGE}, h"
FORMS = {
    "int8": Form(_SCALED, lambda cache, scale: cache[B, H, KV, D] * scale[B, H, KV, 0], _int8),
    "float8": Form("at(0, b, h, kv, d)", lambda cache: cache[B, H, KV, D], _float8),
    "rotated": Form(
        f"{_SCALED}*at(2, {_ANGLE}) + where(d < {HEAD_DIM // 2}, -1, 1)*{_PARTNER}*at(3, {_ANGLE})",
        _rotation,
        _rotated,
    ),
    "pages": Form(f"at(1, {_PAGED}, d)*at(2, {_PAGED}, 0)", _paged, _pages),
}
"""Keys by name. Values are int8 if keys are, or float8."""


def _load(form: Form, tensors: Sequence[Tensor], prefix: str) -> LoadSpec:
    stored, bases = [], []
    for number, tensor in enumerate(tensors):
        name, dtype = f"{prefix}_{number}", str(tensor.dtype).removeprefix("torch.")
        stored.append(Stored(name, dtype, tuple(tensor.shape)))
        kind = {"integer": True} if "int" in dtype else {}
        bases.append(sympy.IndexedBase(sympy.Symbol(name, **kind)))
    return LoadSpec(form.element(*bases), tuple(stored))


def _calls(
    name: str, batch: int, context: int, budget: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Return an exact and a sparse call over a new cache of a form."""
    dtype, shape = torch.bfloat16, (batch, KV_HEADS, context, HEAD_DIM)
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=dtype, device=device)
    spec = AttentionSpec(
        "bfloat16", HEADS // KV_HEADS, HEAD_DIM, HEAD_DIM, S / math.sqrt(HEAD_DIM),
        Q + sympy.Symbol("offset", integer=True) >= KV, (Captured("offset", "int64", 0),),
    )  # fmt: skip
    if name == "bfloat16":
        key, value = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        shown, parts = key, {}
    else:
        form, of_values = FORMS[name], FORMS["float8" if name == "float8" else "int8"]
        of_values = FORMS["pages"] if name == "pages" else of_values
        keys, values = (each.make(batch, context, device) for each in (form, of_values))
        spec = replace(
            spec, keys=_load(form, keys, "key"), values=_load(of_values, values, "value")
        )
        shown = LoadedTensor.of(Load(form.text, dtype, tuple(keys), shape))
        key = value = query.as_strided(shape, (0, 0, 0, 0))
        parts = {"key_parts": keys, "value_parts": values}
    last = newest_slot(key)
    operands = AttentionOperands(query, key, value, [last], **parts)
    exact, sparse = (
        load_module(spec),
        load_module(replace(spec, sparse=sparse_spec("lychee", budget))),
    )
    index = SketchIndex(sketch_layout(key), device)
    index.build(sparse, shown, [context] * batch)
    used = IndexOperands(index.layout, index.parts, last[None])
    return {
        "exact": lambda: run_exact(exact, operands),
        "sparse": lambda: run_lychee(sparse, operands, used),
    }


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=tokens, nargs="+", default=[32768, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--forms", nargs="+", default=["bfloat16", *FORMS])
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    device, console = torch.device(chosen.device), make_console()
    for context in chosen.contexts:
        for name in chosen.forms:
            sizes = chosen.batch, context, chosen.budget
            buffers = [_calls(name, *sizes, device) for _ in range(2)]
            for way in ("exact", "sparse"):
                timing, output = time_calls([each[way] for each in buffers], device, chosen.seconds)
                assert bool(output.isfinite().all())
                console.print(
                    f"{length_name(context):>6} batch {chosen.batch} {name:>9} {way:>7}"
                    f" {timing.microseconds:9.1f} us"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
