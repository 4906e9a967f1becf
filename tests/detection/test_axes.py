"""Index arithmetic over axes: division, digits and reshapes, against plain integers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tracing import Traced, with_finer_axes

from lychee_compile.passes.graph.dataflow import shape_of
from lychee_compile.passes.symbolic.axes import Axes, SplitAxis, size_expression

FEW = settings(max_examples=20)


@st.composite
def indices(draw) -> tuple[list[int], list[int], int]:
    """Draw sizes of axes, a stride for each, negative too, and an offset that keeps all >= 0."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    strides = [draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, -1, -2, -4])) for _ in sizes]
    least = sum(min(0, stride * (size - 1)) for stride, size in zip(strides, sizes, strict=True))
    return sizes, strides, draw(st.integers(0, 6)) - least


def digits_of(number: int, sizes: list[int]) -> list[int]:
    """Return a number in mixed radix, outermost digit first."""
    found = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.insert(0, digit)
    return found


def values_at(axes: Axes, whole: list[sympy.Expr], sizes: list[int], at: tuple[int, ...]) -> dict:
    """Return values of the axes where the indices over whole dimensions have the values `at`."""
    values: dict[sympy.Symbol, int] = {}
    for index, size, number in zip(whole, sizes, at, strict=True):
        digits = axes.digits(index, size)
        assert digits is not None
        values |= zip(digits, digits_of(number, [axes.sizes[d] for d in digits]), strict=True)
    return values


@FEW
@given(indices(), st.integers(1, 12))
def test_division_of_an_index_is_division(index, divisor: int) -> None:
    sizes, strides, offset = index

    def divide(axes: Axes):
        whole = [axes.index(f"a{place}", size) for place, size in enumerate(sizes)]
        flat = sum(stride * each for stride, each in zip(strides, whole, strict=True)) + offset
        return axes, whole, axes.divide(sympy.expand(flat), sympy.Integer(divisor))

    axes, whole, (quotient, rest) = with_finer_axes(divide)
    for at in itertools.islice(itertools.product(*map(range, sizes)), 40):
        number = sum(s * i for s, i in zip(strides, at, strict=True)) + offset
        values = values_at(axes, whole, sizes, at)
        assert (quotient.subs(values), rest.subs(values)) == divmod(number, divisor)


@FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_an_axis_however_it_is_split_is_the_same_index(factors: list[int], data) -> None:
    size = math.prod(factors)
    axes = Axes()
    axes.index("a", size)
    for _ in range(3):
        splittable = [
            (axis, inner)
            for index in [axes.index("a", size)]
            for axis in index.free_symbols
            for inner in range(2, int(axes.sizes[axis]))
            if axes.sizes[axis] % inner == 0
        ]
        if splittable:
            axis, inner = data.draw(
                st.sampled_from(sorted(splittable, key=lambda each: (str(each[0]), each[1])))
            )
            axes.split(SplitAxis(axis, sympy.Integer(inner)))
    index = axes.index("a", size)
    digits = axes.digits(index, size)
    assert digits is not None
    assert math.prod(int(axes.sizes[axis]) for axis in digits) == size == axes.product(digits)
    for number in range(size):
        values = dict(zip(digits, digits_of(number, [axes.sizes[d] for d in digits]), strict=True))
        assert index.subs(values) == number


@FEW
@given(indices())
def test_digits_are_found_only_where_axes_lie_side_by_side(index) -> None:
    sizes, strides, offset = index
    axes = Axes()
    whole = [axes.index(f"a{place}", size) for place, size in enumerate(sizes)]
    flat = sympy.expand(sum(s * each for s, each in zip(strides, whole, strict=True)) + offset)
    values = [
        sum(s * i for s, i in zip(strides, at, strict=True)) + offset
        for at in itertools.product(*map(range, sizes))
    ]
    size = len(values)
    digits = axes.digits(flat, size)
    dense = sorted(values) == list(range(size)) and all(stride > 0 for stride in strides)
    assert (digits is not None) == dense
    if digits is not None:
        ordered = [axes.sizes[digit] for digit in digits]
        places = [str(digit) for digit in digits]
        for at, number in zip(itertools.product(*map(range, sizes)), values, strict=True):
            assert digits_of(number, ordered) == [at[int(place[1:])] for place in places]


def test_a_diagonal_is_no_whole_dimension() -> None:
    axes = Axes()
    index = axes.index("a", 4)
    assert axes.digits(5 * index, 16) is None
    traced = Traced(lambda x: x + 0, torch.empty(3), dynamic=(0,))
    (length,) = shape_of(traced.inputs[0])
    row = axes.index("row", length)
    assert axes.digits(row, length) == (row,)
    assert axes.digits(row * size_expression(length + 1), length * length) is None


@st.composite
def shapes(draw) -> tuple[list[int], list[int]]:
    """Draw two shapes of as many elements, with ones here and there."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 5]), max_size=4))

    def grouped(factors: list[int]) -> list[int]:
        shape = []
        while factors:
            taken = draw(st.integers(1, len(factors)))
            shape.append(math.prod(factors[:taken]))
            factors = factors[taken:]
        for _ in range(draw(st.integers(0, 2))):
            shape.insert(draw(st.integers(0, len(shape))), 1)
        return shape

    return grouped(draw(st.permutations(factors))), grouped(draw(st.permutations(factors)))


@FEW
@given(shapes())
def test_a_reshape_keeps_the_order_of_elements(shape) -> None:
    after, before = shape

    def reshape(axes: Axes):
        whole = [axes.index(f"a{place}", size) for place, size in enumerate(after)]
        return axes, whole, axes.reshape(whole, after, before)

    axes, whole, back = with_finer_axes(reshape)
    assert len(back) == len(before)
    for at in itertools.islice(itertools.product(*map(range, after)), 40):
        number = 0
        for size, index in zip(after, at, strict=True):
            number = number * size + index
        values = values_at(axes, whole, after, at)
        assert [int(index.subs(values)) for index in back] == digits_of(number, before)


@FEW
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.integers(2, 4),
    st.integers(2, 4),
    st.data(),
)
def test_a_reshape_of_symbolic_sizes_keeps_the_order(kinds, length, width, data) -> None:
    """Neighbours are merged, on the way there and on the way back."""
    traced = Traced(lambda x: x + 0, torch.empty(length, width), dynamic=(0, 1))
    sizes = [(1, 2, 3, *shape_of(traced.inputs[0]))[kind] for kind in kinds]

    def merged() -> list[Any]:
        cuts = [place for place in range(1, len(sizes)) if data.draw(st.booleans())]
        ends = zip([0, *cuts], [*cuts, len(sizes)], strict=True)
        return [math.prod(sizes[start:end]) for start, end in ends]

    after, before = merged(), merged()
    concrete = [traced.size(size_expression(size)) for size in after]
    number = data.draw(st.integers(0, math.prod(concrete) - 1))

    def reshape(axes: Axes):
        whole = tuple(axes.index(f"a{place}", size) for place, size in enumerate(after))
        return axes, whole, axes.reshape(whole, after, before)

    axes, whole, back = with_finer_axes(reshape)
    values = traced.at(axes, whole, after, tuple(digits_of(number, concrete)))
    assert [int(index.subs(values)) for index in back] == digits_of(
        number, [traced.size(size_expression(size)) for size in before]
    )


def test_equal_lengths_are_one_axis() -> None:
    traced = Traced(lambda x: x + 0, torch.empty(3, 4), dynamic=(0, 1))
    length, other = shape_of(traced.inputs[0])
    axes = Axes()
    assert axes.size(other * 2 + 1) != axes.size(length * 2)
    axes.assume_equal(other + 1, length)
    assert axes.size(other * 2 + 2) == axes.size(length * 2)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_an_index_over_nothing_or_one_thing(size: int) -> None:
    axes = Axes()
    index = axes.index("a", size)
    assert (index == 0) == (size == 1)
    assert axes.reshape((index,), (size,), (1, size, 1)) == (0, index, 0)


def test_an_empty_tensor_is_reshaped() -> None:
    axes = Axes()
    whole = (axes.index("a", 0), axes.index("b", 4))
    assert len(axes.reshape(whole, (0, 4), (4, 0))) == 2
    assert len(axes.reshape(whole, (0, 4), (0,))) == 1
