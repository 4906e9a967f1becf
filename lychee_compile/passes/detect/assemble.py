"""Put together all that is known of an attention from the parts that were matched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import sympy
import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention, Products, Rejected, Stage, Unread
from lychee_compile.passes.detect.axis_roles import AxisFacts, Roles, assign
from lychee_compile.passes.detect.features import Features, features_of
from lychee_compile.passes.detect.joined_keys import JoinedKeys
from lychee_compile.passes.detect.operands import Operand, Place, deepest, places_behind, reader_of
from lychee_compile.passes.detect.score import Score
from lychee_compile.passes.detect.score_trace import Trace
from lychee_compile.passes.detect.scores import sum_up
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.region import (
    Order,
    overwritten_before,
    region_between,
    used_elsewhere,
)
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices, free_axes, plain
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.products import Product


@dataclass(frozen=True)
class GraphContext:
    """A graph, with everything that its attentions share."""

    gm: torch.fx.GraphModule
    order: Order
    names: Names
    written: frozenset[torch.fx.Node]
    """Nodes that make memory of which a part is later overwritten through a view."""
    parameters: dict[torch.fx.Node, bool] = field(default_factory=dict)

    def is_parameter(self, node: torch.fx.Node) -> bool:
        """True if `node` is a parameter of a module, perhaps in another shape."""
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
    """The nodes of an attention, with the indices at which the output reads them."""

    node: torch.fx.Node
    form: str
    weights: torch.fx.Node
    """The node that holds the weights; `node` if they have none of their own."""
    out: Indices
    score_dims: Indices
    """Index of each dimension of the scores, without that of the keys."""
    trace: Trace
    value: Place
    reader: torch.fx.Node
    """The product that reads the values."""
    keys: frozenset[Axis]
    base_two: bool = False
    is_causal: bool = False
    dropout: float = 0.0
    refused: Reason | None = None
    mixed: frozenset[Axis] = frozenset()
    """Axes of the weights that are summed up before their product with the values."""
    heads_first: bool = False
    """True if the dimensions are known to be batch, heads, tokens, features."""


def settle(
    parts: MatchedParts, elements: Elements, context: GraphContext
) -> Attention | Unread | Rejected:
    """Return the attention that the parts make, or why they make none.

    Raises `SplitAxis` if an axis must be taken apart first.
    """
    axes, trace = elements.axes, parts.trace
    chains = {
        "query": places_behind(trace.query.node, trace.query.indices, elements, casts=False),
        "key": places_behind(trace.key.node, trace.key.indices, elements, casts=True),
        "value": [
            place
            for place in places_behind(parts.value.node, parts.value.indices, elements, casts=True)
            if place.factor == 1
        ],
    }
    deep = {name: deepest(chain, axes) for name, chain in chains.items()}
    if any(each is None for each in deep.values()):
        return Rejected(parts.node, reasons.OPERANDS_LAYOUT(), Stage.OPERANDS)
    places = {name: each[0] for name, each in deep.items() if each}
    query, key, value = operands = tuple(each[1] for each in deep.values() if each)
    why = _misfit(parts, query, key, value)
    if why:
        return Rejected(parts.node, why, Stage.OPERANDS)
    features = _features(trace, parts.keys, axes, context)
    if features is None:
        return Rejected(parts.node, reasons.OVER_FEATURES(), Stage.OPERANDS)
    if parts.mixed or trace.mixed:
        return _mixed(parts, query.axes - key.axes - trace.inner, axes)
    score = sum_up(
        replace(trace, query=places["query"], key=places["key"]),
        elements,
        parts.keys,
        parts.base_two,
    )
    roles = _roles(parts, features, operands, score)
    output = Place(parts.node, parts.out, sympy.S.One).operand(axes)
    assert output is not None
    joined = JoinedKeys(parts.node, roles.key, elements, context.order)
    return Attention(
        node=parts.node,
        form=parts.form,
        axes=axes,
        roles=roles,
        query=query,
        key=key,
        value=value,
        output=output.layout,
        score=score,
        names=context.names,
        key_forms=_forms(chains["key"], places["key"], key, axes),
        parts=joined.parts(chains, places),
        is_causal=parts.is_causal,
        dropout=parts.dropout,
        products=_products(parts),
        refused=parts.refused or _entangled(parts, chains, places, context),
    )


def _products(parts: MatchedParts) -> Products | None:
    """Return the nodes of the products; None if scores come from several."""
    trace = parts.trace
    first: Product | None = trace.product
    if first is None:
        return None
    return Products(first.node, trace.query.node, trace.key.node, parts.reader, parts.value.node)


def _mixed(parts: MatchedParts, alone: frozenset[Axis], axes: Axes) -> Unread:
    """Return an attention whose scores or weights are mixed over heads, by the axes of its scores.

    `alone` are axes of queries that keys lack.
    """
    mixed = parts.trace.mixed or parts.mixed
    heads = plain(axes.product(mixed))
    assert parts.refused is not None
    return Unread(
        node=parts.node,
        form=parts.form,
        query_heads=heads,
        kv_heads=heads,
        head_dim=plain(axes.product(parts.trace.inner)),
        query_len=plain(axes.product(alone - mixed)),
        kv_len=plain(axes.product(parts.keys)),
        mask="not read",
        reason=parts.refused,
        by_design=False,
    )


def _forms(chain: list[Place], place: Place, key: Operand, axes: Axes) -> tuple[Operand, ...]:
    """Return the tensors that show the keys before they are repeated or changed, `key` last."""
    forms = [
        each.operand(axes)
        for each in chain[: chain.index(place)]
        if each.factor == place.factor and value_of(each.node).dtype == value_of(key.node).dtype
    ]
    return (*(form for form in forms if form is not None and form.axes == key.axes), key)


def _misfit(parts: MatchedParts, query: Operand, key: Operand, value: Operand) -> Reason | None:
    """Return why the operands are not those of an attention; None if they are."""
    inner = parts.trace.inner
    mixed = parts.mixed | parts.trace.mixed
    rows, out = free_axes(parts.score_dims) | mixed, free_axes(parts.out)
    shared = (key.axes | value.axes) & rows
    if not parts.keys <= key.axes or not parts.keys <= value.axes:
        return reasons.NOT_OVER_KEYS()
    if not key.axes <= shared | parts.keys | inner:
        return reasons.KEYS_DIFFER()
    if not query.axes <= rows | inner or query.axes & parts.keys:
        return reasons.QUERIES_DIFFER()
    if not rows <= out | mixed or not value.axes <= parts.keys | out:
        return reasons.WEIGHTS_SUMMED()
    return None


def _features(
    trace: Trace, keys: frozenset[Axis], axes: Axes, context: GraphContext
) -> Features | None:
    """Return the features of queries and keys; None if the keys themselves are features."""
    inner, is_parameter = trace.inner, context.is_parameter

    def behind(place: Place, past_tokens: bool) -> Features:
        return features_of(place.node, place.indices, axes, inner, is_parameter, past_tokens)

    query, key = behind(trace.query, False), behind(trace.key, False)
    # Features of one side that head_dim holds tell that the other side was projected over tokens.
    if query.made & inner and key.made & keys:
        key = behind(trace.key, True)
    elif key.made & inner and query.made.isdisjoint(inner | free_axes(trace.key.indices)):
        query = behind(trace.query, True)
    if keys & key.made:
        return None
    both = free_axes(trace.query.indices) & free_axes(trace.key.indices)
    hinted = (query.hinted | key.hinted) & both - inner
    return Features(query.made | key.made, hinted)


def _roles(
    parts: MatchedParts,
    features: Features,
    operands: tuple[Operand, ...],
    score: Score,
) -> Roles:
    """Return the role of each axis; `operands` are query, key and value."""
    query, key, value = operands
    rows = free_axes(parts.score_dims)
    dims = tuple(_axes_of(index) for index in parts.score_dims)
    made = features.made or None
    if parts.heads_first:  # [..., heads, query positions]
        made = frozenset(dims[-2]) if len(dims) > 1 else frozenset()
    hiding = [bias.operand for bias in score.biases if bias.hides]
    hiding += [mask.operand for mask in score.masks]
    facts = AxisFacts(
        query=query,
        key=key,
        value=value,
        rows=rows,
        keys=parts.keys,
        head_dim=parts.trace.inner,
        value_dim=tuple(
            axis for index in parts.out for axis in _axes_of(index) if axis not in rows
        ),
        score_dims=dims,
        masked=frozenset(axis for operand in hiding for axis in operand.axes),
        features=made,
        hinted=frozenset() if parts.heads_first else features.hinted,
    )
    return assign(facts)


def _axes_of(index: sympy.Expr) -> tuple[Axis, ...]:
    """Return the axes of an index, outermost first."""
    strides = [(_magnitude(index.coeff(axis)), str(axis), axis) for axis in index.atoms(Axis)]
    return tuple(axis for *_, axis in sorted(strides, reverse=True))


def _magnitude(stride: sympy.Expr) -> float:
    """Return a stride with all symbolic sizes taken to be large."""
    return float(stride.subs(dict.fromkeys(stride.free_symbols, 1009)))


def _entangled(
    parts: MatchedParts,
    chains: dict[str, list[Place]],
    places: dict[str, Place],
    context: GraphContext,
) -> Reason | None:
    """Return why no other operator can replace this dataflow; None if one can."""
    first: Product | None = parts.trace.product
    if first is None:
        return None
    region = region_between(first.node, parts.node, context.order)
    elsewhere = used_elsewhere(region, parts.node, parts.weights)
    if elsewhere:
        return elsewhere
    readers = {"query": first.node, "key": first.node, "value": parts.reader}
    reads = [
        (places[name].node, reader_of(chains[name], places[name], reader))
        for name, reader in readers.items()
    ]
    reads += [
        (step.other, step.node)
        for step in parts.trace.steps
        if isinstance(step.other, torch.fx.Node)
    ]
    if overwritten_before(parts.node, reads, context.order):
        return reasons.OPERAND_OVERWRITTEN()
    return None
