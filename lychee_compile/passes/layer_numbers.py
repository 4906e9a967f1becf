"""Number the attentions of a graph, for `dense_layers`: how many layers come before each.

A graph may be a whole model, or one of its layers, if layers are compiled on their own or the graph
breaks between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lychee_compile.passes.detect.attention import Attention, Unread
from lychee_compile.passes.graph.dataflow import module_path

ATTRIBUTES = ("layer_idx", "layer_id", "layer_index")
"""Attributes by which modules know the number of their layer."""
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")


def layer_numbers(
    attentions: Sequence[Attention | Unread], traced_for: frozenset[int]
) -> list[int | None]:
    """Return the number of layers before each attention; None if nothing tells it.

    `traced_for` are the layer numbers that Dynamo compiled the graph for, read from attributes of
    modules. Attentions of several layers are counted in their order, as the layers of a model.
    """
    found = [_LAYER.findall(module_path(each.node)) for each in attentions]
    named = {int(numbers[-1]) for numbers in found if numbers}
    layers = named or traced_for
    if len(layers) == 1:
        (first,) = layers
        return [first + place for place in range(len(attentions))]
    if len(attentions) == 1:
        return [None]
    return list(range(len(attentions)))
