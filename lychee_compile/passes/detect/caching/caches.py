"""Bind the keys of an attention to their cache, and to the write of this call."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.detect.caching.token_writes import (
    RowSlots,
    Slots,
    Span,
    Tokens,
    TokenWrite,
    Writes,
    prefix_of,
    token_write,
    view_write,
)
from lychee_compile.passes.detect.caching.unbound import KeysWithoutCache
from lychee_compile.passes.detect.caching.unfolded import behind_views, dimension_in
from lychee_compile.passes.detect.caching.write_positions import NotBoundError, PositionReader
from lychee_compile.passes.detect.operands import Layout
from lychee_compile.passes.graph.aliasing import is_given, storage_of, written_by
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_operator,
    operator_of,
    output_place,
    outputs_of,
    same,
    scalar_of,
    shape_of,
    through_bits,
    through_copies,
)
from lychee_compile.passes.reasons import Reason


@dataclass(frozen=True)
class Watched:
    """A tensor beside the cache that keys are computed from, as a graph takes and gives it."""

    source: torch.fx.Node | None
    """The input, or the part of one, that holds it before the call; None if it begins here."""
    output: int | None = None
    """Position of the output that holds it after the call; None if that is the input."""
    page: int = field(default=0, compare=False)
    """Number of tokens of a page if the tensor is a table [B, P] of pages, else 0."""


@dataclass(frozen=True)
class CacheBinding:
    """A key cache as one graph sees it; sites that read the same keys have equal bindings."""

    key: torch.fx.Node
    """The tensor that holds the keys after this call's write."""
    token_dim: int
    """Dimension of `key` that runs over tokens."""
    kind: str
    """"static": of fixed size; "dynamic": grown by concatenation, an output."""
    source: torch.fx.Node | None
    """The input, or the part of one, that holds the cache before the call; None if a dynamic cache
    begins."""
    output: int | None
    """Position among the outputs of the graph of the cache after the call; None if it is written in
    place."""
    slots: Slots | None = None
    """Slots written; None: those that a dynamic cache grows by, or none."""
    tokens: Tokens | None = None
    """Number of tokens written; None if the graph only reads the cache."""
    outside_dim: int | None = None
    """Dimension of `source` and of the output that runs over tokens, if they have another shape
    than `key`; None otherwise."""
    in_front: int = field(default=0, compare=False)
    """Number of keys that the attention reads in front of those of the cache; 0 if `shared`."""
    shared: CacheBinding | None = field(default=None, compare=False)
    """Cache of the keys in front, if all rows share its memory; None if they do not."""
    load: Load | None = None
    """The keys as an expression of the cache and other tensors; None if `key` shows them."""
    watched: tuple[Watched, ...] = ()
    """The other tensors that the keys depend on."""
    values: Load | None = field(default=None, compare=False)
    """The values of the attention as such an expression; None if they are a tensor as it is."""
    first_token: sympy.Expr = sympy.S.Zero
    """Token of the attention in slot 0 of `key`: above 0 if `key` is the tail of a past."""

    @property
    def numbers(self) -> tuple[sympy.Symbol, ...]:
        """Sizes that only a call tells, in the expressions of keys and values, in one order."""
        found = {each for load in (self.load, self.values) if load for each in load.numbers}
        return tuple(sorted(found, key=str))

    @property
    def is_behind(self) -> bool:
        """True if the attention reads other keys in front of those of the cache."""
        return self.in_front > 0 or self.shared is not None

    @property
    def reads_only(self) -> bool:
        """True if the graph only reads the cache."""
        return self.tokens is None

    @property
    def tokens_written(self) -> int | torch.SymInt:
        """Number of tokens that a call writes; 0 if it only reads."""
        if not isinstance(self.tokens, tuple):
            return self.tokens or 0
        node, dim = self.tokens
        return shape_of(node)[dim]


@dataclass(frozen=True)
class Unbound:
    """Keys whose cache was not recognised."""

    kind: str
    """"none", or "sliding": a cache that keeps a window of keys only."""
    reason: Reason


def find_writes(graph: torch.fx.Graph) -> Writes:
    """Return all writes of a graph, in order."""
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        for target in written_by(node):
            found.setdefault(storage_of(target), []).append(node)
    return found


def bind_cache(attention: Attention, writes: Writes) -> CacheBinding | Unbound:
    """Return the cache that the keys of `attention` are read from, or why none was recognised."""
    met = []
    for key in reversed(attention.key_forms):
        places = [
            dim for dim, axes in enumerate(key.layout) if set(axes) & set(attention.roles.key)
        ]
        if len(places) != 1 or key.layout[places[0]] != attention.roles.key:
            continue
        try:
            batch = _batch_dim(key.layout, attention)
            return _Binder(key.node, attention, writes, (places[0], batch)).bind()
        except NotBoundError as error:
            met.append(Unbound(error.kind, error.reason))
    nearer = [each for each in met if each.reason.code != reasons.NO_CACHE.code]
    if nearer:
        return nearer[0]
    explain = KeysWithoutCache(attention.node.graph, writes)
    return Unbound("none", explain.reason(attention.key.node, attention.kv_len))


def bind_tensor(
    tensor: torch.fx.Node,
    dims: tuple[int, int | None],
    attention: Attention,
    writes: Writes,
) -> CacheBinding | Unbound:
    """Return the cache that `tensor` shows, which the keys of `attention` are computed from.

    `dims` are its dimensions that run over tokens and over rows; None if no dimension runs over
    rows alone.
    """
    try:
        return _Binder(tensor, attention, writes, dims).bind()
    except NotBoundError as error:
        return Unbound(error.kind, error.reason)


def is_held(node: torch.fx.Node, writes: Writes) -> bool:
    """True if `node` is a cache that the graph writes, after the write, or one that it grows."""
    node = through_bits(node)
    if is_given(node):
        return node in writes
    if operator_of(node).write is not None or calls(node, aten.copy_.default):
        return True
    return is_operator(node, "cat") and output_place(node) is not None


def _batch_dim(layout: Layout, attention: Attention) -> int | None:
    """Return the dimension that runs over the rows of a batch alone; None if there is none."""
    batch = attention.roles.batch
    return layout.index(batch) if batch and batch in layout else None


class _Binder:
    def __init__(
        self,
        key: torch.fx.Node,
        attention: Attention,
        writes: Writes,
        dims: tuple[int, int | None],
    ) -> None:
        """Bind `key`, whose dimensions `dims` run over tokens and over rows."""
        graph = attention.node.graph
        self._key, self._attention, self._writes = key, attention, writes
        self._dim, self._batch = dims
        self._explain = KeysWithoutCache(graph, writes)
        self._reader = PositionReader(graph, frozenset(writes))

    def _write_at(self, node: torch.fx.Node) -> TokenWrite | None:
        """Return the tokens that `node` writes; None if it writes none. Raises `NotBoundError`."""
        found = token_write(node, self._dim, self._reader)
        if found is not None and found.rows not in (None, self._batch):
            raise NotBoundError(reasons.CACHE_ROWS_APART())
        return found

    def bind(self) -> CacheBinding:
        holder = self._behind_prefixes(self._key)
        if is_operator(holder, "cat"):
            return self._grown(holder)
        if is_given(holder):
            return self._read(holder)
        if calls(holder, aten.copy_.default) and is_given(first_input(holder)):
            return self._read(first_input(holder))
        write = self._write_at(holder)
        if write is not None:
            return self._written(holder, write)
        if self._explain.rolls(holder):
            raise NotBoundError(reasons.CACHE_ROLLS(), "sliding")
        if self._explain.cuts_cache(holder):
            raise NotBoundError(reasons.CACHE_SLICED(), "sliding")
        output = output_place(holder)
        if output is None or self._from_cache(holder):
            raise NotBoundError(reasons.NO_CACHE())
        return CacheBinding(
            self._key, self._dim, "dynamic", None, output, tokens=(holder, self._dim)
        )

    def _from_cache(self, node: torch.fx.Node) -> bool:
        """True if keys are computed from a cache, and so are not the first of a new one."""
        attention = self._attention
        if attention.query_len == attention.kv_len:
            return False
        return self._explain.reads_cache(node, attention.kv_len)

    def _behind_prefixes(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the node behind slices that take the first entries of a dimension."""
        node = through_bits(node)
        while (source := prefix_of(node)) is not None and self._holds_cache(source):
            node = through_bits(source)
        return node

    def _holds_cache(self, node: torch.fx.Node) -> bool:
        node = through_bits(node)
        if prefix_of(node) is not None:
            return self._holds_cache(first_input(node))
        if is_given(node) or operator_of(node).write is not None:
            return True
        return calls(node, aten.copy_.default) or self._write_at(node) is not None

    def _written(self, node: torch.fx.Node, write: TokenWrite) -> CacheBinding:
        """Return the binding of a cache to which `node` writes tokens, in place or not."""
        cache = through_bits(write.cache)
        if self._explain.rolls(cache):
            raise NotBoundError(reasons.CACHE_ROLLS(), "sliding")
        in_place, output = bool(written_by(node)), None
        writes = self._writes.get(cache, [])
        if not in_place and not self._copied_back(node, cache):
            output = output_place(node)
            if output is None:
                raise NotBoundError(reasons.CACHE_NOT_RETURNED())
        known = [node] if in_place else writes[:1] if output is None else []
        if not is_given(cache) and (part := self._explain.part_of(cache)):
            raise NotBoundError(part)
        if not is_given(cache) or writes != known:
            raise NotBoundError(reasons.CACHE_NOT_INPUT())
        return self._static(cache, write.slots, write.tokens, output, node)

    def _copied_back(self, node: torch.fx.Node, cache: torch.fx.Node) -> bool:
        """True if the first write to `cache` replaces it by `node`."""
        write = next(iter(self._writes.get(cache, [])), None)
        if not calls(write, aten.copy_.default):
            return False
        assert write is not None
        fresh = write.args[1]
        whole = first_input(write) is cache and isinstance(fresh, torch.fx.Node)
        return whole and through_copies(fresh) is node  # type: ignore[arg-type]

    def _static(
        self,
        cache: torch.fx.Node,
        slots: Slots,
        tokens: Tokens,
        output: int | None,
        write: torch.fx.Node,
    ) -> CacheBinding:
        """Return the binding of a cache of fixed size, if `slots` still name what was written."""
        named = slots.node if isinstance(slots, RowSlots) else slots
        later = [] if isinstance(named, Span) else self._writes.get(storage_of(named), [])
        if any(write < each and each < self._attention.node for each in later):
            raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
        return CacheBinding(self._key, self._dim, "static", cache, output, slots, tokens)

    def _read(self, cache: torch.fx.Node) -> CacheBinding:
        """Return the binding of a cache that is written through a view of it, or not at all."""
        writes = self._writes.get(cache, [])
        if not writes:
            return CacheBinding(self._key, self._dim, "static", cache, None)
        (write, *more) = writes
        tokens = None if more or self._attention.node < write else self._through_view(write, cache)
        if tokens is not None:
            return self._static(cache, tokens.slots, tokens.tokens, None, write)
        if more or not calls(write, aten.copy_.default):
            raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
        if self._attention.node < write:
            raise NotBoundError(reasons.CACHE_WRITTEN_LATE())
        target, fresh = first_input(write), write.args[1]
        if target is cache and isinstance(fresh, torch.fx.Node):
            return self._replaced(cache, through_copies(fresh), write)
        found = view_write(write, cache, self._dim)
        if found is None:
            raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
        return self._static(cache, *found, None, write)

    def _through_view(self, write: torch.fx.Node, cache: torch.fx.Node) -> TokenWrite | None:
        """Return the tokens that `write` writes to the bits of all of `cache`; None if it does not.

        cache.view(uint8).index_copy_(2, positions, new.view(uint8))
        """
        if operator_of(write).write is None or through_bits(first_input(write)) is not cache:
            return None
        return self._write_at(write)

    def _replaced(
        self, cache: torch.fx.Node, fresh: torch.fx.Node, copy: torch.fx.Node
    ) -> CacheBinding:
        """Return the binding of a cache that `copy` replaces by `fresh`."""
        if self._explain.rolls(fresh):
            raise NotBoundError(reasons.CACHE_ROLLS(), "sliding")
        write = self._write_at(fresh)
        if write is None or write.cache is not cache:
            raise NotBoundError(reasons.CACHE_REPLACED())
        return self._static(cache, write.slots, write.tokens, None, copy)

    def _grown(self, key: torch.fx.Node) -> CacheBinding:
        parts = argument(key, "tensors")
        if argument(key, "dim", 0) % len(shape_of(key)) != self._dim:
            raise NotBoundError(reasons.NO_CACHE())
        output = output_place(key)
        if output is None:
            return self._unfolded(key, parts) or self._put_together(key, parts)
        if len(parts) != 2:
            raise NotBoundError(reasons.CACHE_GROWS_IN_PIECES())
        past = through_copies(parts[0])
        if past.op == "placeholder":
            source = past
        elif self._is_empty(past, key):
            source = None
        elif behind_views(past).op == "placeholder":
            raise NotBoundError(reasons.CACHE_RESHAPED())
        else:
            raise NotBoundError(reasons.CACHE_PAST_NOT_INPUT())
        return CacheBinding(
            self._key, self._dim, "dynamic", source, output, tokens=(parts[1], self._dim)
        )

    def _unfolded(self, key: torch.fx.Node, parts: list[torch.fx.Node]) -> CacheBinding | None:
        """Return the binding of a cache that is given and returned in another shape than `key`.

        keys = cat((past.view(rows * heads, tokens, features), new), 1)
        return keys.view(rows, heads, tokens + 1, features)

        Raises `NotBoundError` if it is not returned in the shape in which it is given.
        """
        source = behind_views(parts[0])
        if len(parts) != 2 or source.op != "placeholder":
            return None
        before = dimension_in(parts[0], source, self._dim)
        returned = False
        for place, node in enumerate(outputs_of(key.graph)):
            if not isinstance(node, torch.fx.Node) or behind_views(node) is not key:
                continue
            returned = True
            alike = before is not None and len(shape_of(node)) == len(shape_of(source))
            if alike and dimension_in(node, key, before) == self._dim:  # type: ignore[arg-type]
                tokens = (parts[1], self._dim)
                return CacheBinding(
                    self._key, self._dim, "dynamic", source, place, None, tokens, before
                )
        if returned:
            raise NotBoundError(reasons.CACHE_RESHAPED())
        return None

    def _is_empty(self, past: torch.fx.Node, key: torch.fx.Node) -> bool:
        """True if the tensor that `key` begins with has no tokens."""
        sizes = shape_of(past)
        return same(sizes[0], 0) or (len(sizes) == len(shape_of(key)) and same(sizes[self._dim], 0))

    def _put_together(self, key: torch.fx.Node, parts: list[torch.fx.Node]) -> CacheBinding:
        """Return the binding of keys that are a static cache up to the tokens of this call.

        keys = cat((cache[:, :, :begin], new), 2)
        cache[:, :, begin:end] = new
        """
        cache = prefix_of(parts[0], self._dim) if len(parts) == 2 else None
        writes = [] if cache is None else self._writes.get(cache, [])
        if cache is not None and is_given(cache) and len(writes) == 1:
            found = self._begins_at(writes[0], cache, parts)
            if found is not None:
                return self._static(cache, found, (parts[1], self._dim), None, key)
        if self._explain.rolls(key) or self._explain.keeps_part(key):
            raise NotBoundError(reasons.CACHE_KEEPS_PART(), "sliding")
        raise NotBoundError(reasons.NO_CACHE())

    def _begins_at(
        self, write: torch.fx.Node, cache: torch.fx.Node, parts: list[torch.fx.Node]
    ) -> Span | None:
        """Return the slots that `write` fills if it puts `parts[1]` behind `parts[0]`."""
        if not calls(write, aten.copy_.default) or write.args[1] is not parts[1]:
            return None
        found = view_write(write, cache, self._dim)
        if found is None:
            return None
        held, begin = shape_of(parts[0])[self._dim], scalar_of(found[0].start)
        return found[0] if scalar_of(held) == begin else None
