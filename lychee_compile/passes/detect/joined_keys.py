"""Tell keys in front from those behind them, if keys and values are concatenations of both.

keys = cat((memory_keys, cache_keys), 2)            [B, H, 4 + L, D]
values = cat((memory_values, cache_values), 2)
out = scaled_dot_product_attention(query, keys, values, mask)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx

from lychee_compile.passes.detect.attention import KeyPart
from lychee_compile.passes.detect.operands import Operand, Place, places_behind, reader_of
from lychee_compile.passes.graph.dataflow import argument, is_operator, same, shape_of
from lychee_compile.passes.graph.region import Order, overwritten_before
from lychee_compile.passes.symbolic.axes import Axis, Index, SplitAxis, free_axes
from lychee_compile.passes.symbolic.elements import Elements

Chains = Mapping[str, list[Place]]
SIDES = ("front", "behind")


class JoinedKeys:
    """Splits the keys and values of one attention, which has the node `attends`."""

    def __init__(
        self, attends: torch.fx.Node, keys: tuple[Axis, ...], elements: Elements, order: Order
    ) -> None:
        self._attends, self._keys, self._elements, self._order = attends, keys, elements, order

    def parts(self, chains: Chains, places: Mapping[str, Place]) -> tuple[KeyPart, ...]:
        """Return the keys in front and those behind; nothing if there are no two such parts.

        `chains` are the tensors that show all keys or values, nearest first, and `places` those
        that the attention is known by.
        """
        last = {name: chains[name][-1] for name in ("key", "value")}
        joined = all(
            is_operator(place.node, "cat") and place.factor == places[name].factor
            for name, place in last.items()
        )
        if not joined or len(self._keys) != 1:
            return ()
        try:
            found = [self._part(number, last) for number in range(len(SIDES))]
        except SplitAxis:
            return ()
        parts = tuple(each for each in found if each is not None)
        return parts if len(parts) == len(SIDES) else ()

    def _part(self, number: int, joined: Mapping[str, Place]) -> KeyPart | None:
        """Return one of the two parts; None if it is not understood, or overwritten too soon."""
        axes = self._elements.axes
        size = _size_of_part(joined["key"], self._keys[0], number)
        other = _size_of_part(joined["value"], self._keys[0], number)
        if size is None or other is None or axes.size(size) != axes.size(other):
            return None
        index = axes.index(f"{self._keys[0]}_{SIDES[number]}", size)
        key_forms = self._forms(joined["key"], number, index)
        values = self._forms(joined["value"], number, index)
        if not key_forms or not values:
            return None
        return KeyPart(tuple(free_axes([index])), key_forms, values[-1])

    def _forms(self, joined: Place, number: int, index: Index) -> tuple[Operand, ...]:
        """Return all tensors that show a part of `joined`, in which `index` runs over the keys."""
        node = argument(joined.node, "tensors")[number]
        inside = tuple(each.xreplace({self._keys[0]: index}) for each in joined.indices)
        chain = places_behind(node, inside, self._elements, casts=False)
        found = [(place, place.operand(self._elements.axes)) for place in chain]
        first = found[0][1]
        if first is None or self._overwritten(chain, chain[0], joined.node):
            return ()
        return tuple(
            form
            for place, form in found
            if form is not None
            and form.axes <= first.axes  # rows of a batch may share it
            and place.factor == 1
            and not self._overwritten(chain, place, joined.node)
        )

    def _overwritten(self, chain: list[Place], place: Place, cat: torch.fx.Node) -> bool:
        """True if the memory of `place` changes after `cat` has read it, before the attention."""
        reads = [(place.node, reader_of(chain, place, cat))]
        return overwritten_before(self._attends, reads, self._order)


def _size_of_part(joined: Place, keys: Axis, number: int) -> int | torch.SymInt | None:
    """Return the number of keys of a part; None unless two parts are joined along the keys.

    A part without keys, as an empty cache of one dimension, is none.
    """
    tensors = argument(joined.node, "tensors")
    dim = argument(joined.node, "dim", 0) % len(joined.indices)
    if len(tensors) != len(SIDES) or joined.indices[dim] != keys:
        return None
    sizes = shape_of(tensors[number])
    return None if len(sizes) != len(joined.indices) or same(sizes[dim], 0) else sizes[dim]
