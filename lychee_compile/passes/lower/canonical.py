"""Emit the operands of an attention as operators take them: [B, H, T, D], one mask, one logit."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.fx

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.detect.score import Mask
from lychee_compile.passes.graph.check import check_replacement
from lychee_compile.passes.graph.dataflow import aten, is_tensor, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.rearrange import Rearranger, Size
from lychee_compile.passes.symbolic.axes import Axis


@dataclass(frozen=True)
class Canonical:
    """Operands of one attention."""

    query: torch.fx.Node
    """[B, Hq, Tq, D]."""
    key: torch.fx.Node
    """[B, Hkv, L, D]."""
    value: torch.fx.Node
    """[B, Hkv, L, Dv]."""
    mask: torch.fx.Node | None
    """bool, True where visible, or additive; broadcastable to [B, Hq, Tq, L], L not broadcast."""
    extra: torch.fx.Node | None
    """Logit of a key that has no value of its own, broadcastable to [B, Hq, Tq]."""
    extra_value: torch.fx.Node | None = None
    """Value of that key, [B, Hq, Tq, Dv]; None: it adds nothing to the output."""


class Canonicaliser:
    """Emits the operands of one attention, and its output from that of an operator."""

    def __init__(self, attention: Attention, emit: Emitter) -> None:
        self._attention, self.emit = attention, emit
        self._sizes = _AxisSizes(attention, emit)
        self._rearrange = Rearranger(emit, attention.axes, self._sizes)

    def operands(self, *, repeated: bool = False, masked: bool = True) -> Canonical:
        """Emit all operands. Raises `RewriteError` if the graph does not tell a size.

        With `repeated`, all have one dtype and as many heads as the query. Without `masked`, there
        is no mask.
        """
        attention, roles = self._attention, self._attention.roles
        query, mask = self._query(), self.mask() if masked else None
        key = self._rearrange(attention.key, roles.key_layout(), whole=True)
        value = self._rearrange(attention.value, roles.value_layout(), whole=True)
        if repeated:
            dtype = value_of(query).dtype
            key, value = (self._cast(self._repeated(each), dtype) for each in (key, value))
            if mask is not None and value_of(mask).dtype != torch.bool:
                mask = self._cast(mask, dtype)
        return Canonical(
            query=query,
            key=key,
            value=value,
            mask=mask,
            extra=self._extra(),
        )

    def _cast(self, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
        return node if value_of(node).dtype == dtype else self.emit(aten.to.dtype, node, dtype)

    def _repeated(self, node: torch.fx.Node) -> torch.fx.Node:
        """Repeat each head [B, Hkv, L, D] for every query head that reads it."""
        group = self._attention.size(self._attention.roles.group)
        if group == 1:
            return node
        node = self.emit(aten.unsqueeze.default, node, 2)
        node = self.emit(aten.expand.default, node, [-1, -1, group, -1, -1])
        return self.emit(aten.flatten.using_ints, node, 1, 2)

    def output(self, result: torch.fx.Node) -> torch.fx.Node:
        """Return `result` [B, Hq, Tq, Dv] in the layout and dtype that the graph goes on with."""
        attention = self._attention
        operand = self._spread(result)
        wanted = value_of(attention.node)
        node = self._rearrange(operand, attention.output, whole=True)
        return self._cast(node, wanted.dtype)

    def replacement(self, result: torch.fx.Node) -> torch.fx.Node:
        """Emit what the graph goes on with instead of the attention, made of `result`.

        `result` [B, Hq, Tq, Dv] is the output of an operator. Raises `RewriteError` if that gives
        another shape, dtype or device than the attention has.
        """
        old = self._attention.node
        result.meta = {**old.meta, **result.meta}
        output = with_layout(self.emit, self.output(result), value_of(old))
        check_replacement(value_of(old), output)
        return output

    def _spread(self, result: torch.fx.Node) -> Operand:
        return Operand(result, self._attention.roles.output_layout())

    def _query(self) -> torch.fx.Node:
        attention, roles = self._attention, self._attention.roles
        node = self._rearrange(attention.query, roles.query_layout(), whole=True)
        dtype = value_of(node).dtype
        for factor, inverse in attention.score.factors:
            times = factor.node
            if is_tensor(times):
                times = self._rearrange(factor, roles.query_layout(), whole=False)
            node = self.emit((aten.div if inverse else aten.mul).Tensor, node, times)
        return self._cast(node, dtype)

    def _extra(self) -> torch.fx.Node | None:
        extra, roles = self._attention.score.extra, self._attention.roles
        if extra is None:
            return None
        node = self._rearrange(extra, roles.score_layout()[:3], whole=False)
        times = self._attention.score.extra_times
        return node if times == 1 else self.emit(aten.mul.Scalar, node, times)

    def mask(self) -> torch.fx.Node | None:
        """Emit what hides keys and is added to scores, as `Canonical.mask`; None if nothing is."""
        score = self._attention.score
        if not score.masks and not score.biases:
            return None
        hides_wholly = all(mask.fill == -torch.inf for mask in score.masks)
        plain = hides_wholly and not score.biases
        node = self._visible(score.masks) if plain else self._additive()
        if node.meta["val"].shape[-1] == 1 and self._attention.kv_len != 1:
            kv_len = self._sizes(*self._attention.roles.key)
            node = self.emit(aten.expand.default, node, [-1, -1, -1, kv_len])
        return node

    def _visible(self, masks: tuple[Mask, ...]) -> torch.fx.Node:
        """Emit a bool tensor that is True if no mask hides the key."""
        node = None
        for mask in masks:
            part = self._rearrange(mask.operand, self._attention.roles.score_layout(), whole=False)
            part = self.emit(aten.logical_not.default, part) if mask.hidden_when else part
            node = part if node is None else self.emit(aten.logical_and.default, node, part)
        assert node is not None
        return node

    def _additive(self) -> torch.fx.Node:
        """Emit one tensor to add: the biases, and what masks fill in.

        A low number is replaced by the lowest of the dtype: if all keys of a query are hidden, all
        then count the same.
        """
        score, layout = self._attention.score, self._attention.roles.score_layout()
        node = None
        for bias in score.biases:
            part = self._rearrange(bias.operand, layout, whole=False)
            if bias.times != 1:
                part = self.emit(aten.mul.Scalar, part, bias.times)
            if not value_of(part).dtype.is_floating_point:
                part = self.emit(aten.to.dtype, part, torch.float32)
            node = part if node is None else self.emit(aten.add.Tensor, node, part)
        for mask in score.masks:
            part = self._rearrange(mask.operand, layout, whole=False)
            hidden = part if mask.hidden_when else self.emit(aten.logical_not.default, part)
            if node is None:
                node = self.emit(
                    aten.zeros_like.default,
                    hidden,
                    dtype=value_of(self._attention.query.node).dtype,
                )
            low = torch.finfo(value_of(node).dtype).min
            fill = mask.fill if mask.fill == -torch.inf else low
            node = self.emit(aten.masked_fill.Scalar, node, hidden, fill)
        assert node is not None
        return node


class _AxisSizes:
    """Sizes of the axes of one attention, as numbers or as nodes made of its operands.

    mask (nW,), (T,), (L,)              nW = sym_size(mask, 0)
    key (b, nW), (h,), (L,), (d,)       b  = sym_size(key, 0) // nW
    """

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


def with_layout(emit: Emitter, node: torch.fx.Node, wanted: torch.Tensor) -> torch.fx.Node:
    """Return `node`, laid out in memory as `wanted`: later views may rely on that."""
    value = value_of(node)
    order, now = _memory_order(wanted), _memory_order(value)
    if order == now and value.is_contiguous() == wanted.is_contiguous():
        return node
    order += [dim for dim in range(wanted.dim()) if dim not in order]
    back = [order.index(dim) for dim in range(wanted.dim())]
    node = emit(aten.permute.default, node, order)
    node = emit(aten.contiguous.default, node)
    return emit(aten.permute.default, node, back)


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions of more than one element, from the slowest to the fastest in memory."""
    strides = [
        (stride, -dim)
        for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True))
        if size != 1
    ]
    return [-dim for _, dim in sorted(strides, reverse=True)]
