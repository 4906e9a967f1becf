"""Score and mask as a kernel computes them are those of the graph, whichever way they are read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from kernel_cases import (
    BATCH,
    CASES,
    DIM,
    HEADS,
    KEYS,
    KV_HEADS,
    LENGTH,
    QUERIES,
    element,
    number,
    operands,
    random_mask,
    rows,
    same,
    scaled,
    sdpa,
    slots,
)
from kernel_values import How, assert_right, compiled, traced
from torch import Tensor

from lychee_compile.codegen.specification import KV, B, Captured, Q, S
from lychee_compile.kernels.reference.hidden import HIDDEN
from lychee_compile.passes.lower.kernel_expressions import fused_terms, mask_terms

pytestmark = pytest.mark.usefixtures("seeded")


def static_cache_step(query, key, value, key_new, value_new, length):
    """Step in the order of transformers: the mask first, then for each layer the cache moves on."""
    mask = (slots() <= rows(length))[None, None].expand(BATCH, 1, -1, -1)
    positions = torch.arange(QUERIES) + length
    length.add_(QUERIES)
    key.index_copy_(2, positions, key_new)
    value.index_copy_(2, positions, value_new)
    return sdpa(query, key, value, mask)


def test_a_static_cache_needs_no_mask_tensor() -> None:
    fresh = torch.randn(2, BATCH, KV_HEADS, QUERIES, DIM)
    (outcome,) = compiled(static_cache_step, *operands(), *fresh, torch.tensor(LENGTH))
    assert_right(outcome)
    terms = outcome.terms
    assert terms.visible == sympy.Le(KV, Q + number("given_length"))
    assert terms.score == DIM**-0.5 * S
    assert terms.captured == (Captured("given_length", "int64", 0),)


def test_layers_have_the_same_terms() -> None:
    def layers(query, key, value, lengths):
        out = query
        for length in lengths:
            out = out + sdpa(query, key, value, slots() < length[:, None, None, None])
        return out

    lengths = torch.tensor([3, 4]), torch.tensor([5, 6])
    first, second = compiled(layers, *operands(), lengths)
    for outcome in (first, second):
        assert_right(outcome)
    assert first.terms.visible == second.terms.visible
    assert first.terms.captured == second.terms.captured
    assert first.terms.nodes != second.terms.nodes


def test_tensors_alike_in_one_attention_are_told_apart() -> None:
    def attend(query, key, value, many):
        return sdpa(query, key, value, many[0][:, None, None] & many[1][:, None, None])

    many = (slots() > 2).expand(BATCH, -1), (slots() < 9).expand(BATCH, -1)
    (outcome,) = compiled(attend, *operands(), many)
    assert_right(outcome)
    assert [each.name for each in outcome.terms.captured] == ["given_many", "given_many_2"]


def spelled(function: Callable[..., Tensor], names: list[str]) -> Callable[..., Tensor]:
    """Return `function` with parameters of these names, which Dynamo calls its inputs by."""
    given = ", ".join(["q", "k", "v", *names])
    return eval(f"lambda {given}: function({given})", {"function": function})


@pytest.mark.parametrize("name", CASES)
def test_fused_terms(name: str) -> None:
    function, tensors, score, visible = CASES[name]
    call = spelled(function, list(tensors))
    (outcome,) = compiled(call, *operands(), *tensors.values(), how=fused_terms)
    assert_right(outcome)
    assert same(outcome.terms.score, score)
    assert visible is None or same(outcome.terms.visible, sympy.sympify(visible))
    assert {each.name for each in outcome.terms.captured} <= {f"given_{each}" for each in tensors}


@pytest.mark.parametrize("name", CASES)
def test_terms_that_read_the_mask(name: str) -> None:
    function, tensors, *_ = CASES[name]
    call = spelled(function, list(tensors))
    (outcome,) = traced(call, *operands(), *tensors.values(), how=mask_terms)
    assert_right(outcome)
    assert [each.name for each in outcome.terms.captured] in ([], ["mask"])


def test_the_mask_is_indexed_where_it_is_not_broadcast() -> None:
    def attend(q, k, v, bias):
        return sdpa(q, k, v, bias[:, :1] * bias[0, 0])

    (outcome,) = traced(attend, *operands(), torch.rand(BATCH, 2, 1, KEYS) - 0.5, how=mask_terms)
    assert outcome.terms.score == scaled + element("mask", B, 0, 0, KV)
    assert outcome.terms.visible == (element("mask", B, 0, 0, KV) > HIDDEN)
    assert_right(outcome)


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("how", [fused_terms, mask_terms])
def test_low_numbers_hide(how: How, low: float) -> None:
    def attend(q, k, v, mask):
        return sdpa(q, k, v, mask)

    mask = torch.zeros(BATCH, 1, QUERIES, KEYS).masked_fill(~random_mask(), low)
    (outcome,) = traced(attend, *operands(), mask, how=how)
    assert torch.equal(outcome.visible, random_mask().expand_as(outcome.visible))
    assert_right(outcome)


@pytest.mark.parametrize("how", [fused_terms, mask_terms])
def test_a_mask_that_is_scaled_still_hides(how: How) -> None:
    """-5000 does not hide, four times that does."""

    def attend(q, k, v, at):
        bias = torch.where(slots() <= rows(at), 0.0, -5000.0)
        return ((q @ k.mT + bias) * 4).softmax(-1) @ v

    (outcome,) = traced(attend, *operands(HEADS), torch.tensor(LENGTH), how=how)
    expected = (slots() <= rows(LENGTH)).expand_as(outcome.visible)
    assert torch.equal(outcome.visible, expected)
    assert_right(outcome)


@pytest.mark.parametrize("how", [fused_terms, mask_terms])
def test_large_numbers_hide_without_a_condition(how: How) -> None:
    def attend(q, k, v, at):
        return sdpa(q, k, v, (slots() - rows(at)).clamp(0, 1) * -1e9)

    (outcome,) = traced(attend, *operands(), torch.tensor(LENGTH), how=how)
    assert torch.equal(outcome.visible, (slots() <= rows(LENGTH)).expand_as(outcome.visible))
    assert_right(outcome)
