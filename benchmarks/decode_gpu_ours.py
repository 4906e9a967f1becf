"""Our variants as the benchmark calls them, and the bytes that they have to read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from decode_gpu_problem import Problem
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies import make_index

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
    raise NotImplementedError(f"{name} has no kernel yet")


def bytes_read(name: str, problem: Problem, budget: int) -> int:
    """Bytes of the index that a call reads, and of the keys and values it then attends to."""
    if name not in POLICIES or budget >= problem.context:
        return problem.cache_bytes()
    config = IndexConfig(budget=budget, policy=POLICIES[name])
    index = make_index(1, 1, problem.head_dim, config, torch.device("cpu"))
    chosen = index.bytes_per_step(problem.context, budget)
    return problem.batch * problem.kv_heads * chosen + problem.cache_bytes(budget)
