"""Emit the size of an axis that is only known when the graph runs.

mask (nW,), (T,), (L,)                      nW = sym_size(mask, 0)
key (b, nW), (h,), (L,), (d,)               b  = sym_size(key, 0) // nW
"""

from __future__ import annotations

import operator
from collections.abc import Collection

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.graph.dataflow import aten
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.rearrange import Size
from lychee_compile.passes.symbolic.axes import Axis


class AxisSizes:
    """Sizes of the axes of one attention, as numbers or as nodes made of its operands."""

    def __init__(self, attention: Attention, emit: Emitter) -> None:
        self._sizes, self._emit = attention.axes.sizes, emit
        biases, masks = attention.score.biases, attention.score.masks
        operands = [attention.key, attention.value, attention.query]
        operands += [bias.operand for bias in biases] + [mask.operand for mask in masks]
        dimensions = [
            (operand, dim, axes)
            for operand in operands
            for dim, axes in enumerate(operand.layout)
            if axes
        ]
        self._dimensions: list[tuple[Operand, int, tuple[Axis, ...]]] = sorted(
            dimensions, key=lambda each: len(each[2])
        )

    def __call__(self, axis: Axis, unknown: Collection[Axis] = ()) -> Size | None:
        """Return the size of an axis; None if the operands do not tell it.

        A dimension that holds several axes tells the size of one by those of the others, of which
        none may be in `unknown`.
        """
        size = self._sizes[axis]
        if size.is_Integer:
            return int(size)
        unknown = {*unknown, axis}
        for operand, dim, axes in self._dimensions:
            others = [each for each in axes if each != axis]
            if len(others) == len(axes) or unknown & set(others):
                continue
            known = [self(each, unknown) for each in others]
            if None in known:
                continue
            node = self._emit(aten.sym_size.int, operand.node, dim)
            for each in known:
                node = self._emit(operator.floordiv, node, each)
            return node
        return None
