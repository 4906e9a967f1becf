"""Tell which tensors an element of an operator's output comes from, and from where in them.

    y = cat([a, b], 1)              y[i, j]    a[i, j'] and b[i, j'']
    y = stack([a, b], -1)           y[i, j, k] a[i, j] and b[i, j]
    y = x * scale + norm(x)         y[i, j]    x[i, j]
    y = query @ key.mT              y[i, j]    query[i, c] and key[j, c]

Unlike a view, an operator may read many elements for one. A dimension that leads to no dimension of
a tensor read is left out. A dimension of that tensor that no index leads to has an axis of its own.
Where tensors are joined, every range of the joined dimension belongs to its own tensor: an index
outside of that range says nothing of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import argument, is_operator, is_tensor, shape_of
from lychee_compile.passes.symbolic.axes import (
    ZERO,
    Axes,
    Axis,
    Index,
    Indices,
    free_axes,
    size_expression,
)
from lychee_compile.passes.symbolic.products import Product, product_of
from lychee_compile.passes.symbolic.views import source_of


@dataclass(frozen=True)
class Origin:
    """A tensor that an operator reads, and the indices at which it does."""

    node: torch.fx.Node
    indices: Indices
    joined: frozenset[Axis] = frozenset()
    """Axes of the output along which tensors are joined."""
    own: frozenset[Axis] = frozenset()
    """Axes of this tensor that take their place."""

    def inside(self, axes: frozenset[Axis]) -> frozenset[Axis]:
        """Return `axes` of the output as axes of this tensor."""
        return (axes - self.joined) | self.own if axes & self.joined else axes


def origins_of(node: torch.fx.Node, indices: Indices, axes: Axes) -> list[Origin]:
    """Return the tensors that an operator reads, the main one first."""
    viewed = source_of(node, indices, axes)
    if viewed is not None:
        return [Origin(*viewed)]
    if is_operator(node, "cat"):
        return _joined(node, indices, axes)
    if is_operator(node, "stack"):
        return _stacked(node, indices)
    product = product_of(node)
    if product is not None:
        return _factors(product, indices, axes)
    operands = filter(is_tensor, node.all_input_nodes)
    origins = [each for operand in operands for each in _aligned(node, operand, indices, axes)]
    return sorted(origins, key=lambda each: -len(free_axes(each.indices)))


def fresh(axes: Axes, node: torch.fx.Node, name: str, size: int | torch.SymInt) -> Index:
    """Return an index over a dimension behind `node` that no index of its output leads to."""
    return axes.index(f"{node.name}.{name}", size)


def fresh_inner(axes: Axes, product: Product) -> list[Index]:
    """Return an index over each dimension that a product sums over."""
    sizes = enumerate(product.inner_sizes())
    return [fresh(axes, product.node, f"inner{place}", size) for place, size in sizes]


def _joined(node: torch.fx.Node, indices: Indices, axes: Axes) -> list[Origin]:
    """Return the tensors that `cat` joins, the longest first, or the only one that is read."""
    dim = argument(node, "dim", 0) % len(indices)
    at, start = indices[dim], ZERO
    parts: list[tuple[float, Origin]] = []
    for place, part in enumerate(argument(node, "tensors")):
        if len(shape_of(part)) != len(indices):  # an empty tensor of one dimension
            continue
        size = axes.size(shape_of(part)[dim])
        inside = sympy.expand(at - start)
        if axes.is_below(inside, size):
            return [Origin(part, (*indices[:dim], inside, *indices[dim + 1 :]))]
        own = fresh(axes, node, f"part{place}", shape_of(part)[dim])
        own_indices = (*indices[:dim], own, *indices[dim + 1 :])
        parts.append((_about(size), Origin(part, own_indices, free_axes([at]), free_axes([own]))))
        start += size
    return [origin for _, origin in sorted(parts, key=lambda each: -each[0])]


def _about(size: sympy.Expr) -> float:
    """Return a size with all symbols taken to be large."""
    return float(size.subs(dict.fromkeys(size.free_symbols, 1009)))


def _stacked(node: torch.fx.Node, indices: Indices) -> list[Origin]:
    """Return the tensors that `stack` lays side by side, or the only one that is read."""
    dim = argument(node, "dim", 0) % len(indices)
    parts, at = argument(node, "tensors"), indices[dim]
    if at.is_Integer and 0 <= at < len(parts):
        parts = [parts[int(at)]]
    inside = (*indices[:dim], *indices[dim + 1 :])
    return [Origin(part, inside, free_axes([at])) for part in parts]


def _factors(product: Product, indices: Indices, axes: Axes) -> list[Origin]:
    sides = product.operand_indices(indices, fresh_inner(axes, product))
    return list(map(Origin, (product.left, product.right), sides))


def _aligned(
    node: torch.fx.Node, operand: torch.fx.Node, indices: Indices, axes: Axes
) -> Iterator[Origin]:
    """Yield an operand that has about the dimensions of the output, so that they name its own."""
    sizes, wide = shape_of(operand), shape_of(node)
    if is_operator(node, "view_as_complex") and len(indices) + 1 == len(sizes):
        yield Origin(operand, (*indices, ZERO))
    elif is_operator(node, "view_as_real") and len(indices) == len(sizes) + 1:
        yield Origin(operand, indices[:-1])
    elif len(sizes) == len(wide) == len(indices) and len(sizes) > 1:
        alike = (size_expression(a) == size_expression(b) for a, b in zip(sizes, wide, strict=True))
        yield Origin(
            operand,
            tuple(
                indices[dim] if same else fresh(axes, node, f"in{dim}", sizes[dim])
                for dim, same in enumerate(alike)
            ),
        )
