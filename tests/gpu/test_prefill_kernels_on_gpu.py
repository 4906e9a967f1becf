"""Compiled kernels for prefill, at the shapes models have: on a CUDA device alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from prefill_problems import prefill_config

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Q, S, TileSpec
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, run_prefill
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import prefill_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [
    ("bfloat16", 32, 8, 128, 128, 4096),
    ("float16", 6, 2, 80, 64, 3001),
    ("bfloat16", 4, 1, 256, 256, 2048),
    ("float32", 4, 4, 64, 64, 1500),
]
"""Dtype, query and KV heads, sizes of a key and a value, tokens."""


class Problem:
    """Causal self-attention over random tokens, of which some matter more than others."""

    def __init__(self, dtype, heads, kv_heads, head_dim, value_dim, tokens, seed=0):
        self.generator = torch.Generator("cuda").manual_seed(seed)
        group, self.scale = heads // kv_heads, 1 / math.sqrt(head_dim)
        tiles = TileSpec("lychee", sinks=16, recent=64)
        spec = AttentionSpec(
            dtype, group, head_dim, value_dim, self.scale * S, KV <= Q, tiles=tiles
        )
        self.module = module_cache.load(module_cache.store(emit_module(spec), spec.name).stem)
        self.dtype = getattr(torch, dtype)
        self.query = self.randn(1, heads, tokens, head_dim) + 1
        self.key = self.randn(1, kv_heads, tokens, head_dim)
        self.key *= 3 * torch.rand(tokens, 1, generator=self.generator, device="cuda").to(
            self.dtype
        )
        self.value = self.randn(1, kv_heads, tokens, value_dim)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, device="cuda").to(self.dtype)

    def sparse(self, budget):
        operands = AttentionOperands(self.query, self.key, self.value)
        return run_prefill(self.module, operands, PrefillBudget(budget))

    def log_sums(self):
        """Return the logarithm of the summed exponentials of each query's scores, in float64."""
        query, key = self.query.double(), self.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        score = self.scale * query @ key.mT
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
        return score.masked_fill(hidden, -torch.inf).logsumexp(-1)

    def dense(self, dtype):
        operands = (each.to(dtype) for each in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(
            *operands, is_causal=True, scale=self.scale, enable_gqa=True
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_read_is_as_good_as_scaled_dot_product_attention(shape):
    problem = Problem(*shape)
    output, _ = problem.sparse(1e9)
    truth, usual = problem.dense(torch.float64), problem.dense(problem.dtype)
    error, allowed = ((each - truth).abs().max() for each in (output, usual))
    assert error <= allowed + 4 * torch.finfo(output.dtype).eps * truth.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_chosen_is_as_good_as_what_the_specification_chooses(shape):
    problem = Problem(*shape)
    truth = problem.dense(torch.float64)
    operands = Operands(problem.query, problem.key, problem.value, None, problem.scale)
    config = prefill_config(budget=0.2)
    specified = prefill_attention(operands, config, causal=True)
    output, log_sums = problem.sparse(0.2)
    error, expected = ((each - truth).norm() / truth.norm() for each in (output, specified.output))
    assert error <= 1.03 * expected + 0.01
    most = problem.log_sums()
    estimated, usual = ((each - most).exp().mean() for each in (log_sums, specified.log_sum))
    assert abs(estimated - usual) <= 0.02


def test_one_graph_serves_other_contents():
    problem, other = Problem(*SHAPES[0]), Problem(*SHAPES[0], seed=1)
    problem.sparse(0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = problem.sparse(0.3)
    for name in ("query", "key", "value"):
        getattr(problem, name).copy_(getattr(other, name))
    graph.replay()
    torch.testing.assert_close(output, other.sparse(0.3)[0])
