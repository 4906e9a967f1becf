"""The two products of an attention, with a label for each dimension of their operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx

from lychee_compile.passes.detect.attention import Products
from lychee_compile.passes.graph.dataflow import argument, is_operator, same_shape, shape_of
from lychee_compile.passes.symbolic.axes import ZERO, Axes, Axis, Index, Indices, size_expression
from lychee_compile.passes.symbolic.products import Label, Labels, product_of


@dataclass(frozen=True)
class Labelled:
    """A tensor with a label for each dimension."""

    node: torch.fx.Node
    labels: Labels

    def dim(self, label: Label) -> int:
        """Return the dimension of a label. Raises ValueError if there is none."""
        return self.labels.index(label)

    def sizes(self) -> dict[Label | None, object]:
        """Return the size of each label."""
        return dict(zip(self.labels, shape_of(self.node), strict=True))


@dataclass(frozen=True)
class Factors:
    """A product of queries and keys, or of weights and values."""

    node: torch.fx.Node
    other: Labelled
    """Queries, or weights; of the operator itself if attention is one operator."""
    tokens: Labelled
    """Keys, or values."""
    out: Labels
    feature: Label
    """Label of the features of keys, or of values."""

    def indexed(self, axes: Axes) -> dict[Label | None, Index]:
        """Return an index for each label; a label of size one in both operands is at zero."""
        index: dict[Label | None, Index] = {None: ZERO}
        for operand in (self.other, self.tokens):
            for label, size in operand.sizes().items():
                if index.get(label, ZERO) == ZERO:
                    index[label] = axes.index(f"{label}", size)
        return index


def indices_of(operand: Labelled, index: Mapping[Label | None, Index]) -> Indices:
    """Return the index of each dimension; it is zero for a dimension of size one."""
    sizes = shape_of(operand.node)
    return tuple(
        ZERO if size_expression(size) == 1 else index[label]
        for size, label in zip(sizes, operand.labels, strict=True)
    )


def layout_of(
    operand: Labelled, index: Mapping[Label | None, Index], axes: Axes
) -> list[tuple[Axis, ...]] | None:
    """Return the axes of each dimension; None if one is no whole axes."""
    layout = []
    for place, size in zip(indices_of(operand, index), shape_of(operand.node), strict=True):
        digits = axes.digits(place, size)
        if digits is None:
            return None
        layout.append(digits)
    return layout


def factors_of(products: Products) -> tuple[Factors, Factors] | None:
    """Return the product of queries and keys and that with values; None if they are unreadable."""
    if products.scores is products.values:
        return _fused(products)
    scores = _factors(products.scores, products.key, summed=True)
    values = _factors(products.values, products.value, summed=False)
    return None if scores is None or values is None else (scores, values)


def _fused(products: Products) -> tuple[Factors, Factors] | None:
    node = products.scores
    if not is_operator(node, "scaled_dot_product_attention"):
        return None
    query, key, value = products.query, products.key, products.value
    if node.args[:3] != (query, key, value):
        return None
    ranks = {len(shape_of(each)) for each in (query, key, value)}
    grouped = bool(argument(node, "enable_gqa", False))
    heads = [shape_of(each)[:-2] for each in (query, key, value)]
    if len(ranks) != 1 or (grouped and not all(same_shape(heads[0], each) for each in heads)):
        return None
    batch: Labels = tuple(range(ranks.pop() - 2))
    queries = Labelled(query, (*batch, "row", "d"))
    keys = Labelled(key, (*batch, "kv", "d"))
    values = Labelled(value, (*batch, "kv", "e"))
    weights = Labelled(query, (*batch, "row", None))
    out = (*batch, "row", "e")
    return (
        Factors(node, queries, keys, (*batch, "row", "kv"), "d"),
        Factors(node, weights, values, out, "e"),
    )


def _factors(node: torch.fx.Node, tokens: torch.fx.Node, summed: bool) -> Factors | None:
    """Return a product, whose features are `summed` or are those of one operand alone."""
    product = product_of(node)
    if product is None or product.left is product.right:
        return None
    if not {product.left, product.right} <= set(node.all_input_nodes):
        return None
    sides = [
        Labelled(product.left, product.left_labels),
        Labelled(product.right, product.right_labels),
    ]
    other, held = sides if tokens is product.right else reversed(sides)
    if held.node is not tokens:
        return None
    alone = [each for each in held.labels if each is not None and each not in other.labels]
    features = list(product.inner) if summed else alone
    if len(features) != 1:
        return None
    return Factors(node, other, held, product.out_labels, features[0])
