"""Find queries that are patches of an image or a video, and order them in tiles of neighbours.

A patch embedding is a convolution, and its output says how the tokens lie:

    patches = conv2d(image, weight, bias, [16, 16])         [B, C, 64, 64]
    x = transpose(flatten(patches, 2), 1, 2)                [B, 4096, C]
    x = cat([class_token, x], 1)                            [B, 4097, C]

In the order of rows, a tile of 128 queries would be two rows of this image of 64 x 64 patches. In
the order that is emitted here, a tile is a block of 16 x 8 patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from lychee_compile.codegen.specification import Q
from lychee_compile.kernels.sizes import QUERY_TILE
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.masks.reading import Reading
from lychee_compile.passes.graph.dataflow import ancestors, aten, operator_of, shape_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.operator_facts import Family

BLOCKS = {2: (16, 8), 3: (2, 8, 8)}
"""Sizes of the block of patches that makes a tile of queries, by the number of dimensions."""
MOST_PREFIX = 16
"""Largest number of tokens before the patches, such as class and register tokens."""


@dataclass(frozen=True)
class Grid:
    """Queries that are patches, row by row, after some other tokens."""

    sizes: tuple[int, ...]
    """Number of patches in each dimension: (rows, columns), or (frames, rows, columns)."""
    prefix: int
    """Number of tokens before the first patch."""

    @property
    def block(self) -> tuple[int, ...]:
        """Sizes of the block of patches that makes a tile of queries."""
        return BLOCKS[len(self.sizes)]

    def words(self) -> str:
        """Return what a tile is, "blocks of 16 x 8 patches"."""
        return f"blocks of {' x '.join(map(str, self.block))} patches"


def find_grid(attention: Attention) -> Grid | None:
    """Return the grid that the queries of self-attention are patches of, if the graph shows it.

    The result is None for causal attention and for a single tile. It is also None if no convolution
    that the queries come from gives as many patches, or if several do in different shapes.
    """
    tokens = attention.query_len
    if not isinstance(tokens, int) or tokens != attention.kv_len or tokens <= QUERY_TILE:
        return None
    if _is_bound_to_order(attention):
        return None
    grids = set()
    for node in ancestors(attention.query.node):
        sizes = _patches(node)
        if sizes is not None and 0 <= tokens - math.prod(sizes) <= MOST_PREFIX:
            grids.add(Grid(sizes, tokens - math.prod(sizes)))
    return grids.pop() if len(grids) == 1 else None


def _is_bound_to_order(attention: Attention) -> bool:
    """True if a bound of the visible keys depends on the query's position: causal, a window."""
    first, last = Reading(attention).bounds
    return any(Q in bound.free_symbols for bound in (*first, *last))


def _patches(node: torch.fx.Node) -> tuple[int, ...] | None:
    """Return the sizes of a convolution's output [B, C, ...] in two or three dimensions."""
    sizes = shape_of(node)[2:]
    if operator_of(node).family is not Family.CONVOLUTION or len(sizes) not in BLOCKS:
        return None
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) and min(known[-2:]) > 1 else None


@dataclass
class Orders:
    """Emits the order of the queries of each grid once, before all else in the graph."""

    emit: Emitter
    _known: dict[tuple[Grid, torch.device], torch.fx.Node] = field(default_factory=dict)

    def __call__(self, grid: Grid, device: torch.device) -> torch.fx.Node:
        """Return the order of queries, int64 [T]: patches block by block, then the other tokens.

        Blocks are in the order of rows, and so are the patches in a block. Blocks at the far edges
        may have fewer patches.
        """
        if (grid, device) not in self._known:
            nodes = self.emit.graph.nodes
            first = next(node for node in nodes if node.op != "placeholder")
            with self.emit.graph.inserting_before(first):
                self._known[grid, device] = self._emitted(grid, device)
            self.emit.on_undo(lambda: self._known.pop((grid, device)))
        return self._known[grid, device]

    def _emitted(self, grid: Grid, device: torch.device) -> torch.fx.Node:
        """Emit operators that compute the order: a constant would be one more input."""
        integers: dict[str, Any] = {"device": device, "dtype": torch.int64}
        position = self.emit(aten.arange.default, math.prod(grid.sizes), **integers)
        order = self.emit(aten.argsort.default, self._rank(grid, position))
        if not grid.prefix:
            return order
        patches = self.emit(aten.add.Scalar, order, grid.prefix)
        before = self.emit(aten.arange.default, grid.prefix, **integers)
        return self.emit(aten.cat.default, [patches, before])

    def _rank(self, grid: Grid, position: torch.fx.Node) -> torch.fx.Node:
        """Emit what patches at positions int64 [T] are sorted by: block, then place inside it."""
        counts = [-(-size // step) for size, step in zip(grid.sizes, grid.block, strict=True)]
        stride, block_stride = _strides(grid.sizes), _strides(counts)
        inner = _strides(grid.block)
        parts = []
        for dim, (size, step) in enumerate(zip(grid.sizes, grid.block, strict=True)):
            at = self._modulo(self._divided(position, stride[dim]), size)
            block = self._divided(at, step)
            parts.append(self._times(block, block_stride[dim] * math.prod(grid.block)))
            parts.append(self._times(self._modulo(at, step), inner[dim]))
        total = parts[0]
        for part in parts[1:]:
            total = self.emit(aten.add.Tensor, total, part)
        return total

    def _divided(self, node: torch.fx.Node, by: int) -> torch.fx.Node:
        return self.emit(aten.div.Scalar_mode, node, by, rounding_mode="floor")

    def _modulo(self, node: torch.fx.Node, by: int) -> torch.fx.Node:
        return self.emit(aten.remainder.Scalar, node, by)

    def _times(self, node: torch.fx.Node, by: int) -> torch.fx.Node:
        return self.emit(aten.mul.Scalar, node, by)


def _strides(sizes: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous array."""
    return [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
