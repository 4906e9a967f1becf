"""Emit an attention over latents in the place of one over keys and values projected from them.

q . (U c) = (U^T q) . c     and     sum over kv of w (U c) = U (sum over kv of w c)

    k = cat((einsum("btc,hdc->bhtd", latent, up), rotary), -1)                     before
    out = attend(q, k, v = einsum("btc,hec->bhte", latent, out_up))

    q = cat((einsum("bhtd,hdc->bhtc", q[..., :D], up), q[..., D:]), -1)            after
    out = einsum("bhtc,hec->bhte", attend(q, cat((latent, rotary), -1), latent), out_up)
"""

from __future__ import annotations

from functools import partial

import torch.fx

from lychee_compile.passes.absorb.expansion import Expansion, Part, expansion_of, saves
from lychee_compile.passes.absorb.operands import Factors, Labelled, factors_of, layout_of
from lychee_compile.passes.absorb.pieces import NoPiece, contracted, piece
from lychee_compile.passes.detect.attention import Products
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.graph.dataflow import argument, aten, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.region import Order, overwritten_before
from lychee_compile.passes.lower.rearrange import Rearranger, Size
from lychee_compile.passes.symbolic.axes import Axes, Axis, Index, with_finer_axes
from lychee_compile.passes.symbolic.elements import Elements

KEPT_META = ("stack_trace", "nn_module_stack")
"""Metadata that a new operator takes over from the one that it replaces, for the report."""


class Absorber:
    """Rewrites attentions of one graph so that they run over latents."""

    def __init__(
        self, gm: torch.fx.GraphModule, emit: Emitter, written: frozenset[torch.fx.Node]
    ) -> None:
        """Begin; `written` are tensors made in the graph that are written later."""
        self._graph, self._emit = gm.graph, emit
        self._names, self._written = Names(gm), written

    def over_latents(self, products: Products) -> torch.fx.Node | None:
        """Rewrite an attention, and return the node that now computes its weighted sum of latents.

        None if nothing is rewritten: keys are no projection, or it saves nothing. Raises `NoPiece`
        or `RewriteError` if an operand has no form that views show.
        """
        factors = factors_of(products)
        if factors is None:
            return None
        keys, values = map(self._expansion, factors)
        if keys is None:
            return None
        if values is not None and len(values.parts) > 1:
            values = None
        with self._emit.attempt():
            return self._rewritten(factors, keys, values)

    def _expansion(self, factors: Factors) -> Expansion | None:
        """Return keys or values if it saves products to absorb their projection; else None."""

        def match(axes: Axes) -> Expansion | None:
            return expansion_of(factors, Elements(axes, self._names, self._written))

        found = with_finer_axes(match)
        if found is None or not found.is_projected or not saves(found, factors):
            return None
        reads = [(part.place.node, part.reader) for part in found.parts]
        reads += [(part.weights.node, part.reader) for part in found.parts if part.weights]
        moved = overwritten_before(factors.node, reads, Order(self._graph))
        return None if moved else found

    def _rewritten(
        self, factors: tuple[Factors, Factors], keys: Expansion, values: Expansion | None
    ) -> torch.fx.Node:
        scores, sums = factors
        with self._graph.inserting_before(scores.node):
            query, key = self._question(scores, keys)
            if scores.node is not sums.node:
                changed = {scores.other.node: query, scores.tokens.node: key}
                scores.node.replace_all_uses_with(self._anew(scores.node, changed))
                if values is None:
                    return sums.node
        with self._graph.inserting_before(sums.node):
            value = sums.tokens.node
            if values is not None:
                (part,) = values.parts
                value = self._held(part, sums.tokens, sums, values)
            if scores.node is sums.node:
                summed = self._attended(sums.node, query, key, value)
            else:
                summed = self._anew(sums.node, {sums.tokens.node: value})
            out = summed if values is None else self._projected(summed, sums, values)
        sums.node.replace_all_uses_with(out)
        for node in dict.fromkeys((sums.node, scores.node)):
            if not node.users:  # FX would keep it if it takes it for impure
                self._graph.erase_node(node)
        return summed

    def _anew(
        self, node: torch.fx.Node, changed: dict[torch.fx.Node, torch.fx.Node]
    ) -> torch.fx.Node:
        """Emit the product `node` again, of other operands."""
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda each: changed.get(each, each)
        )
        return self._for(node, self._emit(node.target, *args, **kwargs))

    def _attended(
        self, node: torch.fx.Node, query: torch.fx.Node, key: torch.fx.Node, value: torch.fx.Node
    ) -> torch.fx.Node:
        """Emit the attention operator `node` again, of other operands; one may have been both."""
        kwargs = dict(node.kwargs)
        if kwargs.get("scale") is None:
            width = int(shape_of(argument(node, "query"))[-1])
            kwargs["scale"] = float(width) ** -0.5
        made = self._emit(node.target, query, key, value, *node.args[3:], **kwargs)
        return self._for(node, made)

    def _for(self, node: torch.fx.Node, made: torch.fx.Node) -> torch.fx.Node:
        """Return `made`, which takes the place of `node` in reports."""
        made.meta |= {name: node.meta[name] for name in KEPT_META if name in node.meta}
        return made

    def _question(self, factors: Factors, keys: Expansion) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Emit queries and keys over channels of latents."""
        queries, held, emit = factors.other, factors.tokens, self._emit
        asked, shown = [], []
        for part in keys.parts:
            asked.append(self._query(part, queries, factors, keys))
            shown.append(self._held(part, held, factors, keys))
        if len(asked) == 1:
            return asked[0], shown[0]
        dims = queries.dim(factors.feature), held.dim(factors.feature)
        return emit(aten.cat.default, asked, dims[0]), emit(aten.cat.default, shown, dims[1])

    def _query(
        self, part: Part, queries: Labelled, factors: Factors, keys: Expansion
    ) -> torch.fx.Node:
        """Emit what of the queries meets a part of the keys, times its projection."""
        emit, axes, dim = self._emit, keys.elements.axes, queries.dim(factors.feature)
        node = queries.node
        if part.size != shape_of(node)[dim]:
            node = emit(aten.slice.Tensor, node, dim, part.start, part.start + part.size)
        if part.weights is None:
            return node
        index = {**keys.index, factors.feature: part.feature}
        operand = _operand(node, queries, index, axes)
        wanted = list(operand.layout)
        wanted[dim] = _channels(part, axes)
        weights = piece(part.weights, axes, emit)
        made = contracted(operand, weights, tuple(wanted), self._rearranger(axes), emit)
        return self._times(made, part)

    def _held(
        self, part: Part, held: Labelled, factors: Factors, found: Expansion
    ) -> torch.fx.Node:
        """Emit latents, or stored features, laid out like the keys or values."""
        axes, emit = found.elements.axes, self._emit
        wanted = list(_operand(held.node, held, found.index, axes).layout)
        wanted[held.dim(factors.feature)] = _channels(part, axes)
        stored = piece(part.place, axes, emit)
        node = self._rearranger(axes)(stored, tuple(wanted), whole=True)
        return emit.cast(node, value_of(held.node).dtype)

    def _projected(
        self, summed: torch.fx.Node, factors: Factors, values: Expansion
    ) -> torch.fx.Node:
        """Emit the output, from the weighted sum of latents."""
        (part,) = values.parts
        assert part.weights is not None
        axes, dim = values.elements.axes, factors.out.index(factors.feature)
        index = {**values.index, factors.feature: part.feature}
        out = _operand(factors.node, Labelled(factors.node, factors.out), index, axes)
        given = list(out.layout)
        given[dim] = _channels(part, axes)
        weights = piece(part.weights, axes, self._emit)
        operand = Operand(summed, tuple(given))
        made = contracted(operand, weights, out.layout, self._rearranger(axes), self._emit)
        return self._times(made, part)

    def _times(self, node: torch.fx.Node, part: Part) -> torch.fx.Node:
        factor = part.place.factor
        return node if factor == 1 else self._emit(aten.mul.Tensor, node, float(factor))

    def _rearranger(self, axes: Axes) -> Rearranger:
        return Rearranger(self._emit, axes, partial(_static_size, axes))


def _static_size(axes: Axes, axis: Axis) -> Size | None:
    size = axes.sizes[axis]
    return int(size) if size.is_Integer else None


def _operand(
    node: torch.fx.Node,
    labelled: Labelled,
    index: dict[int | str | None, Index],
    axes: Axes,
) -> Operand:
    """Return `node` as an operand with the labels of another. Raises `NoPiece` if it is none."""
    layout = layout_of(Labelled(node, labelled.labels), index, axes)
    if layout is None:
        raise NoPiece
    return Operand(node, tuple(layout))


def _channels(part: Part, axes: Axes) -> tuple[Axis, ...]:
    """Return the axes over the channels of a part. Raises `NoPiece` if it has no whole ones."""
    if part.channel == 0:
        return ()
    size = axes.product(axis for axis in part.channel.atoms(Axis))
    digits = axes.digits(part.channel, size)
    if digits is None:
        raise NoPiece
    return digits
