"""Generated kernels for one decode attention whose causal mask has a tensor as its offset."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import sympy
import torch
from torch import Tensor

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Captured, Q, S, SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.levels.groups import GroupSettings

LYCHEE_WAYS = ("lychee-flat", "lychee-pages", "lychee-chunks")
"""Ways in which kernels of "lychee" look for tokens: through all sketches, the best pages first, or
the best units, clusters and chunks first."""


def load_module(spec: AttentionSpec) -> ModuleType:
    """Return the module that is generated for `spec`, stored and imported."""
    return module_cache.load(module_cache.store(emit_module(spec), spec.name).stem)


def decode_module(
    query: Tensor, key: Tensor, value: Tensor, sparse: SparseSpec | None
) -> ModuleType:
    """Return the kernels for tensors of these shapes; exact ones if `sparse` is None."""
    offset = sympy.Symbol("offset", integer=True)
    spec = AttentionSpec(
        str(query.dtype).removeprefix("torch."),
        query.shape[1] // key.shape[1],
        query.shape[-1],
        value.shape[-1],
        S / math.sqrt(query.shape[-1]),
        Q + offset >= KV,
        (Captured("offset", "int64", 0),),
        sparse=sparse,
    )
    return load_module(spec)


def sparse_spec(policy: str, budget: int, flat_tokens: int | None = None) -> SparseSpec:
    """Return how kernels of `policy` choose `budget` tokens, other options at their defaults.

    `flat_tokens` None is a default too.
    """
    config = IndexConfig(budget=budget, policy=policy)
    flat = config.flat_tokens if flat_tokens is None else flat_tokens
    return SparseSpec(policy, budget, config.sinks, config.recent, config.overfetch, flat)


def way_spec(way: str, budget: int) -> SparseSpec:
    """Return how "lychee" chooses `budget` tokens in one of `LYCHEE_WAYS`, in any context."""
    return sparse_spec("lychee", budget, 2**30 if way == "lychee-flat" else 0)


def sketch_layout(key: Tensor, way: str | None = None) -> SketchLayout:
    """Return the layout of an index of "lychee" for a cache `key` [B, Hkv, L, D].

    `way` is one of `LYCHEE_WAYS`; None: as sizes decide.
    """
    settings = GroupSettings.of(IndexConfig())
    if way is None:
        return SketchLayout.over(key, settings, IndexConfig().flat_tokens)
    chunks = settings if way == "lychee-chunks" else None
    return replace(SketchLayout.over(key), settings=chunks)


def sketch_module(query: Tensor, key: Tensor, value: Tensor, budget: int) -> ModuleType:
    """Return the kernels of the policy "lychee"."""
    return decode_module(query, key, value, sparse_spec("lychee", budget))


def sketch_step(
    module: ModuleType,
    index: SketchIndex,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    writes: bool = True,
) -> Callable[[], Tensor]:
    """Return a step of decoding over a built index; without `writes` it sketches no key."""
    last = newest_slot(key)
    positions = last[None] if writes else None
    operands = AttentionOperands(query, key, value, [last])
    used = IndexOperands(index.layout, index.parts, positions)
    return lambda: run_lychee(module, operands, used)


def newest_slot(key: Tensor) -> Tensor:
    """Return the slot of the newest token of a full cache, an int64 scalar."""
    return torch.tensor(key.shape[2] - 1, device=key.device)
