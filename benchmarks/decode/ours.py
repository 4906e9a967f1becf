"""Our variants as the benchmark calls them, and the bytes that they have to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import sympy
import torch
from torch import Tensor

from benchmarks.decode.problem import Problem
from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Captured, Q, S, SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout, block_size, planes
from lychee_compile.kernels.gpu.quest.index import QuestIndex
from lychee_compile.kernels.gpu.quest.launch import run_quest
from lychee_compile.kernels.gpu.quest.layout import QuestLayout
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.sizes import PAGE

POLICIES = {"lychee-sparse": "lychee", "quest": "quest"}
"""Policies of the sparse variants; "lychee-exact" has none."""


def prepare(
    name: str, query: Tensor, key: Tensor, value: Tensor, budget: int
) -> Callable[[], Tensor]:
    """One decode attention of `query` [B, Hq, 1, D] over `key`, `value` [B, Hkv, L, D], all valid.

    Whatever happens once per cache, as building an index, happens here; what is returned selects
    and attends, may be captured in a CUDA graph, and returns [B, Hq, 1, D]. Raises
    NotImplementedError where there is no such variant for these tensors.
    """
    if name == "lychee-exact":
        return _exact(query, key, value)
    if name == "lychee-sparse":
        return _sparse(query, key, value, budget)
    if name == "quest":
        return _quest(query, key, value, budget)
    raise NotImplementedError(f"{name} has no kernel")


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    module, last = _module(query, key, value, None), _last(key)
    operands = AttentionOperands(query, key, value, [last])
    return lambda: run_exact(module, operands)


def _sparse(query: Tensor, key: Tensor, value: Tensor, budget: int) -> Callable[[], Tensor]:
    """Every call sketches the newest key again, as a step of decoding does."""
    module = sparse_module(query, key, value, budget)
    index = SketchIndex(SketchLayout.of(key), key.device)
    index.build(module, key, [key.shape[2]] * key.shape[0])
    return sparse_step(module, index, query, key, value)


def sparse_module(query: Tensor, key: Tensor, value: Tensor, budget: int) -> ModuleType:
    """The kernels of the policy "lychee"."""
    config = IndexConfig(budget=budget)
    sparse = SparseSpec(
        "lychee", budget, config.sinks, config.recent, config.overfetch, config.flat_tokens
    )
    return _module(query, key, value, sparse)


def sparse_step(
    module: ModuleType,
    index: SketchIndex,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    writes: bool = True,
) -> Callable[[], Tensor]:
    """A step of decoding over an index that is built; without `writes` it sketches no key."""
    last = _last(key)
    positions = last[None] if writes else None
    operands = AttentionOperands(query, key, value, [last])
    used = IndexOperands(index.layout, index.parts, positions)
    return lambda: run_lychee(module, operands, used)


def _quest(query: Tensor, key: Tensor, value: Tensor, budget: int) -> Callable[[], Tensor]:
    """Every call looks whether the newest key completes a page, as a step of decoding does."""
    config = IndexConfig(budget=budget, policy="quest")
    sparse = SparseSpec(
        "quest", budget, config.sinks, config.recent, config.overfetch, config.flat_tokens
    )
    module, last = _module(query, key, value, sparse), _last(key)
    index = QuestIndex(QuestLayout.of(key), key.device)
    index.build(module, key, [key.shape[2]] * key.shape[0])
    operands = AttentionOperands(query, key, value, [last])
    used = IndexOperands(index.layout, index.parts, last[None])
    return lambda: run_quest(module, operands, used)


def _module(query: Tensor, key: Tensor, value: Tensor, sparse: SparseSpec | None) -> ModuleType:
    """The kernels for a causal mask whose offset, the tokens so far, is a tensor."""
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
    return module_cache.load(module_cache.store(emit_module(spec), spec.name).stem)


def _last(key: Tensor) -> Tensor:
    """The slot of the newest token, int64."""
    return torch.tensor(key.shape[2] - 1, device=key.device)


def bytes_read(name: str, problem: Problem, budget: int) -> int:
    """Bytes of the index that a call reads, and of the keys and values it then attends to."""
    if name not in POLICIES or budget >= problem.context:
        return problem.cache_bytes()
    config = IndexConfig(budget=budget, policy=POLICIES[name])
    if name == "lychee-sparse":
        chosen = _sketch_bytes(problem, config)
    else:
        index = make_index(1, 1, problem.head_dim, config, torch.device("cpu"))
        chosen = index.bytes_per_step(problem.context, budget)
    return problem.batch * problem.kv_heads * chosen + problem.cache_bytes(budget)


def _sketch_bytes(problem: Problem, config: IndexConfig) -> int:
    """Axes of all blocks; the sketches of all tokens, or all pages and the tokens of the best."""
    fine, coarse = planes(problem.head_dim)
    kept = sum(field.width for field in fine + coarse)
    axes = -(-problem.context // block_size(problem.context)) * (
        2 * kept * problem.head_dim + 4 * problem.head_dim
    )
    sketch = fine[0].width + coarse[0].width
    if problem.context <= config.flat_tokens:
        return axes + problem.context * sketch
    looked_at = config.overfetch * (config.budget or 0)
    return axes + problem.context // PAGE * fine[0].width + looked_at * sketch
