"""Prefill of policies other than "lychee", on a CUDA device alone: against the plain form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Q, S, TileSpec
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.prefill import launch, listed, ranked
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget
from lychee_compile.kernels.gpu.prefill.listed import ListedPrefill, listed_config
from lychee_compile.kernels.gpu.prefill.ranked import run_by_kernels
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import prefill_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POLICIES = ("streaming", "dhsa", "s2o", "compact")
SHAPES = [("bfloat16", 32, 8, 128, 128, 4096), ("float16", 6, 2, 80, 64, 3001)]
"""Dtype, query and KV heads, sizes of a key and a value, tokens."""


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """Register every policy under another name, as a function of which nothing is known."""
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    for name in POLICIES:
        choice = registry.prefill_choice(name)
        registry.register_policy(f"any {name}", None, tiles=lambda each, by=choice: by(each))


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

    def run(self, budget):
        """Return the output and log-sum-exps, by kernels that choose or by a choice in PyTorch."""
        operands = AttentionOperands(*self.tensors)
        if hasattr(self.module, "see_tiles"):
            return ListedPrefill(self.module, operands, listed_config(self.module, budget)).run()
        return run_by_kernels(self.module, operands, PrefillBudget(budget))

    def plain(self, budget):
        operands = Operands(*self.tensors, None, self.scale)
        return prefill_attention(operands, listed_config(self.module, budget), causal=True)

    def dense(self, dtype):
        operands = (each.to(dtype) for each in self.tensors)
        return F.scaled_dot_product_attention(
            *operands, is_causal=True, scale=self.scale, enable_gqa=True
        )


BOTH = [*POLICIES, *(f"any {name}" for name in POLICIES)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", BOTH)
def test_everything_read_is_as_good_as_scaled_dot_product_attention(policy, shape):
    problem = Problem(policy, *shape)
    output, _ = problem.run(1e9)
    truth, usual = problem.dense(torch.float64), problem.dense(output.dtype)
    error, allowed = ((each - truth).abs().max() for each in (output, usual))
    assert error <= allowed + 4 * torch.finfo(output.dtype).eps * truth.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", ["streaming", *(f"any {name}" for name in POLICIES)])
def test_kernels_give_what_the_plain_form_gives(policy, shape):
    problem = Problem(policy, *shape)
    expected = problem.plain(0.2)
    output, log_sums = problem.run(0.2)
    off = (output - expected.output).float().norm() / expected.output.float().norm()
    assert off < 0.02
    assert (log_sums - expected.log_sum).abs().mean() < 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", ["dhsa", "s2o", "compact"])
def test_kernels_choose_as_well_as_the_plain_form(policy, shape):
    """Keys that kernels count as equal can change places."""
    problem = Problem(policy, *shape)
    expected = problem.plain(0.2)
    output, log_sums = problem.run(0.2)
    truth = problem.dense(torch.float32)
    error, allowed = ((each - truth).norm() for each in (output, expected.output))
    assert error < 1.05 * allowed
    assert (log_sums - expected.log_sum).mean().abs() < 2e-2


@pytest.mark.parametrize("policy", ["streaming", "dhsa", "s2o", "compact"])
def test_no_choice_waits_for_the_device(policy):
    problem = Problem(policy, *SHAPES[0])
    problem.run(0.2)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(0.2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", BOTH)
def test_memory_is_bounded(policy, monkeypatch):
    """A choice takes less memory if less is allowed, and gives the same."""
    problem = Problem(policy, *SHAPES[0])
    expected, _ = problem.run(0.2)
    peaks = []
    for allowed in (2**31, 2**20):
        monkeypatch.setattr(listed, "CHOICE_BYTES", allowed)
        monkeypatch.setattr(ranked, "CHOICE_BYTES", allowed)
        monkeypatch.setattr(launch, "SCRATCH_BYTES", min(allowed, 2**29))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, _ = problem.run(0.2)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    assert peaks[1] < peaks[0] <= 2 * 2**31
