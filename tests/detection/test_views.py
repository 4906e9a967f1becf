"""Indices carried back through random chains of views name the element that eager shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Traced, places, whole, with_finer_axes

from lychee_compile.passes.graph.aliasing import storage_of
from lychee_compile.passes.graph.dataflow import shape_of
from lychee_compile.passes.symbolic.axes import Axes, size_expression
from lychee_compile.passes.symbolic.views import source_of

Operator = Callable[[Tensor], Tensor]
LARGEST = 400


def merge(draw, x: Tensor) -> tuple[str, Operator] | None:
    if x.dim() < 2:
        return None
    first = draw(st.integers(0, x.dim() - 2))
    last = draw(st.integers(first + 1, x.dim() - 1))
    return f"flatten({first}, {last})", lambda t: t.flatten(first, last)


def split(draw, x: Tensor) -> tuple[str, Operator] | None:
    dim = draw(st.integers(0, x.dim() - 1))
    inner = draw(st.sampled_from([each for each in (1, 2, 3, 4) if x.shape[dim] % each == 0]))
    parts = draw(st.sampled_from([(-1, inner), (inner, -1), (x.shape[dim] // inner, inner)]))
    return f"unflatten({dim}, {parts})", lambda t: t.unflatten(dim, parts)


def reshape(draw, x: Tensor) -> tuple[str, Operator] | None:
    factors = [factor for size in x.shape for factor in _primes(size)]
    factors, shape = draw(st.permutations(factors)), []
    while factors:
        taken = draw(st.integers(1, len(factors)))
        shape.append(math.prod(factors[:taken]))
        factors = factors[taken:]
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = -1
    shape.insert(draw(st.integers(0, len(shape))), 1)
    return f"reshape({shape})", lambda t: t.reshape(shape)


def _primes(size: int) -> list[int]:
    for factor in (2, 3, 5, 7, 11):
        if size % factor == 0:
            return [factor, *_primes(size // factor)]
    return [size] if size > 1 else []


def like_its_own(draw, x: Tensor) -> tuple[str, Operator]:
    """`view` with the sizes that the graph itself asks for, as code that folds heads does."""
    if x.dim() < 2:
        return "view(-1, 1)", lambda t: t.reshape(-1, 1)
    return "view(size(0), -1)", lambda t: t.contiguous().view(t.shape[0], -1)


def swap(draw, x: Tensor) -> tuple[str, Operator] | None:
    one, other = (draw(st.integers(-x.dim(), x.dim() - 1)) for _ in range(2))
    names = ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
    name = draw(st.sampled_from(names))
    return f"{name}({one}, {other})", lambda t: getattr(t, name)(one, other)


def permute(draw, x: Tensor) -> tuple[str, Operator] | None:
    order = draw(st.permutations(range(x.dim())))
    order = [place - x.dim() if draw(st.booleans()) else place for place in order]
    if x.dim() > 1 and draw(st.booleans()):
        few, goal = order[: x.dim() // 2 + 1], draw(st.permutations(range(x.dim())))
        goal = goal[: len(few)]
        return f"movedim({few}, {goal})", lambda t: t.movedim(few, goal)
    return f"permute({order})", lambda t: t.permute(order)


def turn(draw, x: Tensor) -> tuple[str, Operator] | None:
    if x.dim() < 2:
        return None
    name = draw(st.sampled_from(["mT", "mH", "T", "t"] if x.dim() == 2 else ["mT", "mH"]))
    return name, lambda t: t.t() if name == "t" else getattr(t, name)


def ones(draw, x: Tensor) -> tuple[str, Operator] | None:
    if draw(st.booleans()):
        dim = draw(st.integers(-x.dim() - 1, x.dim()))
        return f"unsqueeze({dim})", lambda t: t.unsqueeze(dim)
    dims = draw(st.sampled_from([None, *range(x.dim())]))
    return f"squeeze({dims})", lambda t: t.squeeze() if dims is None else t.squeeze(dims)


def expand(draw, x: Tensor) -> tuple[str, Operator] | None:
    more = draw(st.lists(st.integers(1, 3), max_size=1))
    sizes = more + [draw(st.integers(1, 3)) if size == 1 else -1 for size in x.shape]
    return f"expand({sizes})", lambda t: t.expand(sizes)


def select(draw, x: Tensor) -> tuple[str, Operator] | None:
    dim = draw(st.integers(0, x.dim() - 1))
    at = draw(st.integers(-x.shape[dim], x.shape[dim] - 1))
    return f"select({dim}, {at})", lambda t: t.select(dim, at)


def slice_(draw, x: Tensor) -> tuple[str, Operator] | None:
    dim = draw(st.integers(0, x.dim() - 1))
    bounds = st.one_of(st.none(), st.integers(-x.shape[dim] - 2, x.shape[dim] + 2))
    taken = slice(draw(bounds), draw(bounds), draw(st.sampled_from([None, 1, 2, 3])))
    return f"[{taken}] of {dim}", lambda t: t[(slice(None),) * dim + (taken,)]


def narrow(draw, x: Tensor) -> tuple[str, Operator] | None:
    dim = draw(st.integers(0, x.dim() - 1))
    start = draw(st.integers(0, x.shape[dim] - 1))
    length = draw(st.integers(1, x.shape[dim] - start))
    start -= x.shape[dim] * draw(st.booleans())
    return f"narrow({dim}, {start}, {length})", lambda t: t.narrow(dim, start, length)


def part(draw, x: Tensor) -> tuple[str, Operator] | None:
    dim = draw(st.integers(0, x.dim() - 1))
    size, count = x.shape[dim], draw(st.integers(1, 3))
    first = draw(st.integers(0, size))
    spelled: dict[str, Callable[[Tensor], Any]] = {
        f"chunk({count})": lambda t: t.chunk(count, dim),
        f"split({count})": lambda t: t.split(count, dim),
        f"split([{first}, ...])": lambda t: t.split([first, t.shape[dim] - first], dim),
        f"tensor_split({count})": lambda t: t.tensor_split(count, dim),
        f"tensor_split([{first}])": lambda t: t.tensor_split([first], dim),
        "unbind": lambda t: t.unbind(dim),
    }
    name = draw(st.sampled_from(sorted(spelled)))
    parts = len(spelled[name](x))
    which = draw(st.integers(-parts, parts - 1))
    return f"{name}[{which}] of {dim}", lambda t: spelled[name](t)[which]


def repeat(draw, x: Tensor) -> tuple[str, Operator] | None:
    counts = draw(st.lists(st.integers(1, 3), max_size=1))
    counts += [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(x.dim())]
    if draw(st.booleans()):
        counts = counts[-1:]
        return f"tile({counts})", lambda t: t.tile(counts)
    return f"repeat({counts})", lambda t: t.repeat(counts)


def interleave(draw, x: Tensor) -> tuple[str, Operator] | None:
    times, dim = draw(st.integers(1, 3)), draw(st.integers(-x.dim(), x.dim() - 1))
    return f"repeat_interleave({times}, {dim})", lambda t: t.repeat_interleave(times, dim)


def flip(draw, x: Tensor) -> tuple[str, Operator] | None:
    dims = draw(st.lists(st.integers(0, x.dim() - 1), unique=True, max_size=2))
    return f"flip({dims})", lambda t: t.flip(dims)


KINDS: dict[str, Any] = {
    each.__name__: each
    for each in (
        merge, split, reshape, like_its_own, swap, permute, turn, ones, expand, select, slice_,
        narrow, part, repeat, interleave, flip,
    )
}  # fmt: skip


@st.composite
def chains(draw) -> tuple[Tensor, list[Operator]]:
    """Draw a tensor whose elements are their own places, and shape operators that fit together."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3))
    source = x = torch.arange(math.prod(shape)).view(shape)
    operators: list[Operator] = []
    for _ in range(draw(st.integers(1, 6))):
        made = KINDS[draw(st.sampled_from(sorted(KINDS)))](draw, x) if x.dim() else None
        if made is None:
            continue
        result = made[1](x)
        if 0 < result.numel() <= LARGEST:
            note(f"{made[0]}: {list(x.shape)} -> {list(result.shape)}")
            operators.append(made[1])
            x = result
    return source, operators


def run(source: Tensor, operators: list[Operator]) -> Tensor:
    for operator in operators:
        source = operator(source)
    return source


def carried_back(node: Any, goal: Any, axes: Axes) -> tuple[Any, Any]:
    """Return indices over all of `node`, and those into `goal`, which it is a view of."""
    out = indices = whole(axes, node)
    while node is not goal:
        viewed = source_of(node, indices, axes)
        assert viewed is not None, f"{node.target} is a view"
        node, indices = viewed
        assert len(indices) == len(shape_of(node))
    return out, indices


def check(source: Tensor, operators: list[Operator], dynamic: tuple[int, ...]) -> None:
    expected = run(source, operators)
    traced = Traced(lambda x: run(x, operators), source, dynamic=dynamic)
    (node,), (goal,) = traced.outputs, traced.inputs

    def match(axes: Axes):
        return axes, *carried_back(node, goal, axes)

    axes, out, indices = with_finer_axes(match)
    sizes = [traced.size(size_expression(size)) for size in shape_of(node)]
    assert sizes == list(expected.shape)
    for place in places(tuple(sizes), most=12):
        values = traced.at(axes, out, shape_of(node), place)
        at = [traced.size(index.subs(values)) for index in indices]
        assert all(0 <= each < size for each, size in zip(at, source.shape, strict=True))
        assert source[tuple(at)] == expected[place], (place, indices)


@settings(max_examples=25)
@given(chains())
def test_a_chain_of_views_names_the_elements_it_shows(chain) -> None:
    check(*chain, dynamic=())


@settings(max_examples=25)
@given(chains(), st.sets(st.integers(0, 2), min_size=1))
def test_a_chain_of_views_of_symbolic_sizes_names_the_elements_it_shows(chain, dims) -> None:
    dynamic = tuple(dim for dim in dims if dim < chain[0].dim() and chain[0].shape[dim] > 1)
    event(f"{len(dynamic)} symbolic")
    check(*chain, dynamic=dynamic)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.diagonal(),
        lambda x: x.unfold(0, 2, 1),
        lambda x: x.as_strided((2, 2), (1, 1)),
        lambda x: x.real,
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (3, 2)))),
        lambda x: torch.broadcast_tensors(x, torch.zeros(2, 6, 6))[0],
        lambda x: x.flatten()[::7],
        lambda x: x.hsplit(2)[1],
        lambda x: x.chunk(2)[1].select(0, 1).T,
        lambda x: x.view(torch.int32),
        lambda x: torch.atleast_3d(x).squeeze(2).mT.movedim(0, 1).unsqueeze(0),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
    ],
    ids=[
        "diagonal", "unfold", "as_strided", "real", "complex", "broadcast_tensors", "strided",
        "hsplit", "chunk", "other dtype", "shapes", "idle dropout",
    ],
)  # fmt: skip
def test_memory_that_may_be_shared_is_known_to_be(function: Operator) -> None:
    """A write through any of these is a write to the input, and must not pass for another."""
    x = torch.randn(6, 6)
    shown = function(x)
    assert shown.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    traced = Traced(function, x)
    (node,), (goal,) = traced.outputs, traced.inputs
    assert node is goal or storage_of(node) is goal
