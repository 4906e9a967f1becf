"""A kernel reads tensors as they were when the mask was made, whatever is written since."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_values import Outcome, assert_right, traced
from torch import Tensor

from lychee_compile.passes.graph.dataflow import aten, calls
from lychee_compile.passes.lower.kernel_expressions import fused_terms, kernel_expressions
from lychee_compile.passes.lower.read_time import MOST_KEPT, NotCapturable, Reads

HEADS, QUERIES, KEYS, DIM = 2, 2, 9, 4

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query, key, value, another tensor, which it may write) -> output."""

pytestmark = pytest.mark.usefixtures("seeded")


def slots() -> Tensor:
    return torch.arange(KEYS)


def rows() -> Tensor:
    return torch.arange(QUERIES)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def never_written(q, k, v, length):
    return attend(q, k, v, slots() <= rows() + length)


def written_before(q, k, v, length):
    length.add_(1)
    return attend(q, k, v, slots() <= rows() + length)


def written_after(q, k, v, length):
    out = attend(q, k, v, slots() <= rows() + length)
    length.add_(1)
    return out


def written_before_and_after(q, k, v, length):
    length.mul_(2)
    out = attend(q, k, v, slots() <= rows() + length)
    length.add_(1)
    return out


def written_between(q, k, v, length):
    mask = slots() <= rows() + length
    length.add_(1)
    return attend(q, k, v, mask)


def written_twice_between(q, k, v, length):
    mask = slots() <= rows() + length
    length.add_(1)
    length.mul_(2)
    return attend(q, k, v, mask)


def written_between_through_a_view(q, k, v, length):
    mask = slots() <= rows() + length
    length.view(1)[0] = 1
    return attend(q, k, v, mask)


def read_through_a_view_taken_before(q, k, v, length):
    view = length.view(1, 1)
    length.add_(1)
    mask = slots() <= rows() + view
    length.add_(1)
    return attend(q, k, v, mask)


def written_between_scores_and_mask(q, k, v, length):
    scores = q @ k.mT
    hidden = slots() > rows() + length
    length.add_(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def read_before_and_after(q, k, v, length):
    view = length.view(1)
    mask = slots() <= rows() + view
    length.add_(1)
    return attend(q, k, v, mask & (slots() > view - 4))


def read_before_and_by_the_write(q, k, v, length):
    mask = slots() <= rows() + length
    return attend(q, k, v, mask & (slots() > length.add_(1) - 4))


DIRECT = (never_written, written_before, written_after, written_before_and_after)
KEPT = (
    written_between,
    written_twice_between,
    written_between_through_a_view,
    read_through_a_view_taken_before,
    written_between_scores_and_mask,
)


def outcome(step: Step, length: Tensor, kv_len: int = KEYS, how=kernel_expressions) -> Outcome:
    operands = (torch.randn(1, HEADS, tokens, DIM) for tokens in (QUERIES, kv_len, kv_len))
    (made,) = traced(step, *operands, length, how=how)
    assert_right(made)
    return made


@pytest.mark.parametrize("step", DIRECT, ids=lambda step: step.__name__)
def test_a_tensor_that_stays_is_read_where_it_is(step: Step) -> None:
    (node,) = outcome(step, torch.tensor(3), how=fused_terms).terms.nodes
    assert not calls(node, aten.clone.default)


@pytest.mark.parametrize("step", KEPT, ids=lambda step: step.__name__)
def test_a_tensor_that_is_written_is_kept_as_it_was(step: Step) -> None:
    (node,) = outcome(step, torch.tensor(3), how=fused_terms).terms.nodes
    assert calls(node, aten.clone.default)


@pytest.mark.parametrize("step", [read_before_and_after, read_before_and_by_the_write])
def test_a_tensor_that_is_read_in_two_states_is_not_captured(step: Step) -> None:
    with pytest.raises(NotCapturable, match="both before and after"):
        outcome(step, torch.tensor(3), how=fused_terms)
    assert [each.name for each in outcome(step, torch.tensor(3)).terms.captured] == ["mask"]


def test_a_large_tensor_that_is_written_is_not_kept() -> None:
    def step(q, k, v, bias):
        mask = bias * 2
        bias.add_(1 + torch.randn(bias.shape))
        return attend(q, k, v, mask)

    kv_len = MOST_KEPT // QUERIES + 1
    bias = torch.randn(QUERIES, kv_len)
    with pytest.raises(NotCapturable, match="is written after it is read"):
        outcome(step, bias.clone(), kv_len, how=fused_terms)
    assert [each.name for each in outcome(step, bias, kv_len).terms.captured] == ["mask"]


def test_what_only_lends_its_shape_is_not_read() -> None:
    def step(q, k, v, length):
        view = length.view(1, 1)
        ones = torch.ones_like(view)
        length.add_(1)
        return attend(q, k, v, ones * rows() + view >= slots())

    (node,) = outcome(step, torch.tensor(3), how=fused_terms).terms.nodes
    assert not calls(node, aten.clone.default)


def test_a_tensor_from_nowhere_is_not_captured() -> None:
    graph = torch.fx.Graph()
    known, unknown, reader = (graph.placeholder(name) for name in ("known", "unknown", "reader"))
    reads = Reads([known], reader)
    assert reads.as_read(known, reader, None) is known
    with pytest.raises(NotCapturable, match="unknown is read in an unknown way"):
        reads.as_read(unknown, reader, None)
