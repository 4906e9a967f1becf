"""Parts of an input count as memory of their own if the graph uses it by such parts alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tracing import Traced

from lychee_compile.passes.detect.caching.parts import input_of, separate_parts, view_of_part
from lychee_compile.passes.graph.aliasing import is_part, storage_of


def parts_of(function: Callable[..., Any]) -> tuple[Traced, list[torch.fx.Node]]:
    traced = Traced(function, torch.randn(3, 2, 4, 8, 6))
    separate_parts(traced.gm.graph)
    return traced, [node for node in traced.gm.graph.nodes if is_part(node)]


def by_layer(c: Tensor) -> Tensor:
    c[0, 0].mul_(0.5)
    c[0][1].add_(1)
    return c[0, 0] + c[2, 1]


def by_halves(c: Tensor) -> Tensor:
    left, right = c.chunk(2, 2)
    left.mul_(0.5)
    return left + right


def by_pieces(c: Tensor) -> Tensor:
    first, second = c[1].unbind(0)
    first.split(2, 0)[1].add_(1)
    return first.split(2, 0)[0] + second[:2]


def whole_as_well(c: Tensor) -> Tensor:
    c[0, 0].add_(1)
    return c[0, 0] + c.sum()


def across(c: Tensor) -> Tensor:
    c[0].add_(1)
    return c[0][:, 0].sum() + c[:, 0].sum()


def only_read(c: Tensor) -> Tensor:
    return c[0] + c[1]


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (by_layer, 3), (by_halves, 2), (by_pieces, 3),
        (whole_as_well, 0), (across, 0), (only_read, 0),
    ],
)  # fmt: skip
def test_parts_are_found_and_the_graph_means_the_same(function: Any, count: int) -> None:
    traced, parts = parts_of(function)
    assert len(parts) == count
    given, again = (torch.arange(3 * 2 * 4 * 8 * 6.0).view(3, 2, 4, 8, 6) for _ in range(2))
    assert torch.equal(torch.fx.Interpreter(traced.gm).run(given), function(again))
    assert torch.equal(given, again)
    for part in parts:
        assert storage_of(part) is part
        assert input_of(part) is traced.inputs[0]
        assert view_of_part(part)(given).shape == part.meta["val"].shape


def test_what_is_read_after_a_write_is_its_result() -> None:
    traced, _ = parts_of(by_layer)
    (total,) = traced.outputs
    assert "mul_" in total.args[0].name
