"""Prefill with a choice in PyTorch, on a CUDA device alone: against the plain form, and memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Q, S, TileSpec
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.prefill import listed
from lychee_compile.kernels.gpu.prefill.listed import ListedPrefill, listed_config
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import prefill_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POLICIES = ("streaming", "dhsa", "s2o", "compact")
SHAPES = [("bfloat16", 32, 8, 128, 128, 4096), ("float16", 6, 2, 80, 64, 3001)]
"""Dtype, query and KV heads, sizes of a key and a value, tokens."""


class Problem:
    """Causal self-attention over random tokens, of which some matter more than others."""

    def __init__(self, policy, dtype, heads, kv_heads, head_dim, value_dim, tokens):
        generator = torch.Generator("cuda").manual_seed(0)
        scale, tiles = 1 / math.sqrt(head_dim), TileSpec(policy, sinks=16, recent=64)
        form = dtype, heads // kv_heads, head_dim, value_dim
        spec = AttentionSpec(*form, scale * S, KV <= Q, tiles=tiles)
        self.module = module_cache.load(module_cache.store(emit_module(spec), spec.name).stem)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(getattr(torch, dtype))

        key = randn(1, kv_heads, tokens, head_dim)
        key *= 3 * torch.rand(tokens, 1, generator=generator, device="cuda").to(key.dtype)
        query, value = randn(1, heads, tokens, head_dim) + 1, randn(1, kv_heads, tokens, value_dim)
        self.tensors, self.scale = (query, key, value), scale

    def prefill(self, budget):
        config = listed_config(self.module, budget)
        return ListedPrefill(self.module, AttentionOperands(*self.tensors), config)

    def dense(self, dtype):
        operands = (each.to(dtype) for each in self.tensors)
        return F.scaled_dot_product_attention(
            *operands, is_causal=True, scale=self.scale, enable_gqa=True
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_everything_read_is_as_good_as_scaled_dot_product_attention(policy, shape):
    problem = Problem(policy, *shape)
    output, _ = problem.prefill(1e9).run()
    truth, usual = problem.dense(torch.float64), problem.dense(output.dtype)
    error, allowed = ((each - truth).abs().max() for each in (output, usual))
    assert error <= allowed + 4 * torch.finfo(output.dtype).eps * truth.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_give_what_the_plain_form_gives(policy, shape):
    problem = Problem(policy, *shape)
    operands = Operands(*problem.tensors, None, problem.scale)
    config = listed_config(problem.module, 0.2)
    expected = prefill_attention(operands, config, causal=True)
    output, log_sums = problem.prefill(0.2).run()
    off = (output - expected.output).float().norm() / expected.output.float().norm()
    assert off < 0.02
    assert (log_sums - expected.log_sum).abs().mean() < 1e-2


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_bounded(policy, monkeypatch):
    """A choice takes less memory if less is allowed, and gives the same."""
    problem = Problem(policy, *SHAPES[0])
    expected, _ = problem.prefill(0.2).run()
    peaks = []
    for allowed in (2**31, 2**26):
        monkeypatch.setattr(listed, "CHOICE_BYTES", allowed)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, _ = problem.prefill(0.2).run()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    assert peaks[1] < peaks[0] <= 2 * 2**31
