"""From the pieces of an attention, however they were found, to all that is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import sympy
import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention, Rejected, Stage
from lychee_compile.passes.detect.axis_roles import Roles, assign, features_of
from lychee_compile.passes.detect.operands import (
    Operand,
    Place,
    deepest,
    free_axes,
    places_behind,
    reader_of,
)
from lychee_compile.passes.detect.products import Product
from lychee_compile.passes.detect.score_trace import Trace
from lychee_compile.passes.detect.scores import Score, sum_up
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.region import (
    Order,
    overwritten_before,
    region_between,
    used_elsewhere,
)
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices
from lychee_compile.passes.symbolic.elements import Elements


@dataclass(frozen=True)
class GraphContext:
    """A graph, and what all its attentions share."""

    gm: torch.fx.GraphModule
    order: Order
    names: Names
    written: frozenset[torch.fx.Node]
    """Memory made in the graph and written to behind the back of its node."""
    parameters: dict[torch.fx.Node, bool] = field(default_factory=dict)

    def is_parameter(self, node: torch.fx.Node) -> bool:
        """Whether `node` is a parameter of a module, in whatever shape."""
        if node not in self.parameters:
            self.parameters[node] = self._shows_parameter(node)
        return self.parameters[node]

    def _shows_parameter(self, node: torch.fx.Node) -> bool:
        source = torch_private.is_parameter
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node.op in ("placeholder", "get_attr") and source(node)


@dataclass(frozen=True)
class MatchedParts:
    """An attention as it was found: nodes, and their indices in axes of the output."""

    node: torch.fx.Node
    form: str
    weights: torch.fx.Node
    """Whatever holds the weights; the node itself where they have no node."""
    out: Indices
    score_dims: Indices
    """Index of each dimension of the scores but that of the keys."""
    trace: Trace
    value: Place
    reader: torch.fx.Node
    """The product that reads the values."""
    keys: frozenset[Axis]
    base_two: bool = False
    is_causal: bool = False
    dropout: float = 0.0
    refused: Reason | None = None
    heads_first: bool = False
    """Whether dimensions are known to be batch, heads, tokens, features."""


def settle(pieces: MatchedParts, elements: Elements, scene: GraphContext) -> Attention | Rejected:
    """Put the pieces together. Raises `SplitAxis` where an axis must be taken apart first."""
    axes, trace = elements.axes, pieces.trace
    chains = {
        "query": places_behind(trace.query.node, trace.query.indices, elements, casts=False),
        "key": places_behind(trace.key.node, trace.key.indices, elements, casts=True),
        "value": [
            place
            for place in places_behind(
                pieces.value.node, pieces.value.indices, elements, casts=True
            )
            if place.factor == 1
        ],
    }
    found = {name: deepest(chain, axes) for name, chain in chains.items()}
    rows = free_axes(pieces.score_dims)
    if any(each is None for each in found.values()):
        return Rejected(pieces.node, reasons.OPERANDS_LAYOUT(), Stage.OPERANDS)
    places = {name: each[0] for name, each in found.items() if each}
    query, key, value = (each[1] for each in found.values() if each)
    shared = (key.axes | value.axes) & rows
    why = _misfit(pieces, query, key, value, shared, rows)
    if why:
        return Rejected(pieces.node, why, Stage.OPERANDS)
    features = _features(trace, axes, scene)
    if features is not None and pieces.keys & features[1]:
        return Rejected(pieces.node, reasons.OVER_FEATURES(), Stage.OPERANDS)
    score = sum_up(
        replace(trace, query=places["query"], key=places["key"]),
        elements,
        pieces.keys,
        pieces.base_two,
    )
    made = None if features is None else features[0]
    roles = _roles(pieces, shared, rows, made, (query, key, value), score)
    output = Place(pieces.node, pieces.out, sympy.S.One).operand(axes)
    assert output is not None
    return Attention(
        node=pieces.node,
        form=pieces.form,
        axes=axes,
        roles=roles,
        query=query,
        key=key,
        value=value,
        output=output.layout,
        score=score,
        names=scene.names,
        key_forms=_forms(chains["key"], places["key"], key, axes),
        is_causal=pieces.is_causal,
        dropout=pieces.dropout,
        refused=pieces.refused or _entangled(pieces, chains, places, scene),
    )


def _forms(chain: list[Place], place: Place, key: Operand, axes: Axes) -> tuple[Operand, ...]:
    """What shows the keys before they are repeated or changed, `key` last."""
    forms = [
        each.operand(axes)
        for each in chain[: chain.index(place)]
        if each.factor == place.factor and value_of(each.node).dtype == value_of(key.node).dtype
    ]
    return (*(form for form in forms if form is not None and form.axes == key.axes), key)


def _misfit(
    pieces: MatchedParts, query: Operand, key: Operand, value: Operand,
    shared: frozenset[Axis], rows: frozenset[Axis],
) -> Reason | None:  # fmt: skip
    """Return why the operands are not those of an attention; None if they are."""
    inner = pieces.trace.inner
    out = free_axes(pieces.out)
    if not pieces.keys <= key.axes or not pieces.keys <= value.axes:
        return reasons.NOT_OVER_KEYS()
    if not key.axes <= shared | pieces.keys | inner:
        return reasons.KEYS_DIFFER()
    if not query.axes <= rows | inner or query.axes & pieces.keys:
        return reasons.QUERIES_DIFFER()
    if not rows <= out or not value.axes <= pieces.keys | out:
        return reasons.WEIGHTS_SUMMED()
    return None


def _features(
    trace: Trace, axes: Axes, scene: GraphContext
) -> tuple[frozenset[Axis], frozenset[Axis]] | None:
    """Axes that projections of queries or keys make, and those that projections of keys make."""
    query, key = (
        features_of(place.node, place.indices, axes, trace.inner, scene.is_parameter)
        for place in (trace.query, trace.key)
    )
    if query is None and key is None:
        return None
    return (query or frozenset()) | (key or frozenset()), key or frozenset()


def _roles(
    pieces: MatchedParts, shared: frozenset[Axis], rows: frozenset[Axis],
    features: frozenset[Axis] | None, operands: tuple[Operand, Operand, Operand], score: Score,
) -> Roles:  # fmt: skip
    query, key, value = operands
    dims = [_axes_of(index) for index in pieces.score_dims]
    if pieces.heads_first:  # [..., heads, query positions]
        features = frozenset(dims[-2]) if len(dims) > 1 else frozenset()
    hiding = [bias.operand for bias in score.biases if bias.hides]
    hiding += [mask.operand for mask in score.masks]
    masked = frozenset(axis for operand in hiding for axis in operand.axes)
    order = [axis for index in pieces.out for axis in _axes_of(index)]
    value_dim = [axis for axis in order if axis not in rows]
    return assign(
        shared,
        rows - shared,
        features,
        key,
        value,
        query,
        dims,
        pieces.keys,
        pieces.trace.inner,
        value_dim,
        masked,
    )


def _axes_of(index: sympy.Expr) -> tuple[Axis, ...]:
    """The axes of an index, outermost first."""
    strides = [(_magnitude(index.coeff(axis)), str(axis), axis) for axis in index.atoms(Axis)]
    return tuple(axis for *_, axis in sorted(strides, reverse=True))


def _magnitude(stride: sympy.Expr) -> float:
    """How large a stride is when symbolic sizes are."""
    return float(stride.subs(dict.fromkeys(stride.free_symbols, 1009)))


def _entangled(
    pieces: MatchedParts,
    chains: dict[str, list[Place]],
    places: dict[str, Place],
    scene: GraphContext,
) -> Reason | None:
    """Return why no other operator can replace this dataflow; None if one can."""
    first: Product | None = pieces.trace.product
    if first is None:
        return None
    region = region_between(first.node, pieces.node, scene.order)
    elsewhere = used_elsewhere(region, pieces.node, pieces.weights)
    if elsewhere:
        return elsewhere
    readers = {"query": first.node, "key": first.node, "value": pieces.reader}
    reads = [
        (places[name].node, reader_of(chains[name], places[name], reader))
        for name, reader in readers.items()
    ]
    reads += [
        (step.other, step.node)
        for step in pieces.trace.steps
        if isinstance(step.other, torch.fx.Node)
    ]
    if overwritten_before(pieces.node, reads, scene.order):
        return reasons.OPERAND_OVERWRITTEN()
    return None
