"""Read keys or values as parts along their features: projections of latents, and stored numbers.

k = cat((einsum("btc,hcd->bhtd", latent, up), rotary), -1)
k[b, h, kv, d] = sum over c of latent[b, kv, c] up[h, c, d]      d < D
                 rotary[b, kv, d - D]                            d >= D
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch.fx

from lychee_compile.passes.absorb.operands import Factors, indices_of
from lychee_compile.passes.detect.operands import Place, places_behind
from lychee_compile.passes.graph.dataflow import argument, is_operator, shape_of
from lychee_compile.passes.symbolic.axes import Axis, Index, free_axes
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.products import Label, product_of


@dataclass(frozen=True)
class Part:
    """Features `start` to `start + size` of keys or values."""

    start: int
    size: int
    feature: Index
    """Index over these features."""
    place: Place
    """Latents, or a tensor that holds the features as they are."""
    channel: Index
    """Index over the channels of `place`: `feature` itself if they are the features."""
    reader: torch.fx.Node
    """Operator that reads `place`."""
    weights: Place | None = None
    """Projection of the latents to the features; None if there is none."""


@dataclass(frozen=True)
class Expansion:
    """Keys or values as parts along their features."""

    index: dict[Label | None, Index]
    """Index over each label of the product."""
    parts: tuple[Part, ...]
    elements: Elements

    @property
    def is_projected(self) -> bool:
        """True if a part is a projection of latents."""
        return any(part.weights for part in self.parts)


def expansion_of(factors: Factors, elements: Elements) -> Expansion | None:
    """Return the keys or values of a product as parts; None if they are not understood.

    Raises `SplitAxis` if an axis must be taken apart first.
    """
    axes, held = elements.axes, factors.tokens
    size = held.sizes()[factors.feature]
    if not isinstance(size, int) or size == 1:
        return None
    index = factors.indexed(axes)
    place = Place(held.node, indices_of(held, index), sympy.S.One)
    feature = index[factors.feature]
    whole = Part(0, size, feature, place, feature, factors.node)
    others = free_axes(index[label] for label in factors.other.labels)
    tokens = free_axes(place.indices) - others - free_axes([feature])
    reading = _Reading(elements, tokens)
    parts = tuple(reading.parts(whole))
    return Expansion(index, parts, elements) if parts and reading.is_understood else None


class _Reading:
    """The way back from keys or values; `tokens` are the axes over them."""

    def __init__(self, elements: Elements, tokens: frozenset[Axis]) -> None:
        self._elements, self._tokens = elements, tokens
        self.is_understood = True

    def parts(self, part: Part) -> Iterator[Part]:
        """Yield the parts that `part` consists of, in order."""
        places = places_behind(part.place.node, part.place.indices, self._elements, casts=True)
        last = places[-1]
        opaque = self._elements.is_opaque(last.node)
        if not opaque and is_operator(last.node, "cat"):
            dim = argument(last.node, "dim", 0) % len(last.indices)
            if last.factor == 1 and free_axes([last.indices[dim]]) == free_axes([part.feature]):
                yield from self._joined(part, last, dim)
                return
        projected = None if opaque else self._projected(part, last)
        yield projected or part

    def _joined(self, part: Part, joined: Place, dim: int) -> Iterator[Part]:
        """Yield the parts of features that several tensors hold side by side along `dim`."""
        first = sympy.expand(joined.indices[dim] - part.feature)
        sizes = [shape_of(each)[dim] for each in argument(joined.node, "tensors")]
        if not first.is_Integer or not all(isinstance(size, int) for size in sizes):
            self.is_understood = False
            return
        begin = 0
        for tensor, size in zip(argument(joined.node, "tensors"), sizes, strict=True):
            low = max(int(first), begin)
            high = min(int(first) + part.size, begin + int(size))
            if low < high:
                yield from self.parts(self._within(part, joined, dim, (tensor, low, high, begin)))
            begin += int(size)

    def _within(
        self, part: Part, joined: Place, dim: int, span: tuple[torch.fx.Node, int, int, int]
    ) -> Part:
        """Return the features from `low` to `high` of joined tensors, of which one begins there."""
        tensor, low, high, begin = span
        start = part.start + low - int(sympy.expand(joined.indices[dim] - part.feature))
        feature = self._elements.axes.index(f"{start}to", high - low)
        indices = list(joined.indices)
        indices[dim] = feature + low - begin
        place = Place(tensor, tuple(indices), joined.factor)
        return Part(start, high - low, feature, place, feature, joined.node)

    def _projected(self, part: Part, made: Place) -> Part | None:
        """Return a part as a projection of latents; None if it is none.

        Latents have an entry for each token and none for a feature, and the projection is the same
        for all tokens.
        """
        product = product_of(made.node)
        if product is None or product.added is not None or product.alpha != 1:
            return None
        axes, name = self._elements.axes, made.node.name
        sizes = product.inner_sizes()
        if len(sizes) != 1 or not isinstance(sizes[0], int):
            return None
        channel = axes.index(f"{name}.c", sizes[0])
        left, right = product.operand_indices(made.indices, [channel])
        latents = Place(product.left, left, made.factor)
        weights = Place(product.right, right, made.factor)
        if not free_axes(latents.indices) & self._tokens:
            latents, weights = weights, latents
        features = free_axes([part.feature])
        held, fixed = free_axes(latents.indices), free_axes(weights.indices)
        if not self._tokens <= held or held & features or fixed & self._tokens:
            return None
        if not features <= fixed or channel == 0:
            return None
        return replace(part, place=latents, channel=channel, reader=made.node, weights=weights)


def saves(expansion: Expansion, factors: Factors) -> bool:
    """True if it takes fewer products to attend over latents than to project them first.

    Projecting a key of D features from C channels takes C D products, and each of the T queries
    that read it takes D more. Over latents each query takes C. So T (C - D) < C D must hold: as
    a rule it does for one query of decoding, and does not for the queries of a prefill.
    """
    axes = expansion.elements.axes
    rows = free_axes(expansion.index[label] for label in factors.other.labels)
    for part in expansion.parts:
        if part.weights is None:
            continue
        shared = free_axes(part.place.indices) | free_axes(part.weights.indices)
        queries, channels = axes.product(rows - shared), axes.product(free_axes([part.channel]))
        if not (queries * (channels - part.size) - channels * part.size).is_negative:
            return False
    return True
