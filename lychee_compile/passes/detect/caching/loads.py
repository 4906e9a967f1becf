"""Recover keys or values as an expression of what is stored.

    keys = cache.to(float32) * scale         cache[b, h, kv, d] * scale[b, h, kv, 0]
    keys = cache[table].flatten(1, 2)        cache[table[b, kv // 16], kv % 16, h, d]
    keys = cat((-x2, x1), -1) * sin          where(d < 8, -x[b, h, kv, d + 8] * sin[kv, d], ...)
    keys = cat((past, tail), 2)              where(kv < n, past[b, h, kv, d], tail[b, h, kv - n, d])

An element is followed back by the same index arithmetic as that of a mask, to tensors that are
given, that this call writes tokens to, or that no rule describes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import sympy
import torch
import torch.fx
from sympy.core.relational import Relational

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.axis_roles import Roles
from lychee_compile.passes.detect.caching.stored_elements import StoredElements
from lychee_compile.passes.detect.caching.tails import parts_of
from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.graph.aliasing import is_given, is_pure_view
from lychee_compile.passes.graph.dataflow import (
    first_input,
    operator_of,
    through_bits,
    value_of,
)
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.symbolic.axes import Axes, Axis, Index, Indices, with_finer_axes
from lychee_compile.passes.symbolic.elements import symbol_of
from lychee_compile.passes.symbolic.elementwise import Element, Flag

_NAME = "load_{}"
"""Name of the axis of each of the indices."""
LARGEST = 60
"""Largest number of operations of an expression that is evaluated at each read."""
BATCH, HEAD, TOKEN, CHANNEL = INDEX = sympy.symbols("b h kv d", integer=True, nonnegative=True)
"""Row, KV head, token and channel of a key or value: the symbols of an expression."""


@dataclass(frozen=True)
class Pages:
    """A leaf that holds tokens in pages, which a table lists."""

    page_dim: int
    """Dimension that runs over pages."""
    slot_dim: int
    """Dimension that runs over the tokens of a page."""
    page: sympy.Indexed
    """Entry of the table for row `BATCH` and token `TOKEN`."""
    size: int
    """Number of tokens of a page."""


@dataclass(frozen=True)
class Load:
    """Keys or values as an expression of tensors of the graph."""

    element: Element
    """Element [b, h, kv, d], an expression of `INDEX` and of elements of the leaves."""
    leaves: tuple[tuple[str, torch.fx.Node], ...]
    """Tensors that the expression reads, by the names that it has for them."""
    dtype: torch.dtype
    """Dtype of the keys or values."""
    names: Names = field(compare=False, repr=False)
    """Names of the tensors of the graph."""

    @property
    def pages(self) -> Pages | None:
        """Way to find the page of a token; None if tokens do not lie in pages."""
        found = (self.pages_of(name) for name, _ in self.leaves)
        return next((each for each in found if each is not None), None)

    def pages_of(self, name: str) -> Pages | None:
        """Return how a leaf holds pages of tokens; None if it does not."""
        reads = set(self.reads_of(name))
        if len(reads) != 1:
            return None
        (indices,) = reads
        dims = [dim for dim, index in enumerate(indices) if index.has(TOKEN)]
        slots = [dim for dim in dims if isinstance(indices[dim], sympy.Mod)]
        if len(dims) != 2 or len(slots) != 1:
            return None
        (page_dim,) = set(dims) - set(slots)
        page, (token, size) = indices[page_dim], indices[slots[0]].args
        if token != TOKEN or not size.is_Integer or not isinstance(page, sympy.Indexed):
            return None
        elsewhere = page.xreplace({sympy.floor(TOKEN / size): sympy.S.Zero}).has(TOKEN)
        return None if elsewhere else Pages(page_dim, slots[0], page, int(size))

    def page_size_of_table(self, name: str) -> int:
        """Return the number of tokens of a page if a leaf is but a table [b, page]; 0 if not."""
        pages = self.pages
        if pages is None or str(pages.page.base) != name:
            return 0
        plain = (BATCH, sympy.floor(TOKEN / pages.size))
        return pages.size if all(each == plain for each in self.reads_of(name)) else 0

    def reads_of(self, name: str) -> list[Indices]:
        """Return the indices at which the expression reads a leaf."""
        found = self.element.atoms(sympy.Indexed)
        return [each.indices for each in found if str(each.base) == name]

    def labelled(self) -> Element:
        """Return the element with the names of inputs in the place of those of writes to them."""
        sources = {name: _written(leaf) for name, leaf in self.leaves}
        bases = [self.names.base(each) for each in sources.values()]
        alone = {base for base in bases if bases.count(base) == 1}
        labels = {
            name: base if base in alone else self.names.of(source)
            for (name, source), base in zip(sources.items(), bases, strict=True)
        }
        return self.element.replace(
            lambda each: isinstance(each, sympy.Symbol) and each.name in labels,
            lambda each: sympy.Symbol(labels[each.name]),
        )

    @property
    def numbers(self) -> tuple[sympy.Symbol, ...]:
        """Sizes in the expression that only a call tells, in the order of their names."""
        tensors = {symbol_of(name, value_of(leaf).dtype) for name, leaf in self.leaves}
        free = self.element.atoms(sympy.Symbol) - tensors - set(INDEX)
        return tuple(sorted(free, key=str))

    @property
    def chooses_by_tensor(self) -> bool:
        """True if tensors tell for which tokens keys come from which tensor, as a length does."""
        conditions = (
            condition for each in self.element.atoms(sympy.Piecewise) for _, condition in each.args
        )
        relations = {part for each in conditions for part in each.atoms(Relational, Flag)}
        tensors = [symbol_of(name, value_of(leaf).dtype) for name, leaf in self.leaves]
        return any(each.has(TOKEN) and each.has(*tensors) for each in relations)

    def place_of_tokens(self, name: str) -> tuple[int, sympy.Expr] | None:
        """Return the dimension of a leaf that runs over tokens, and the first token that it holds.

        A tail holds the tokens behind those of a past: it is read at `TOKEN` - first token. None if
        there is no such dimension.
        """
        reads = self.reads_of(name)
        dims = {dim for each in reads for dim, index in enumerate(each) if index.has(TOKEN)}
        if len(dims) != 1:
            return None
        (dim,) = dims
        firsts = {sympy.expand(TOKEN - each[dim]) for each in reads}
        first = firsts.pop()
        if firsts or first.has(*INDEX) or first.atoms(sympy.Indexed, sympy.floor, sympy.Mod):
            return None
        return dim, first

    def is_behind_others(self, name: str) -> bool:
        """True if a leaf holds tokens that come behind those of an input."""
        place = self.place_of_tokens(name)
        inputs = any(is_given(leaf) for _, leaf in self.leaves)
        return inputs and place is not None and place[1] != 0

    def batch_dim(self, name: str) -> int | None:
        """Return the dimension of a leaf that runs over rows; None if there is no such one."""
        reads = self.reads_of(name)
        dims = {dim for each in reads for dim, index in enumerate(each) if index.has(BATCH)}
        whole = all(each[dim] == BATCH for each in reads for dim in dims)
        return min(dims) if len(dims) == 1 and whole else None


def load_of(
    operand: Operand,
    channels: tuple[Axis, ...],
    attention: Attention,
    is_stored: Callable[[torch.fx.Node, Indices], bool],
) -> Load | None:
    """Return keys or values as an expression; None if that is not found or is too large.

    `channels` are the axes of their features. `is_stored` tells of a tensor and the indices at
    which it is read if it is stored as it is.
    """
    joined = partial(parts_of, attends=attention.node)
    module = operand.node.graph.owning_module
    assert module is not None

    def match(axes: Axes) -> Load:
        axes.agree_with(attention.axes)
        indices, names = _indices(operand.layout, attention, channels, axes)
        names_of = Names(module)
        elements = StoredElements(axes, names_of, is_stored, joined)
        element = axes.rejoined(elements.of(operand.node, indices)).xreplace(names)
        element = axes.in_fewest_sizes(element)
        leaves = [
            (name, node)
            for name, node in elements.leaves.items()
            if any(str(each) == name for each in element.free_symbols)
        ]
        return Load(element, tuple(leaves), value_of(operand.node).dtype, names_of)

    load = with_finer_axes(match)
    if load is None or load.element.count_ops() > LARGEST or load.element.atoms(Axis):
        return None
    return load


def _written(leaf: torch.fx.Node) -> torch.fx.Node:
    """Return the tensor that `leaf` shows, before the writes of the call."""
    source = through_bits(leaf)
    while operator_of(source).write is not None:
        source = through_bits(first_input(source))
    return source


def runs_over_tokens(index: Index) -> bool:
    """True if an index that `is_stored` is asked about depends on the token."""
    return any(str(axis).startswith(_NAME.format(TOKEN)) for axis in index.atoms(Axis))


def is_plain(load: Load, node: torch.fx.Node) -> bool:
    """True if keys or values are stored as they are read: `node` shows one tensor."""
    alone = isinstance(load.element, sympy.Indexed) and len(load.leaves) == 1
    leaf = load.leaves[0][1] if alone else node
    return alone and value_of(leaf).dtype == load.dtype and _views(node, leaf)


def _views(node: torch.fx.Node, leaf: torch.fx.Node) -> bool:
    while node is not leaf and is_pure_view(node):
        node = first_input(node)
    return node is leaf


def _indices(
    layout: Layout, attention: Attention, channels: tuple[Axis, ...], axes: Axes
) -> tuple[Indices, dict[sympy.Symbol, sympy.Symbol]]:
    """Return an index over each dimension of a layout, and the symbol of each axis in it."""
    roles: Roles = attention.roles
    digit: dict[Axis, Index] = {}
    names = {}
    for symbol, role in zip(INDEX, (roles.batch, roles.kv_heads, roles.key, channels), strict=True):
        name = _NAME.format(symbol)
        rest = axes.index(name, attention.axes.product(role))
        names[_axis(name)] = symbol
        for axis in reversed(role[1:]):
            rest, digit[axis] = axes.divide(rest, attention.axes.sizes[axis])
        if role:
            digit[role[0]] = rest
    indices = []
    for dimension in layout:
        index: Index = sympy.S.Zero
        for axis in dimension:
            index = index * attention.axes.sizes[axis] + digit[axis]
        indices.append(sympy.expand(index))
    return tuple(indices), names


def _axis(name: str) -> Axis:
    return Axis(name, integer=True, nonnegative=True)
