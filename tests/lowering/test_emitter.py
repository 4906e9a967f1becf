"""Operators are added to a graph, and taken back when an attempt fails."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph
from tracing import Traced

from lychee_compile.passes.graph.emitter import Emitter

aten = torch.ops.aten


@pytest.fixture
def emit() -> Emitter:
    traced = Traced(lambda x: x.sin(), torch.randn(3, 4))
    return Emitter(traced.gm.graph, traced.mode)


def first(graph: Graph) -> torch.fx.Node:
    return next(iter(graph.nodes))


def test_an_operator_has_its_fake_value(emit: Emitter) -> None:
    with emit.graph.inserting_after(first(emit.graph)):
        node = emit(aten.sum.dim_IntList, first(emit.graph), [1], keepdim=True)
    assert node.meta["val"].shape == (3, 1)


def test_a_failed_attempt_leaves_the_graph_as_it_was(emit: Emitter) -> None:
    before, undone = str(emit.graph), []

    def attempt() -> None:
        with emit.attempt(), emit.graph.inserting_after(first(emit.graph)):
            wide = emit(aten.unsqueeze.default, first(emit.graph), 0)
            emit.on_undo(lambda: undone.append(str(emit.graph)))
            emit(aten.neg.default, wide)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert str(emit.graph) == before
    (between,) = undone
    assert "unsqueeze" in between
    assert "neg" not in between


def test_an_operator_that_fails_itself_is_taken_back(emit: Emitter) -> None:
    before = str(emit.graph)
    with (
        pytest.raises(RuntimeError),
        emit.attempt(),
        emit.graph.inserting_after(first(emit.graph)),
    ):
        emit(aten.view.default, first(emit.graph), [5])
    assert str(emit.graph) == before


def test_only_the_inner_attempt_is_taken_back(emit: Emitter) -> None:
    def attempt() -> None:
        with emit.attempt():
            emit(aten.exp.default, first(emit.graph))
            raise ZeroDivisionError

    with emit.attempt(), emit.graph.inserting_after(first(emit.graph)):
        emit(aten.neg.default, first(emit.graph))
        with pytest.raises(ZeroDivisionError):
            attempt()
    assert "neg" in str(emit.graph)
    assert "exp" not in str(emit.graph)


def test_an_outer_attempt_takes_back_what_an_inner_one_kept(emit: Emitter) -> None:
    before = str(emit.graph)

    def attempt() -> None:
        with emit.attempt(), emit.graph.inserting_after(first(emit.graph)):
            with emit.attempt():
                emit(aten.neg.default, first(emit.graph))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert str(emit.graph) == before
