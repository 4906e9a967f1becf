"""Find which axes of queries and keys are features of the projection that they come from.

Heads are a part of those features; batch, positions of queries and positions of keys are not.

    x = cat([class_token, patches], 1)             [B, T, C]    T is of two tensors, C of both
    q = linear(x)                                  [B, T, C]    features: h*D + d
    q.view(B, T, H, D).transpose(1, 2)             [B, H, T, D]

A projection may also sum over tokens, as in Linformer: what it makes are tokens again.

    k = einsum("btc,tn->bnc", linear(x), e)        [B, N, C]    T is not made by the linear layer

Where tensors are joined, every range of the joined dimension belongs to its own tensor. An index
of that dimension therefore never leads into a tensor; an axis of the tensor's own takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.fx

from lychee_compile.passes.graph.dataflow import is_operator, operator_of, shape_of
from lychee_compile.passes.graph.operator_facts import Family
from lychee_compile.passes.symbolic.axes import (
    FINEST,
    Axes,
    Axis,
    Indices,
    SplitAxis,
    free_axes,
)
from lychee_compile.passes.symbolic.products import product_of
from lychee_compile.passes.symbolic.provenance import Origin, fresh, fresh_inner, origins_of
from lychee_compile.passes.symbolic.views import source_of

MOST = 160
"""Largest number of operators that are looked at between an attention and its projections."""
NO_AXES: frozenset[Axis] = frozenset()


@dataclass(frozen=True)
class Features:
    """Axes of an operand that are features, as far as the graph behind it tells."""

    made: frozenset[Axis] = NO_AXES
    """Axes that the nearest projection makes; none if no projection is in sight."""
    hinted: frozenset[Axis] = NO_AXES
    """Axes that an earlier projection makes, or that share a dimension with `head_dim` somewhere.

    Parts of an image share a dimension with their pixels, too: these axes are features only if
    both queries and keys have them.
    """


@dataclass(frozen=True)
class _Layer:
    """A projection: the axes that its weights make, and its input."""

    made: frozenset[Axis]
    source: Origin
    inner: frozenset[Axis]
    """Axes of the input that it sums over."""


def features_of(
    node: torch.fx.Node,
    indices: Indices,
    axes: Axes,
    head_dim: frozenset[Axis],
    is_parameter: Callable[[torch.fx.Node], bool],
    past_tokens: bool = False,
) -> Features:
    """Return the features of the projection behind `node`.

    With `past_tokens`, projections are passed by that sum over tokens, and so make tokens.
    Raises `SplitAxis` if an axis of `indices` must be taken apart first.
    """
    given = free_axes(indices)
    for _ in range(FINEST):
        try:
            return _Walk(axes, is_parameter, past_tokens).features(node, indices, head_dim)
        except SplitAxis as request:
            if request.axis in given:
                raise
            axes.split(request)
    return Features()


class _Walk:
    """A walk from an operand of an attention to the projections behind it."""

    def __init__(
        self, axes: Axes, is_parameter: Callable[[torch.fx.Node], bool], past_tokens: bool
    ) -> None:
        self._axes, self._is_parameter = axes, is_parameter
        self._past_tokens = past_tokens
        self._found: dict[tuple[torch.fx.Node, Indices, int], Features] = {}

    def features(
        self, node: torch.fx.Node, indices: Indices, head_dim: frozenset[Axis], layers: int = 2
    ) -> Features:
        """Return the features behind `node`, by the nearest `layers` projections at most."""
        key = (node, indices, layers)
        if key not in self._found:
            if len(self._found) > MOST:
                return Features()
            self._found[key] = Features()
            self._found[key] = self._look(node, indices, head_dim, layers)
        return self._found[key]

    def _look(
        self, node: torch.fx.Node, indices: Indices, head_dim: frozenset[Axis], layers: int
    ) -> Features:
        merged = Features(hinted=_merged(indices, head_dim))
        if node.op != "call_function":
            return merged
        layer = self._layer(node, indices)
        if layer is not None:
            return self._of_layer(layer, head_dim, layers)
        found = self._of_origins(node, indices, head_dim, layers)
        return found if found.made else Features(hinted=merged.hinted | found.hinted)

    def _of_layer(self, layer: _Layer, head_dim: frozenset[Axis], layers: int) -> Features:
        """Return the features that a layer makes.

        A layer that makes `head_dim` alone treats all heads alike: the layer before it tells them.
        """
        source = layer.source
        if self._past_tokens:
            behind = self.features(source.node, source.indices, head_dim, layers)
            if behind.made and not behind.made & layer.inner:
                return behind
        if layer.made - head_dim or layers == 1:
            return Features(layer.made)
        before = self.features(source.node, source.indices, layer.inner, layers - 1)
        return Features(layer.made, (before.made | before.hinted) - layer.inner)

    def _of_origins(
        self, node: torch.fx.Node, indices: Indices, head_dim: frozenset[Axis], layers: int
    ) -> Features:
        """Return what the main tensor with a projection tells, or else all hints.

        An axis along which tensors are joined is one of features if it is so in all of them.
        """
        found = []
        for origin in origins_of(node, indices, self._axes):
            told = self.features(origin.node, origin.indices, origin.inside(head_dim), layers)
            found.append((origin, told))
        projected = [(origin, told) for origin, told in found if told.made]
        if not projected:
            return Features(hinted=NO_AXES.union(*(told.hinted - o.own for o, told in found)))
        main, told = projected[0]
        wide = [bool(each.own & other.made) for each, other in projected if each.own]
        joined = main.joined if wide and all(wide) else NO_AXES
        return Features((told.made - main.own) | joined, told.hinted - main.own)

    def _layer(self, node: torch.fx.Node, indices: Indices) -> _Layer | None:
        """Return `node` as a projection; None for other operators."""
        if operator_of(node).family is Family.CONVOLUTION:
            return self._convolution(node, indices)
        product = product_of(node)
        if product is None:
            return None
        inner = fresh_inner(self._axes, product)
        sides = product.operand_indices(indices, inner)
        left, right = map(Origin, (product.left, product.right), sides)
        dense = is_operator(node, "linear") or is_operator(node, "addmm")
        if not dense and not self._is_parameter(product.right):
            if not self._is_parameter(product.left):
                return None
            left, right = right, left
        return _Layer(self._made(right) & free_axes(indices), left, free_axes(inner))

    def _made(self, weight: Origin) -> frozenset[Axis]:
        """Return the axes of a weight, without those that it is repeated along."""
        node, at = weight.node, weight.indices
        while node.op == "call_function":
            viewed = source_of(node, at, self._axes)
            if viewed is None:
                break
            node, at = viewed
        return free_axes(at)

    def _convolution(self, node: torch.fx.Node, indices: Indices) -> _Layer | None:
        source, weight = node.args[:2]
        assert isinstance(source, torch.fx.Node)
        assert isinstance(weight, torch.fx.Node)
        channel = len(indices) - len(shape_of(weight)) + 1
        inside = tuple(
            index if place < channel else fresh(self._axes, node, f"in{place}", size)
            for place, (index, size) in enumerate(zip(indices, shape_of(source), strict=True))
        )
        summed = free_axes(inside[channel : channel + 1])
        return _Layer(free_axes([indices[channel]]), Origin(source, inside), summed)


def _merged(indices: Indices, head_dim: frozenset[Axis]) -> frozenset[Axis]:
    """Return the axes that share a dimension with `head_dim`, and `head_dim` if there are any."""
    merged: frozenset[Axis] = frozenset()
    for index in indices:
        here = free_axes([index])
        if here & head_dim and here - head_dim:
            merged |= here
    return merged
