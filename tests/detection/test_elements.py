"""The recovered element of a tensor, at every place, is the element that eager computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Traced, evaluate, loads, places, whole, with_finer_axes

from lychee_compile.passes.graph.dataflow import shape_of
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.normalise import normalise
from lychee_compile.passes.symbolic.axes import Axes, size_expression
from lychee_compile.passes.symbolic.elements import Elements

ROWS, COLUMNS = 3, 5


def check(function: Callable[..., Tensor], *inputs: Tensor, dynamic: tuple[int, ...] = ()) -> Any:
    """Compare every element of `function(*inputs)`; its expression is the result."""
    expected = function(*(each.clone() for each in inputs))
    traced = Traced(function, *inputs, dynamic=dynamic)
    written = normalise(traced.gm, traced.mode)
    node = next(each for each in traced.gm.graph.nodes if each.op == "output").args[0]
    names = Names(traced.gm)

    def match(axes: Axes):
        out = whole(axes, node)
        return axes, out, Elements(axes, names, written).of(node, out)

    axes, out, element = with_finer_axes(match)
    sizes = tuple(traced.size(size_expression(size)) for size in shape_of(node))
    assert sizes == expected.shape
    values = loads(traced, names, inputs)
    for place in places(sizes, most=30):
        at = traced.at(axes, out, shape_of(node), place)
        got = evaluate(element, at, values)
        want = expected[place].item()
        assert got == want or math.isclose(got, want, rel_tol=1e-5, abs_tol=1e-6), (place, element)
    return element


def rows() -> Tensor:
    return torch.arange(ROWS)[:, None]


def columns() -> Tensor:
    return torch.arange(COLUMNS)


@st.composite
def numbers(draw, depth: int) -> tuple[str, Callable[..., Tensor]]:
    """Draw a tensor of numbers, of [ROWS, COLUMNS] or less."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        start, step = draw(st.integers(-2, 2)), draw(st.sampled_from([1, 2, -1]))
        leaves: dict[str, Callable[..., Tensor]] = {
            "q": lambda x, f, m: rows(),
            "kv": lambda x, f, m: columns(),
            "x": lambda x, f, m: x,
            "x[0]": lambda x, f, m: x[0],
            "x[:, -1:]": lambda x, f, m: x[:, -1:],
            "f": lambda x, f, m: f,
            f"arange({start}, ...)": lambda x, f, m: torch.arange(start, start + 5 * step, step),
            "m.int()": lambda x, f, m: m.int(),
            "0.5": lambda x, f, m: torch.full((1, 1), 0.5),
            "ones": lambda x, f, m: torch.ones_like(x),
        }
        name = draw(st.sampled_from(sorted(leaves)))
        return name, leaves[name]
    (a, one), (b, other) = draw(numbers(depth - 1)), draw(numbers(depth - 1))
    c, condition = draw(truths(depth - 1))
    k = draw(st.sampled_from([-2, -1, 1, 2, 3]))
    made: dict[str, Callable[..., Tensor]] = {
        f"({a} + {b})": lambda *t: one(*t) + other(*t),
        f"({a} - {b})": lambda *t: one(*t) - other(*t),
        f"({a} * {b})": lambda *t: one(*t) * other(*t),
        f"({k} - {a})": lambda *t: k - one(*t),
        f"add({a}, {b}, alpha={k})": lambda *t: torch.add(one(*t), other(*t), alpha=k),
        f"sub({a}, {k}, alpha=2)": lambda *t: torch.sub(one(*t), k, alpha=2),
        f"rsub({a}, {k}, alpha=2)": lambda *t: torch.rsub(one(*t), k, alpha=2),
        f"rsub({a}, {b}, alpha={k})": lambda *t: torch.rsub(one(*t), other(*t), alpha=k),
        f"({a} / {k})": lambda *t: one(*t) / k,
        f"({a} // {k})": lambda *t: one(*t) // k,
        f"({a} % {k})": lambda *t: one(*t) % k,
        f"-{a}": lambda *t: -one(*t),
        f"abs({a})": lambda *t: one(*t).abs(),
        f"({a}) ** 2": lambda *t: one(*t) ** 2,
        f"max({a}, {b})": lambda *t: torch.maximum(one(*t), other(*t)),
        f"min({a}, {b})": lambda *t: torch.minimum(one(*t), other(*t)),
        f"clamp({a}, {k})": lambda *t: one(*t).clamp(min=k),
        f"long({a})": lambda *t: one(*t).long(),
        f"float({a})": lambda *t: one(*t).float(),
        f"float({c})": lambda *t: condition(*t).float(),
        f"where({c}, {a}, {b})": lambda *t: torch.where(condition(*t), one(*t), other(*t)),
        f"where({c}, {a}, {k})": lambda *t: torch.where(condition(*t), one(*t), k),
        f"masked_fill({a}, {c}, {k})":
            lambda *t: (one(*t) + rows() * 0 + columns() * 0).masked_fill(condition(*t), k),
        f"tril({a}, {k})": lambda *t: (one(*t) + rows() * 0 + columns() * 0).tril(k),
        f"tanh({a})": lambda *t: torch.tanh(one(*t) * 0.1),
        f"exp({a})": lambda *t: torch.exp(one(*t).clamp(max=2.0)),
        f"{a}.div(floor)": lambda *t: one(*t).div(k, rounding_mode="floor"),
        f"{a}.div(trunc)": lambda *t: one(*t).div(k, rounding_mode="trunc"),
    }  # fmt: skip
    name = draw(st.sampled_from(sorted(made)))
    return name, made[name]


@st.composite
def truths(draw, depth: int) -> tuple[str, Callable[..., Tensor]]:
    """Draw a bool tensor, of [ROWS, COLUMNS] or less."""
    if depth == 0:
        leaves: dict[str, Callable[..., Tensor]] = {
            "kv <= q": lambda x, f, m: columns() <= rows(),
            "m": lambda x, f, m: m,
            "m[0]": lambda x, f, m: m[0],
            "tril": lambda x, f, m: torch.ones(ROWS, COLUMNS, dtype=torch.bool).tril(),
        }
        name = draw(st.sampled_from(sorted(leaves)))
        return name, leaves[name]
    (a, one), (b, other) = draw(numbers(depth - 1)), draw(numbers(depth - 1))
    (c, first), (d, second) = draw(truths(depth - 1)), draw(truths(depth - 1))
    k, flag = draw(st.integers(-2, 2)), draw(st.booleans())

    def spread(t: Any) -> Tensor:
        return first(*t) | torch.zeros(ROWS, COLUMNS, dtype=torch.bool)

    made: dict[str, Callable[..., Tensor]] = {
        f"({a} < {b})": lambda *t: one(*t) < other(*t),
        f"({a} <= {k})": lambda *t: one(*t) <= k,
        f"({a} >= {b})": lambda *t: one(*t) >= other(*t),
        f"({a} > {k})": lambda *t: one(*t) > k,
        f"({a} == {b})": lambda *t: one(*t) == other(*t),
        f"({a} != {k})": lambda *t: one(*t) != k,
        f"({c} == {d})": lambda *t: first(*t) == second(*t),
        f"({c} & {d})": lambda *t: first(*t) & second(*t),
        f"({c} | {d})": lambda *t: first(*t) | second(*t),
        f"({c} ^ {d})": lambda *t: first(*t) ^ second(*t),
        f"({c} * {d})": lambda *t: first(*t) * second(*t),
        f"({c} + {d})": lambda *t: first(*t) + second(*t),
        f"~{c}": lambda *t: ~first(*t),
        f"not {a}": lambda *t: torch.logical_not(one(*t)),
        f"{a} and {c}": lambda *t: torch.logical_and(one(*t), first(*t)),
        f"bool({a})": lambda *t: one(*t).bool(),
        f"where({c}, {d}, {flag})": lambda *t: torch.where(first(*t), second(*t), flag),
        f"{c}.masked_fill({d}, {flag})": lambda *t: spread(t).masked_fill(second(*t), flag),
        f"{c}.tril({k})": lambda *t: spread(t).tril(k),
        f"{c}.triu({k})": lambda *t: spread(t).triu(k),
        f"{c}[None][0]": lambda *t: spread(t)[None][0],
        f"{c}.to(int).to(bool)": lambda *t: first(*t).to(torch.uint8).to(torch.bool),
    }
    name = draw(st.sampled_from(sorted(made)))
    return name, made[name]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole_numbers = torch.randint(-2, 4, (ROWS, COLUMNS), generator=generator)
    fractions = torch.randint(-6, 6, (ROWS, 1), generator=generator) / 4
    return whole_numbers, fractions, torch.rand(ROWS, COLUMNS, generator=generator) < 0.5


@settings(max_examples=20)
@given(numbers(3))
def test_the_element_of_a_tensor_of_numbers(made) -> None:
    note(made[0])
    check(made[1], *inputs())


@settings(max_examples=20)
@given(truths(3))
def test_the_element_of_a_bool_tensor(made) -> None:
    note(made[0])
    check(made[1], *inputs())


@pytest.mark.parametrize("dynamic", [(), (0, 1)], ids=["static", "symbolic"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, at, to: x[at],
        lambda x, at, to: x[:, to],
        lambda x, at, to: x[at[:, None], to[None]],
        lambda x, at, to: x[at[:, None], torch.arange(x.shape[1])],
        lambda x, at, to: x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]],
        lambda x, at, to: x[torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])],
        lambda x, at, to: x[None, at, :, None][:, :, to[:2]],
        lambda x, at, to: torch.arange(x.shape[1])[to],
        lambda x, at, to: torch.arange(x.shape[1])[to - x.shape[1]],
        lambda x, at, to: torch.arange(10)[torch.arange(-4, 0)],
        lambda x, at, to: (x * 2)[torch.arange(-2, 0)],
        lambda x, at, to: x[torch.arange(x.shape[0]) % 2],
        lambda x, at, to: x[at][:, torch.arange(2)] + x[:1, :1],
        lambda x, at, to: x[at, :, None][:, to],
        lambda x, at, to: x[:, None][at, :, to[:1]],
    ],
)
def test_the_element_of_an_indexed_tensor(function, dynamic: tuple[int, ...]) -> None:
    x = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) ** 2
    check(function, x, torch.tensor([2, 0, 1, 1]), torch.tensor([4, 0, 3]), dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("factor", [0.5, 0.25, -0.75])
def test_a_cast_to_whole_numbers_cuts_off(dtype: torch.dtype, factor: float) -> None:
    check(lambda x: (torch.arange(7) * factor).to(dtype) + x, torch.zeros(7))
    check(lambda x: (x * factor).to(dtype), torch.arange(7.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.int64])
def test_an_element_of_bits_read_as_truth_values(dtype: torch.dtype) -> None:
    """A number of several bytes gives several truth values, each an element of its own."""
    check(lambda x: x.view(torch.bool), torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_an_element_of_truth_values_read_as_bits(dtype: torch.dtype) -> None:
    check(lambda x: x.view(dtype), torch.tensor([[True, False] * 4, [True] * 8]))
