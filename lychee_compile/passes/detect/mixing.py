"""Go back through operators that mix the maps of several heads: talking heads.

    mixed[b, g, q, kv] = sum over h of factor[h, g] maps[b, h, q, kv]

Scores may be mixed before the softmax, and weights after it: by a product with a matrix, a linear
layer, a convolution, or one of these and a normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx

from lychee_compile.passes.graph.dataflow import operator_of, shape_of
from lychee_compile.passes.graph.operator_facts import Family
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices, free_axes, size_expression
from lychee_compile.passes.symbolic.products import product_of

MIXERS = (Family.CONVOLUTION, Family.NORMALISATION)
"""Operators besides products that mix the maps of several heads."""


@dataclass(frozen=True)
class Mixture:
    """A tensor that a mixing operator may read maps from, and what it does to them."""

    maps: torch.fx.Node
    indices: Indices
    """Indices at which the maps are read; an axis that is summed over has an index of its own."""
    summed: frozenset[Axis]
    factor: torch.fx.Node | None = None
    """Factor of the sum; None for a normalisation, which sums nothing up."""
    factor_indices: Indices = ()


def mixtures_of(node: torch.fx.Node, indices: Indices, axes: Axes) -> Iterator[Mixture]:
    """Yield each way to read the element `indices` of `node` as a mixture of maps."""
    product = product_of(node)
    if product is not None:
        sizes = enumerate(product.inner_sizes())
        inner = [axes.index(f"{node.name}_{place}", size) for place, size in sizes]
        left, right = product.operand_indices(indices, inner)
        yield Mixture(product.left, left, free_axes(inner), product.right, right)
        yield Mixture(product.right, right, free_axes(inner), product.left, left)
    elif operator_of(node).family is Family.CONVOLUTION:
        yield from _convolved(node, indices, axes)
    elif operator_of(node).family is Family.NORMALISATION:
        yield Mixture(node.args[0], indices, frozenset())  # type: ignore[arg-type]


def _convolved(node: torch.fx.Node, indices: Indices, axes: Axes) -> Iterator[Mixture]:
    """Yield the input of a convolution whose channels are heads, if all else keeps its size."""
    source, weight = node.args[:2]
    assert isinstance(source, torch.fx.Node)
    assert isinstance(weight, torch.fx.Node)
    channel = len(indices) - len(shape_of(weight)) + 1
    sizes = [list(map(size_expression, shape_of(each))) for each in (source, node)]
    heads = shape_of(source)[channel]
    for each in sizes:
        del each[channel]
    if sizes[0] == sizes[1]:
        index = axes.index(f"{node.name}_in", heads)
        inside = (*indices[:channel], index, *indices[channel + 1 :])
        yield Mixture(source, inside, free_axes([index]), weight)
