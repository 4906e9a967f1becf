"""Our own variants: calls of the generated kernels, and the bytes that they have to read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.decode_kernels import (
    decode_module,
    newest_slot,
    sketch_layout,
    sketch_module,
    sketch_step,
    sparse_spec,
)
from benchmarks.common.problem import Problem
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import block_size, plane_bytes, planes
from lychee_compile.kernels.gpu.methods import gpu_method, policies_with_kernels
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.sizes import PAGE

OTHERS = tuple(policy for policy in policies_with_kernels() if policy != "lychee")
"""Policies with kernels besides our own; each is a variant under its own name."""
SKETCHED = {"lychee-sparse": None, "lychee-pages": "lychee-pages", "lychee-chunks": "lychee-chunks"}
"""Variants of "lychee", and the way in which each looks for tokens; None: as sizes decide."""
POLICIES = dict.fromkeys(SKETCHED, "lychee") | {policy: policy for policy in OTHERS}
"""Policy of each sparse variant; "lychee-exact" has none."""


def prepare(
    name: str, query: Tensor, key: Tensor, value: Tensor, budget: int
) -> Callable[[], Tensor]:
    """Return a decode attention of `query` [B, Hq, 1, D] over `key`, `value` [B, Hkv, L, D].

    All keys are valid. This function does whatever happens once per cache, as building an index.
    The returned call selects, attends and returns [B, Hq, 1, D]; a CUDA graph may capture it. Raise
    NotImplementedError if there is no such variant for these tensors.
    """
    if name == "lychee-exact":
        return _exact(query, key, value)
    if name in SKETCHED:
        return _sketch(query, key, value, budget, SKETCHED[name])
    if name in OTHERS:
        return _policy(name, query, key, value, budget)
    raise NotImplementedError(f"{name} has no kernel")


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    module, last = decode_module(query, key, value, None), newest_slot(key)
    operands = AttentionOperands(query, key, value, [last])
    return lambda: run_exact(module, operands)


def _sketch(
    query: Tensor, key: Tensor, value: Tensor, budget: int, way: str | None
) -> Callable[[], Tensor]:
    """Return a call of "lychee" that sketches the newest key again, as a decoding step does."""
    module = sketch_module(query, key, value, budget)
    index = SketchIndex(sketch_layout(key, way), key.device)
    index.build(module, key, [key.shape[2]] * key.shape[0])
    return sketch_step(module, index, query, key, value)


def _policy(
    policy: str, query: Tensor, key: Tensor, value: Tensor, budget: int
) -> Callable[[], Tensor]:
    """Return a call of a policy that follows the newest key again, as a decoding step does."""
    module = decode_module(query, key, value, sparse_spec(policy, budget))
    last, method = newest_slot(key), gpu_method(policy)
    index = method.new_index(method.layout_of(key), key.device)
    index.build(module, key, [key.shape[2]] * key.shape[0])
    operands = AttentionOperands(query, key, value, [last])
    used = IndexOperands(index.layout, index.parts, last[None])
    return lambda: method.run(module, operands, used)


def bytes_read(name: str, problem: Problem, budget: int) -> int:
    """Return the bytes of index, keys and values that one call of the variant `name` reads."""
    if name not in POLICIES or budget >= problem.context:
        return problem.cache_bytes()
    config = IndexConfig(budget=budget, policy=POLICIES[name])
    if name in ("lychee-sparse", "lychee-pages"):
        chosen = _sketch_bytes(problem, config)
    else:
        index = make_index(1, 1, problem.head_dim, config, torch.device("cpu"))
        chosen = index.bytes_per_step(problem.context, budget)
    return problem.batch * problem.kv_heads * chosen + problem.cache_bytes(budget)


def _sketch_bytes(problem: Problem, config: IndexConfig) -> int:
    """Return the bytes of all axes, and of the sketches of all tokens or of pages and the best."""
    fine, coarse = planes(problem.head_dim)
    kept = sum(field.width for field in fine + coarse)
    axes = -(-problem.context // block_size(problem.context)) * (
        2 * kept * problem.head_dim + 4 * problem.head_dim
    )
    sketch = plane_bytes(fine) + plane_bytes(coarse)
    if problem.context <= config.flat_tokens:
        return axes + problem.context * sketch
    looked_at = config.overfetch * (config.budget or 0)
    return axes + problem.context // PAGE * plane_bytes(fine) + looked_at * sketch
