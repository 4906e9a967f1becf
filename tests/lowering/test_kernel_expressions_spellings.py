"""Terms from what a mask is made of, and from the mask, agree on every spelling of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, note, reject, settings
from hypothesis import strategies as st
from kernel_values import assert_right, traced
from spellings import SPELLINGS
from spellings_base import TOLERANCE
from spellings_random import HEADS as WAYS
from spellings_random import attend as attend_by
from spellings_random import recipes
from torch import Tensor

from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.lower.kernel_expressions import NotExpressible, fused_terms, mask_terms

pytestmark = pytest.mark.usefixtures("seeded")


def agree(function: Callable[..., Any], *inputs: Tensor, atol: float) -> bool:
    """Both ways give the output of the graph, and the same weights; whether both are open."""
    try:
        (outcome,) = traced(function, *inputs, how=mask_terms)
    except (RewriteError, ValueError):  # not understood, or not to be rewritten
        reject()
    assert_right(outcome, atol)
    try:
        (fused,) = traced(function, *inputs, how=fused_terms)
    except NotExpressible as why:
        note(str(why))
        return False
    assert_right(fused, atol)
    torch.testing.assert_close(fused.weights, outcome.weights, atol=atol, rtol=atol)
    return True


few = settings(max_examples=max(settings().max_examples // 5, 1))


@few
@given(
    spelling=st.sampled_from([each for each in SPELLINGS if not each.may_stay]),
    queries=st.integers(1, 3),
    start=st.integers(4, 30),
)
def test_both_ways_agree_on_every_spelling(spelling: Any, queries: int, start: int) -> None:
    torch.manual_seed(0)
    queries = 1 if spelling.one_query else queries
    positions = torch.arange(start, start + queries)
    tensors = spelling.given(positions, 36, spelling.held(36))
    names = list(tensors)

    def function(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
        return spelling(q, k, v, dict(zip(names, others, strict=True)))

    atol = TOLERANCE[spelling.dtype]
    agree(function, *spelling.operands(queries, 36), *tensors.values(), atol=atol)


@pytest.mark.parametrize("heads", WAYS)
@few
@given(data=st.data())
def test_both_ways_agree_on_random_spellings(heads: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    recipe = replace(data.draw(recipes(heads)), dtype=torch.float32)  # rounding is not the subject
    sizes = recipe.sizes
    slot, row = torch.arange(sizes.kv_len), torch.arange(sizes.batch)[:, None]
    tensors = {
        "positions": torch.arange(sizes.query_len) + sizes.kv_len // 2,
        "padding": (~((slot > 0) & (slot <= 2 * row + 1))).long(),
        "documents": (slot + 3 * row) // 10,
        "slopes": 2.0 ** -torch.arange(1.0, sizes.query_heads + 1),
        "temperature": 0.5 + torch.rand(sizes.query_heads),
        "table": torch.randn(8, sizes.query_heads),
        "sinks": torch.randn(sizes.query_heads),
    }
    shapes = [
        (sizes.query_heads, sizes.query_len, sizes.head_dim),
        (sizes.kv_heads, sizes.kv_len, sizes.head_dim),
        (sizes.kv_heads, sizes.kv_len, sizes.value_head_dim),
    ]
    given_operands = [torch.randn(sizes.batch, *shape) for shape in shapes]
    if recipe.layout == "b t h d":
        given_operands = [each.transpose(1, 2).contiguous() for each in given_operands]

    def function(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
        return attend_by(recipe, q, k, v, dict(zip(tensors, others, strict=True)))

    assert agree(function, *given_operands, *tensors.values(), atol=1e-5)
