"""The table of operators is true, whole, and the only one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import operands
from torch import Tensor
from tracing import Traced

import lychee_compile.passes
from lychee_compile.passes import reasons
from lychee_compile.passes.detect import detect
from lychee_compile.passes.detect.attention import Attention, Rejected
from lychee_compile.passes.graph.aliasing import storage_of
from lychee_compile.passes.graph.dataflow import is_operator, operator_of
from lychee_compile.passes.graph.normalise import normalise
from lychee_compile.passes.graph.operator_facts import Memory, ProductKind, Rule, View
from lychee_compile.passes.graph.operators import OPERATORS, UNKNOWN
from lychee_compile.passes.symbolic import element_rules, products, views

SOURCES = sorted(Path(lychee_compile.passes.__path__[0]).rglob("*.py"))
TABLE = "operators.py"

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_name_is_an_operator_of_aten(name: str) -> None:
    assert getattr(torch.ops.aten, name).overloads()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_is_known_by_its_first_name(name: str) -> None:
    described = OPERATORS[name]
    assert OPERATORS[described.name] == described


def test_no_row_says_nothing_of_the_memory_that_a_schema_denies() -> None:
    """A schema shows no alias if the result is noted as fresh, or as perhaps the input."""
    for name, described in OPERATORS.items():
        returns = [
            each
            for overload in getattr(torch.ops.aten, name).overloads()
            if "out" not in overload
            for each in getattr(getattr(torch.ops.aten, name), overload)._schema.returns
        ]
        annotated = any(each.alias_info is not None for each in returns)
        if described.memory is Memory.FRESH:
            assert not annotated, name
        if described.memory is Memory.PERHAPS_OF_INPUT and name != "lift_fresh":
            assert not annotated or name in ("hsplit", "vsplit", "dsplit"), name


def test_every_kind_has_a_function() -> None:
    assert set(views._RULES) == set(View) - {View.PARTS}
    assert set(element_rules.RULES) == set(Rule)
    assert set(products._RULES) == set(ProductKind)


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in SOURCES:
        if path.name != TABLE:
            yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())))


def strings(elements: list[Any]) -> list[str]:
    return [
        each.value
        for each in elements
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]


ARGUMENTS = {"max", "min", "index", "repeat"}
"""Words that are names of operators and of their arguments."""


def test_no_other_set_of_names() -> None:
    """Neither a set, a list, a tuple nor the keys of a dictionary hold two operators."""
    for path, node in trees():
        listed: list[Any] = []
        if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
            listed = node.elts
        elif isinstance(node, ast.Dict):
            listed = node.keys
        named = {each for each in strings(listed) if each in OPERATORS} - ARGUMENTS
        assert len(named) < 2, f"{path.name}:{node.lineno} lists {sorted(named)}"


def test_no_other_set_of_overloads() -> None:
    """Nor are two operators listed as `aten.add.Tensor` and the like."""
    for path, node in trees():
        if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
            listed = [ast.unparse(each) for each in node.elts if isinstance(each, ast.Attribute)]
            overloads = [each for each in listed if each.startswith(("aten.", "torch.ops.aten."))]
            assert len(overloads) < 2, f"{path.name}:{node.lineno} lists {overloads}"


def test_code_compares_first_names() -> None:
    """`is_operator(node, "divide")` would never be true, and is a mistake at once."""
    for path, node in trees():
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "is_operator":
            for name in strings(node.args):
                assert OPERATORS[name].name == name, f"{path.name}:{node.lineno}"


def test_what_is_not_in_the_table_is_unknown() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.cumsum.default, (graph.placeholder("x"), 0))
    assert operator_of(node) is UNKNOWN
    assert operator_of(torch.add) is UNKNOWN
    assert not UNKNOWN.carries_weights
    with pytest.raises(KeyError):
        is_operator(node, "cumsum")


def found(function: Callable[..., Tensor], *inputs: Tensor) -> Any:
    traced = Traced(function, *inputs)
    (attention,) = detect.find_attention(traced.gm, normalise(traced.gm, traced.mode))
    return attention


DIVISIONS = (torch.div, torch.divide, torch.true_divide)
DIFFERENCES = (torch.sub, torch.subtract)
PRODUCTS = (torch.mul, torch.multiply)


@pytest.mark.parametrize("divide", DIVISIONS)
def test_weights_are_followed_through_every_division(divide: Callable[..., Tensor]) -> None:
    """They were found behind `div` alone, and so was what a query or key is divided by."""
    heads = operands(4)
    attention = found(lambda q, k, v: divide((q @ k.mT).softmax(-1), 2.0) @ v, *heads)
    assert isinstance(attention, Attention)
    assert attention.refused is not None
    assert attention.refused.code == reasons.WEIGHTS_CHANGED.code
    attention = found(lambda q, k, v: (divide(q, 2.0) @ k.mT).softmax(-1) @ v, *heads)
    assert attention.score.scale == 0.5
    assert not attention.refused


@pytest.mark.parametrize("multiply", PRODUCTS)
def test_queries_are_scaled_by_every_product(multiply: Callable[..., Tensor]) -> None:
    attention = found(lambda q, k, v: (multiply(q, 2.0) @ k.mT).softmax(-1) @ v, *operands(4))
    assert attention.score.scale == 2
    assert not attention.score.unsupported


@pytest.mark.parametrize("subtract", DIFFERENCES)
def test_a_softmax_is_written_with_every_difference(subtract: Callable[..., Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return subtract(scores, scores.logsumexp(-1, keepdim=True)).exp() @ v

    assert isinstance(found(attend, *operands(4)), Attention)


@pytest.mark.parametrize("clamp", [torch.clamp, torch.clip])
def test_a_floor_is_every_clamp(clamp: Callable[..., Tensor]) -> None:
    attention = found(lambda q, k, v: clamp(q @ k.mT, min=-1e9).softmax(-1) @ v, *operands(4))
    assert not attention.score.unsupported


def test_a_sum_is_divided_by_in_any_shape() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).exp()
        total = weights.sum(-1).flatten(0, 1).unflatten(0, weights.shape[:2])
        return (weights / total[..., None].expand_as(weights)) @ v

    attention = found(attend, *operands(4))
    assert isinstance(attention, Attention)
    assert not attention.refused


def test_a_sum_over_the_queries_is_no_softmax() -> None:
    """With as many queries as keys, transposed weights have the shape of the weights."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).exp()
        return (weights / weights.transpose(-1, -2).sum(-1, keepdim=True)) @ v

    assert isinstance(found(attend, *(torch.randn(2, 4, 3, 3) for _ in range(3))), Rejected)


@pytest.mark.parametrize("name", ["unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"])
def test_unsafe_parts_share_memory(name: str) -> None:
    """Their schemas do not say so."""
    how = [2, 4] if name == "unsafe_split_with_sizes" else 2
    split = getattr(torch, name)
    traced = Traced(lambda x: split(x * 1, how)[1] + 1, torch.randn(6, 2))
    nodes = list(traced.gm.graph.nodes)
    product = next(each for each in nodes if is_operator(each, "mul"))
    total = next(each for each in nodes if is_operator(each, "add"))
    assert storage_of(total.args[0]) is product


def test_softmax_of_attention_still_needs_a_call() -> None:
    assert not is_operator(F.softmax, "softmax")
