"""The list of passes: what each may do to a graph, and what is logged of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.options import Options
from lychee_compile.passes import pipeline
from lychee_compile.passes.outcomes import ReferenceSparse

SIZE = 160
SPARSE = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4), "overfetch": 1}
LOGGER = "lychee_compile.passes.pipeline"

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and value cache that the graph only reads."""
    return torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, SIZE, 8)


def test_names_are_unique_and_every_pass_is_listed() -> None:
    names = [pipeline.name_of(each) for each in pipeline.PASSES]
    assert names == [
        "normalise",
        "detect",
        "decide",
        "absorb",
        "note_prefill",
        "rewrite",
        "append_in_place",
        "check_graph",
        "take_out_integers",
    ]


def test_deciding_changes_nothing_and_rewriting_does_what_was_decided() -> None:
    """Before and after each pass, the operators of the graph."""
    graphs: dict[str, tuple[str, str]] = {}

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compilation = pipeline.begin(gm, inputs, Options.parse(None, SPARSE))
        for each in pipeline.PASSES:
            before = str(compilation.gm.graph)
            pipeline.run([each], compilation)
            graphs[pipeline.name_of(each)] = before, str(compilation.gm.graph)
            if pipeline.name_of(each) == "decide":
                (plan,) = compilation.plans
                assert isinstance(plan.outcome, ReferenceSparse)
                assert not compilation.context.index_inputs.added
        return gm.forward

    torch.compile(attend, backend=backend)(*operands())
    for name in ("detect", "decide"):
        assert graphs[name][0] == graphs[name][1]
    before, after = graphs["rewrite"]
    assert "sparse_attention" not in before
    assert "sparse_attention" in after
    assert "aten.scaled_dot_product_attention" not in after


def test_each_pass_that_changes_the_graph_is_logged_before_and_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger=LOGGER):
        torch.compile(attend, backend="lychee", options=SPARSE)(*operands())
    messages = [record.message for record in caplog.records if record.name == LOGGER]
    heads = [each.partition(":")[0] for each in messages]
    assert heads == ["graph before rewrite", "graph after rewrite"]
    before, after = messages
    assert "sparse_attention" not in before
    assert "sparse_attention" in after
