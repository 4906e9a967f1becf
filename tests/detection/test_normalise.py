"""Writes to intermediate tensors, spelled as values: the graph computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Traced

import lychee_compile
from lychee_compile.passes.graph.normalise import normalise
from lychee_compile.passes.site import Site

SIZE, DIM = 160, 8
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}


def check(function: Callable[..., Any], *inputs: Tensor) -> Traced:
    """Run the normalised graph and eager on equal inputs: equal outputs, equal inputs after."""
    ours, theirs = ([each.clone() for each in inputs] for _ in range(2))
    traced = Traced(function, *inputs)
    normalise(traced.gm, traced.mode)
    traced.gm.graph.lint()
    traced.gm.recompile()
    got, expected = traced.gm(*ours), function(*theirs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    return traced


def writes(traced: Traced) -> list[str]:
    return [
        node.name
        for node in traced.gm.graph.nodes
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        and not node.name.startswith("detach_")  # of a constant
    ]


VALUES: dict[str, Callable[[Tensor], Any]] = {
    "masked_fill_": lambda t: t.masked_fill_(t > 0, -7.0),
    "add_": lambda t: t.add_(1.5),
    "add_ of itself": lambda t: t.add_(t, alpha=2),
    "+=": lambda t: t.__iadd__(torch.arange(4.0)),
    "mul_": lambda t: t.mul_(torch.tensor(3.0)),
    "div_": lambda t: t.div_(8.0),
    "sub_": lambda t: t.sub_(t.amax(-1, keepdim=True)),
    "exp_": lambda t: t.exp_(),
    "clamp_": lambda t: t.clamp_(min=0),
    "zero_": lambda t: t.zero_(),
    "fill_": lambda t: t.fill_(2.0),
    "copy_": lambda t: t.copy_(torch.arange(4)),
    "index_fill_": lambda t: t.index_fill_(0, torch.tensor([1]), 9.0),
    "index_put_": lambda t: t.__setitem__(torch.tensor([0, 2]), 5.0),
    "index_copy_": lambda t: t.index_copy_(0, torch.tensor([3]), torch.ones(1, 4)),
    "scatter_": lambda t: t.scatter_(1, torch.tensor([[0], [1], [2], [3]]), 4.0),
    "masked_scatter_": lambda t: t.masked_scatter_(t > 0, torch.arange(16.0)),
    "tril_": lambda t: t.tril_(),
    "relu_": lambda t: t.relu_(),
    "bool index": lambda t: t.__setitem__(t > 0, 1.0),
    "cumsum_": lambda t: t.cumsum_(0),
    "t_": lambda t: t.t_(),
    "out=": lambda t: torch.add(t * 2, 1, out=t),
    "fill_diagonal_": lambda t: t.fill_diagonal_(0.5),
    "where, out=": lambda t: torch.where(t > 0, t, t * 2, out=t),
}


@pytest.mark.parametrize("write", VALUES.values(), ids=VALUES)
def test_a_write_is_read_by_those_after_it_only(write) -> None:
    def function(x):
        scores = x @ x.T
        before = scores.sum(0)
        write(scores)
        return before, scores.softmax(-1), scores

    check(function, torch.randn(4, 4))


PLAIN = [name for name in VALUES if name not in ("out=", "where, out=", "t_", "fill_diagonal_")]


@pytest.mark.parametrize("name", PLAIN)
def test_a_write_to_a_tensor_of_the_graph_becomes_a_value(name: str) -> None:
    def function(x):
        scores = x @ x.T
        VALUES[name](scores)
        return scores.softmax(-1)

    assert writes(check(function, torch.randn(4, 4))) == []


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "slice": lambda t: t[1:3],
    "strided": lambda t: t[::2],
    "select": lambda t: t[1],
    "transpose": lambda t: t.mT,
    "view": lambda t: t.view(2, 8),
    "reshape": lambda t: t.reshape(-1),
    "flatten": lambda t: t.flatten(),
    "reshape, copied": lambda t: t.mT.reshape(-1),
    "contiguous": lambda t: t.contiguous(),
    "contiguous, copied": lambda t: t.mT.contiguous(),
    "to": lambda t: t.to(torch.float32),
    "to, copied": lambda t: t.to(torch.float64),
    "clone": lambda t: t.clone(),
    "chunk": lambda t: t.chunk(2)[1],
    "unbind": lambda t: t.unbind(1)[2],
    "hsplit": lambda t: t.hsplit(2)[0],
    "diagonal": lambda t: t.diagonal(),
    "diag_embed": lambda t: t.diag_embed(),
    "unfold": lambda t: t.unfold(0, 2, 2),
    "as_strided": lambda t: t.as_strided((2, 2), (4, 1)),
    "real": lambda t: t.real,
    "complex": lambda t: torch.view_as_real(torch.view_as_complex(t.view(4, 2, 2))),
    "dtype": lambda t: t.view(torch.int32),
    "alias": lambda t: t.detach(),
    "idle dropout": lambda t: torch.nn.functional.dropout(t, 0.5, training=False),
    "idle padding": lambda t: torch.nn.functional.pad(t, (0, 0)),
    "indexed": lambda t: t[torch.tensor([0, 1])],
    "meshgrid": lambda t: torch.broadcast_tensors(t, t)[0],
    "atleast": torch.atleast_1d,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("made", ["in the graph", "outside"])
def test_a_write_through_what_may_be_a_view(made: str, view) -> None:
    def function(x):
        scores = x @ x.T if made == "in the graph" else x
        early = view(scores)
        view(scores).mul_(2)
        middle = scores.sum()
        late = view(scores)
        early.sub_(1)
        return scores, early, late, middle

    check(function, torch.randint(1, 9, (4, 4)).float())


@settings(max_examples=20)
@given(st.data())
def test_any_sequence_of_views_writes_and_reads(data) -> None:
    """Two tensors, views of them, and views of views, written and read in any order."""
    views = sorted(set(VIEWS) - {"dtype", "diag_embed", "hsplit", "meshgrid", "complex", "view"})
    steps = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["view", "write", "read"]), st.integers(0, 5), st.integers(0, 40)
            ),
            min_size=2,
            max_size=7,
        )
    )
    note(str([(kind, which, views[how % len(views)]) for kind, which, how in steps]))

    def function(x):
        tensors, read = [x @ x.T, x], []
        for kind, which, how in steps:
            tensor = tensors[which % len(tensors)]
            if kind == "view" and tensor.shape == (4, 4):
                tensors.append(VIEWS[views[how % len(views)]](tensor))
            elif kind == "write":
                tensor.add_(how)
                tensor.masked_fill_(tensor > 20, float(how))
            else:
                read.append(tensor * 1)
        return *tensors[2:], *read, tensors[0]

    check(function, torch.randint(-4, 5, (4, 4)).float())


Step = Callable[[Tensor, Tensor], Tensor]
"""(scores [1, 2, 1, SIZE], key cache) -> scores."""


def through_a_slice(scores, k):
    scores[..., 100:] = -torch.inf
    return scores


def through_a_view(scores, k):
    scores.view(2, SIZE)[:, 100:].fill_(-torch.inf)
    return scores


def through_two_views(scores, k):
    flat, part = scores.view(-1), scores[..., :50]
    flat.mul_(0.5)
    part.add_(3.0)
    return scores


def every_second_key(scores, k):
    scores[..., ::2].mul_(0.5)
    return scores


def through_a_diagonal(scores, k):
    mask = torch.zeros(SIZE, SIZE)
    mask.diagonal().fill_(-torch.inf)
    return scores + mask[3]


def masked_by_a_diagonal(scores, k):
    hidden = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    hidden.diagonal().fill_(True)
    return scores.masked_fill(hidden[7], -torch.inf)


def a_bias_by_out(scores, k):
    bias = torch.zeros(SIZE)
    torch.mul(torch.arange(SIZE), 0.1, out=bias)
    return scores + bias


def a_bias_by_out_of_a_view(scores, k):
    bias = torch.zeros(2, SIZE)
    torch.mul(torch.arange(SIZE), 0.1, out=bias[0])
    return scores + bias.sum(0)


def a_bias_by_slices(scores, k):
    bias = torch.zeros(SIZE)
    bias[:80] = 2.0
    bias[5] = -1.0
    return scores + bias


def in_place_all_along(scores, k):
    scores.mul_(0.5).add_(torch.arange(SIZE) * 0.01)
    scores.masked_fill_(torch.arange(SIZE) > 120, -torch.inf)
    return scores


def a_read_before_the_write(scores, k):
    largest = scores.amax(-1, keepdim=True)
    scores -= largest
    scores /= 2
    return scores


SCORES = [
    through_a_slice, through_a_view, through_two_views, every_second_key, through_a_diagonal,
    masked_by_a_diagonal,
    a_bias_by_out, a_bias_by_out_of_a_view, a_bias_by_slices, in_place_all_along,
    a_read_before_the_write,
]  # fmt: skip


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
@pytest.mark.parametrize("change", SCORES)
def test_attention_over_scores_that_are_written_is_right(change: Step) -> None:
    """A part written with a step is kept; other writes may be sparse. The output is right."""

    def step(q, k, v, k_new, at):
        k.index_copy_(2, at, k_new)
        unread = torch.arange(SIZE) > 150  # the budget holds all keys but one
        scores = change(q @ k.mT, k)
        return scores.masked_fill(unread, -torch.inf).softmax(-1) @ v

    site = decoded(step)
    if change is every_second_key:
        assert site.decision == "kept"
        assert "slice_scatter" in str(site.reason)
    else:
        assert site.decision == "sparse", site.reason


def decoded(step: Callable[..., Tensor]) -> Site:
    k, v = torch.randn(2, 1, 2, SIZE, DIM)
    k_eager = k.clone()
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    for at in (140, 141):
        q, k_new = torch.randn(2, 1, 2, 1, DIM)
        got = compiled(q, k, v, k_new, torch.tensor([at]))
        expected = step(q, k_eager, v, k_new, torch.tensor([at]))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    (site,) = lychee_compile.reports()[-1].sites
    return site
