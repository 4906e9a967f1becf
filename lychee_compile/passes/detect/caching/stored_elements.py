"""Follow an element of keys or values back to what is stored, and no further.

The way ends at inputs, at tensors that a call writes tokens to, and at tensors that no rule
describes.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
import torch.fx

from lychee_compile.passes.graph.aliasing import is_given
from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    is_operator,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.operator_facts import View
from lychee_compile.passes.symbolic.axes import Axes, Index, Indices
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.elementwise import Element, piecewise


class StoredElements(Elements):
    """Elements of tensors, followed back to what is stored and no further."""

    def __init__(
        self,
        axes: Axes,
        names: Names,
        is_stored: Callable[[torch.fx.Node, Indices], bool],
        parts_of: Callable[[torch.fx.Node], list[torch.fx.Node]],
    ) -> None:
        """End at tensors that `is_stored`; `parts_of` gives what a concatenation is made of."""
        super().__init__(axes, names)
        self._is_stored, self._parts_of = is_stored, parts_of
        self.leaves: dict[str, torch.fx.Node] = {}
        """Tensors at which the way back ended, by name."""

    def load(self, node: torch.fx.Node, indices: Indices) -> Element:
        """Return an element of `node` by name, and note that the way ended there."""
        self.leaves[self.names.of(node)] = node
        return super().load(node, indices)

    def _evaluate(self, node: torch.fx.Node, indices: Indices) -> Element:
        if is_given(node) or node.op != "call_function" or self._is_stored(node, indices):
            return (
                super()._evaluate(node, indices)
                if node.op == "get_attr"
                else self.load(node, indices)
            )
        if not _keeps_numbers(node):
            return self.load(node, indices)
        if is_operator(node, "cat") or is_operator(node, "stack"):
            return self._joined(node, indices)
        return super()._evaluate(node, indices)

    def _joined(self, node: torch.fx.Node, indices: Indices) -> Element:
        """Return the element of tensors that are joined, as a choice between theirs."""
        dim = argument(node, "dim", 0) % len(indices)
        stacked, at, start = is_operator(node, "stack"), indices[dim], sympy.S.Zero
        choices = []
        for part in argument(node, "tensors") if stacked else self._parts_of(node):
            if not stacked and len(shape_of(part)) != len(indices):
                continue  # an empty tensor of one dimension
            size = sympy.S.One if stacked else self.axes.size(shape_of(part)[dim])
            inside = () if stacked else (sympy.expand(at - start),)
            begin, start = start, start + size
            if self._is_before(at, begin):
                break
            if not self._is_behind(at, start):
                ours = (*indices[:dim], *inside, *indices[dim + 1 :])
                choices.append((self.of(part, ours), sympy.Lt(at, start)))
        *before, last = choices
        return _choice([*before, (last[0], sympy.true)])

    def _is_before(self, at: Index, begin: Index) -> bool:
        return self.axes.is_below(at, begin) if begin != 0 else False

    def _is_behind(self, at: Index, end: Index) -> bool:
        return bool(sympy.expand(at - end).is_nonnegative)


def _choice(branches: list[tuple[Element, Element]]) -> Element:
    """Return a choice between values that may be choices themselves."""
    flat = []
    for value, condition in branches:
        pairs = value.args if isinstance(value, sympy.Piecewise) else [(value, sympy.true)]
        flat += [(each, sympy.And(condition, holds)) for each, holds in pairs]
    return piecewise(flat)


def _keeps_numbers(node: torch.fx.Node) -> bool:
    """True if the numbers of `node` are those that its formula gives, but for rounding.

    Integers of few bits may overflow, and few bits of a float round much.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dtype.is_complex:
        return False
    if operator_of(node).view is View.COPY:
        return _holds(value.dtype, value_of(first_input(node)).dtype)
    exact = not operator_of(node).is_elementwise or value.dtype == torch.bool
    exact = exact or operator_of(node).keeps_range
    return exact or value.dtype.itemsize > (1 if value.dtype.is_floating_point else 2)


def _holds(after: torch.dtype, before: torch.dtype) -> bool:
    """True if a conversion does no more than round."""
    if after == before:
        return True
    if after.is_floating_point:
        return after.itemsize > 1
    if before.is_floating_point or torch.bool in (after, before):
        return False
    ours, theirs = torch.iinfo(after), torch.iinfo(before)
    return ours.min <= theirs.min and theirs.max <= ours.max
