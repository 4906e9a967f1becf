"""Reading a prompt into a cache before `generate()`, all but its last token.

`generate()` finds the cache filled, as with a prefix that was kept, and begins with the last token.
That token is a step like those that follow: it brings the index up to date, or builds it.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from transformers import StaticCache

from lychee_compile.cache.lychee_cache import LycheeCache
from lychee_compile.generation.caches import ROOM, capacity
from lychee_compile.generation.compiled import CompiledForward, Forward
from lychee_compile.generation.request import Request, positions
from lychee_compile.generation.settings import CACHES, Settings

_IN_PLACE = (LycheeCache, StaticCache)
"""Caches that are written in place."""


class PromptReader:
    """Reads prompts of one model as its settings say."""

    def __init__(self, settings: Settings, compiled: CompiledForward, cuda: bool) -> None:
        self._compiled = compiled
        self._chunk, self._plain_until = settings.prefill_chunk, settings.plain_until
        self._notes_tokens = settings.notes_tokens and not cuda
        self._shares = settings.cache == CACHES[0] and not settings.stores_otherwise
        self._budget = settings.backend.budget
        self.pays = self._chunk is not None or self._notes_tokens or cuda
        """True if a prompt is better read here than by `generate()`: to be cut, to hand its tokens
        to the index, or to have the index built before the first step."""

    def shared(self, request: Request, cache: Any) -> int:
        """Return how many tokens of a prompt the rows of an empty `cache` are to share.

        They are 0 if rows would share nothing, or so little that a step reads all of it anyway. The
        prompt is made of tokens. Their number is one of eight for each power of two: calls of
        similar length then share what was compiled.
        """
        ids = request.ids
        if not self._shares or self._budget is None or not isinstance(cache, LycheeCache):
            return 0
        if ids is None or len(ids) > 1 or request.rows_each == 1 or int(cache.get_seq_length()):
            return 0
        before = ids.shape[1] - 2  # each row has a token of its own, and the last one is a step
        step = max(1 << max(before.bit_length() - 4, 0), 1)
        count = before // step * step
        return count if count > self._budget else 0

    @torch.no_grad()
    def read(self, request: Request, cache: Any, forward: Forward, shared: int = 0) -> None:
        """Read the prompt of a request, but for its last token, behind what `cache` holds.

        If rows are to share their first `shared` tokens, one row is read for all of them.
        """
        ids, mask = request.rows()
        if shared:
            ids, mask = ids[:1], None if mask is None else mask[:1]
        begin, end = int(cache.get_seq_length()), ids.shape[1] - 1
        inputs = _Inputs(request, cache, ids, mask)
        for first, last in pieces(begin, end, self._chunk, self._plain_until):
            call = self._call_for(last - first)
            if first == 0 and call is not _plainly and isinstance(cache, _IN_PLACE):
                _allocate(request.model, forward, inputs, cache)
            if isinstance(cache, LycheeCache):
                cache.reserve(last - first)
            call(request.model, forward, **inputs.of(first, last))
        if shared:
            room = capacity(end - shared + min(request.new_tokens or ROOM, ROOM))
            cache.share_prefix(shared, room)
            cache.batch_repeat_interleave(request.rows_each)

    def _call_for(self, count: int) -> Forward:
        if count == self._chunk:
            return self._compiled.chunk
        return self._compiled.rest if self._notes_tokens else _plainly


def _allocate(model: Any, forward: Forward, inputs: _Inputs, cache: Any) -> None:
    """Let an empty cache make its buffers outside of graphs: a graph would own those that it makes.

    Only a forward tells the shapes of all layers.
    """
    forward(model, **inputs.of(0, 1))
    cache.reset()


def _plainly(model: Any, forward: Forward, /, **inputs: Any) -> Any:
    return forward(model, **inputs)


def pieces(begin: int, end: int, chunk: int | None, plain_until: int = 0) -> list[tuple[int, int]]:
    """Cut a range of tokens into chunks; the odd piece comes first, where attention is cheapest.

    No chunk begins before `plain_until`: the odd piece is longer if need be.
    """
    if begin >= end:
        return []
    if chunk is None or end <= plain_until:
        return [(begin, end)]
    odd = (end - begin) % chunk
    odd += -(-max(plain_until - begin - odd, 0) // chunk) * chunk
    if begin + odd >= end:
        return [(begin, end)]
    cuts = [*([begin] if odd else []), *range(begin + odd, end + 1, chunk)]
    return list(pairwise(cuts))


class _Inputs:
    """The inputs of a forward for parts of a prompt."""

    def __init__(self, request: Request, cache: Any, ids: Any, mask: Any) -> None:
        known = inspect.signature(request.model.forward).parameters
        self._ids, self._mask = ids, mask
        self._positions = positions(ids, mask)
        assert request.cache_name is not None
        self._fixed: dict[str, Any] = {request.cache_name: cache, "use_cache": True}
        if "logits_to_keep" in known:
            self._fixed["logits_to_keep"] = 1

    def of(self, first: int, last: int) -> dict[str, Any]:
        """Return the inputs for tokens `first` to `last`, the end excluded."""
        inputs = {
            "input_ids": self._ids[:, first:last].contiguous(),
            "position_ids": self._positions[:, first:last].contiguous(),
            **self._fixed,
        }
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[:, :last].contiguous()
        return inputs
