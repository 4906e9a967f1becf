"""Masks that a kernel reads as tensors, symbolic lengths, and FlexAttention."""

from __future__ import annotations

import pytest
import sympy
import torch
from kernel_cases import (
    BATCH,
    DIM,
    HEADS,
    KEYS,
    KV_HEADS,
    LENGTH,
    QUERIES,
    element,
    operands,
    same,
    scaled,
    sdpa,
    slope,
    slots,
)
from kernel_values import assert_right, compiled, traced
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tracing import Traced

from lychee_compile.codegen.specification import KV, KV_LEN, Captured, H, Q, S
from lychee_compile.passes.detect.detect import find_attention
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.kernel_expressions import (
    NotExpressible,
    fused_terms,
    kernel_expressions,
    mask_terms,
)
from lychee_compile.passes.lower.read_time import NotCapturable
from lychee_compile.passes.symbolic.elementwise import Flag

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_tensor_on_another_device_falls_back() -> None:
    """A length without dimensions may be on another device, where a kernel cannot read it."""

    def attend(q, k, v, length):
        return sdpa(q, k, v, torch.arange(KEYS, device="meta")[None] <= length)

    graph = Traced(attend, *(each.to("meta") for each in operands()), torch.tensor(LENGTH))
    (found,) = find_attention(graph.gm, frozenset())
    canonical = Canonicaliser(found, Emitter(graph.gm.graph, graph.mode))
    with pytest.raises(NotCapturable, match="length_1 is not on meta"):
        fused_terms(found, canonical)
    with graph.gm.graph.inserting_before(found.node):
        assert [each.name for each in kernel_expressions(found, canonical).captured] == ["mask"]


def test_a_long_expression_falls_back() -> None:
    def attend(q, k, v, *ends):
        mask = slots() < 1
        for first, end in zip(ends[::2], ends[1::2], strict=True):
            mask = mask | ((slots() >= first) & (slots() < end))
        return sdpa(q, k, v, mask[None])

    ends = [torch.tensor(each) for each in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
    (outcome,) = traced(attend, *operands(), *ends)
    assert outcome.terms.visible == Flag(element("mask", 0, 0, 0, KV))
    assert_right(outcome)
    (outcome,) = traced(attend, *operands(), *ends[:4])
    assert len(outcome.terms.captured) == 4
    assert_right(outcome)


def test_what_triton_cannot_say_falls_back() -> None:
    def attend(q, k, v, bias):
        return sdpa(q, k, v, bias[None] ** 3.5)

    with pytest.raises(NotExpressible):
        traced(attend, *operands(), torch.rand(KEYS), how=fused_terms)
    (outcome,) = traced(attend, *operands(), torch.rand(KEYS))
    assert [each.name for each in outcome.terms.captured] == ["mask"]
    assert_right(outcome)


@pytest.mark.parametrize("queries", [1, QUERIES])
def test_the_length_of_a_growing_cache_is_known_to_kernels(queries: int) -> None:
    def attend(q, k, v, fresh):
        key, value = torch.cat((k, fresh), 2), torch.cat((v, fresh), 2)
        ahead = torch.arange(fresh.shape[2])[:, None] + k.shape[2]
        return sdpa(q, key, value, torch.arange(key.shape[2]) <= ahead)

    q, k, v = operands(queries=queries)
    torch._dynamo.mark_dynamic(k, 2)
    torch._dynamo.mark_dynamic(v, 2)
    (outcome,) = compiled(attend, q, k, v, torch.randn(BATCH, KV_HEADS, queries, DIM))
    several = sympy.Le(KV, Q + KV_LEN - QUERIES)
    assert outcome.terms.visible == (sympy.true if queries == 1 else several)
    assert outcome.terms.captured == ()
    assert_right(outcome)


def test_other_sizes_fall_back() -> None:
    def attend(q, k, v, other):
        return sdpa(q, k, v, slots()[None] < other.shape[0])

    other = torch.zeros(7)
    torch._dynamo.mark_dynamic(other, 0)
    with pytest.raises(NotExpressible):
        compiled(attend, *operands(), other, how=fused_terms)
    torch._dynamo.reset()
    (outcome,) = compiled(attend, *operands(), other)
    assert outcome.terms.visible == Flag(element("mask", 0, 0, 0, KV))
    assert_right(outcome)


def test_a_score_does_not_depend_on_the_length() -> None:
    def attend(q, k, v, slopes):
        return sdpa(q, k, v, slopes[:, None, None] * (torch.arange(k.shape[2]) - k.shape[2]))

    q, k, v = operands()
    torch._dynamo.mark_dynamic(k, 2)
    torch._dynamo.mark_dynamic(v, 2)
    with pytest.raises(NotExpressible, match="number of keys"):
        compiled(attend, q, k, v, torch.rand(HEADS), how=fused_terms)
    torch._dynamo.reset()
    (outcome,) = compiled(attend, q, k, v, torch.rand(HEADS))
    assert outcome.terms.score == scaled + element("mask", 0, H, 0, KV)
    assert_right(outcome)


def test_what_is_not_understood_is_refused() -> None:
    def attend(q, k, v):
        return (q @ k.mT).sigmoid().softmax(-1) @ v

    for how in (kernel_expressions, mask_terms):
        with pytest.raises(RewriteError, match="sigmoid"):
            traced(attend, *operands(HEADS), how=how)


def test_flex_attention() -> None:
    lengths = torch.tensor([90])
    mask = create_block_mask(
        lambda b, h, i, j: (j <= i) & (j < lengths[b]), 1, None, 128, 128, device="cpu"
    )

    def attend(q, k, v, slopes):
        def score_mod(score, b, h, i, j):
            return score + slopes[h] * (j - i)

        return flex_attention(q, k, v, score_mod, block_mask=mask, scale=0.5)

    tensors = (*torch.randn(3, 1, HEADS, 128, 16), torch.rand(HEADS))
    (outcome,) = compiled(attend, *tensors)
    assert_right(outcome, 1e-4)
    by_name = {each.name: each for each in outcome.terms.captured}
    assert by_name.pop("given_slopes") == Captured("given_slopes", "float32", 1)
    ((name, captured),) = by_name.items()
    assert (captured.dtype, captured.rank) == ("int64", 1)
    assert same(outcome.terms.score, 0.5 * S + slope * (KV - Q))
    assert outcome.terms.visible == (KV <= Q) & sympy.Lt(KV, element(name, 0, integer=True))
    without = [
        attend,
        lambda q, k, v, slopes: flex_attention(q, k, v, block_mask=mask),
        lambda q, k, v, slopes: flex_attention(q, k, v, lambda s, b, h, i, j: s + slopes[h] * j),
    ]
    for each in without:
        with pytest.raises(RewriteError, match="FlexAttention"):
            compiled(each, *tensors, how=mask_terms)
