"""Emit the operands of an attention as operators take them: [B, H, T, D], one mask, one logit."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.detect.score import Mask
from lychee_compile.passes.graph.check import RewriteError, check_replacement
from lychee_compile.passes.graph.dataflow import aten, is_tensor, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.rearrange import AxisSizes, Rearranger, Size
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
        self._sizes = AxisSizes(attention, emit)
        self._rearrange = Rearranger(emit, attention.axes, self._sizes)

    def operands(self, *, repeated: bool = False, masked: bool = True) -> Canonical:
        """Emit all operands. Raises `RewriteError` if the graph does not tell a size.

        With `repeated`, all have one dtype and as many heads as the query. Without `masked`, there
        is no mask.
        """
        query, mask, extra = self.question(masked=masked)
        key, value = self.key(), self.value()
        if repeated:
            dtype = value_of(query).dtype
            key, value = (self.emit.cast(self._repeated(each), dtype) for each in (key, value))
            if mask is not None and value_of(mask).dtype != torch.bool:
                mask = self.emit.cast(mask, dtype)
        return Canonical(query, key, value, mask, extra)

    def question(
        self, *, masked: bool = True
    ) -> tuple[torch.fx.Node, torch.fx.Node | None, torch.fx.Node | None]:
        """Emit query, mask and extra logit of `operands`. Raises `RewriteError`."""
        return self._query(), self.mask() if masked else None, self._extra()

    def key(self) -> torch.fx.Node:
        """Emit the keys [B, Hkv, L, D]. Raises `RewriteError`."""
        return self._rearrange(self._attention.key, self._attention.roles.key_layout(), whole=True)

    def value(self) -> torch.fx.Node:
        """Emit the values [B, Hkv, L, Dv]. Raises `RewriteError`."""
        roles = self._attention.roles
        return self._rearrange(self._attention.value, roles.value_layout(), whole=True)

    def extent(self, axes: Iterable[Axis]) -> Size:
        """Emit the number of values that axes have together. Raises `RewriteError`."""
        total: Size = 1
        for axis in axes:
            size = self._sizes(axis)
            if size is None:
                raise RewriteError(reasons.SIZE_NOT_IN_GRAPH())
            both = isinstance(total, int) and isinstance(size, int)
            total = total * size if both else self.emit(operator.mul, total, size)  # type: ignore[operator]
        return total

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
        return self.emit.cast(node, wanted.dtype)

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
        return self.emit.cast(node, dtype)

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


def emit_behind_front(attention: Attention, emit: Emitter) -> Canonical:
    """Emit the operands of `attention` over all keys but the first.

    The first keys, `attention.parts[0]`, become one key more: its logit is the log-sum-exp of their
    scores, and its value their weighted mean, both float32. Parts are combined as in
    FlashAttention-2 (Dao, 2023), so the softmax over both is exact. Raises `RewriteError`.

        scores = matmul(query, memory_keys.mT) * scale + mask[..., :4]
        log_sum = logsumexp(scores, -1)                                         [B, Hq, Tq]
        mean = matmul(exp(scores - log_sum), memory_values)                     [B, Hq, Tq, Dv]
        out = sparse_attention(query, k, v, mask[..., 4:], log_sum, index, ..., mean)
    """
    front, behind = map(attention.over, attention.parts)
    mask, count = Canonicaliser(attention, emit).mask(), front.kv_len
    shown = None if mask is None else emit(aten.slice.Tensor, mask, -1, 0, count)
    first = replace(Canonicaliser(front, emit).operands(repeated=True), mask=shown)
    log_sum, mean = emit_attention(front, first, emit)
    rest = Canonicaliser(behind, emit).operands()
    if mask is not None:
        rest = replace(rest, mask=emit(aten.slice.Tensor, mask, -1, count))
    return replace(rest, extra=log_sum, extra_value=mean)


def emit_attention(
    attention: Attention, operands: Canonical, emit: Emitter
) -> tuple[torch.fx.Node, torch.fx.Node]:
    """Emit log-sum-exp [B, Hq, Tq] and output [B, Hq, Tq, Dv] of dense attention, both float32.

    The extra logit of `operands` takes part. Without any visible key they are -inf and zeros.
    """
    scores = _emit_scores(attention, operands, emit)
    every = scores
    if operands.extra is not None:
        column = emit(aten.unsqueeze.default, _as_float(operands.extra, emit), -1)
        column = emit(aten.expand_as.default, column, emit(aten.slice.Tensor, scores, -1, 0, 1))
        every = emit(aten.cat.default, [scores, column], -1)
    log_sum = emit(aten.logsumexp.default, every, [-1])
    nothing = emit(aten.eq.Scalar, log_sum, -torch.inf)
    shift = emit(aten.masked_fill.Scalar, log_sum, nothing, 0.0)
    shifted = emit(aten.sub.Tensor, scores, emit(aten.unsqueeze.default, shift, -1))
    weights = emit(aten.exp.default, shifted)
    return log_sum, emit(aten.matmul.default, weights, _as_float(operands.value, emit))


def _emit_scores(attention: Attention, operands: Canonical, emit: Emitter) -> torch.fx.Node:
    """Emit softcap tanh(scale q.k / softcap) + mask, float32 [B, Hq, Tq, M]."""
    score, mask = attention.score, operands.mask
    query, key = _as_float(operands.query, emit), _as_float(operands.key, emit)
    node = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -1, -2))
    node = emit(aten.mul.Scalar, node, score.scale)
    if score.softcap is not None:
        node = emit(aten.tanh.default, emit(aten.div.Scalar, node, score.softcap))
        node = emit(aten.mul.Scalar, node, score.softcap)
    if mask is None:
        return node
    if value_of(mask).dtype == torch.bool:
        hidden = emit(aten.logical_not.default, mask)
        return emit(aten.masked_fill.Scalar, node, hidden, -torch.inf)
    return emit(aten.add.Tensor, node, _as_float(mask, emit))


def _as_float(node: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
    if value_of(node).dtype == torch.float32:
        return node
    return emit(aten.to.dtype, node, torch.float32)
