"""One layer of a cache that grows in place: static to compiled graphs, views outside of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lychee_compile.cache.number_formats import bits
from lychee_compile.cache.storage import Storage
from lychee_compile.cache.stored_layer import StoredLayer, mark_static
from lychee_compile.kernels.host_memory import note_filled
from lychee_compile.kernels.sizes import whole_scans

ROOM = 1024
"""Least number of free slots when a cache chooses its own capacity."""

_ENCODER_KEYS = (
    "a LycheeCache with storage= or dtype= got the keys of an encoder, which cross-attention reads "
    "as they are held: pass EncoderDecoderCache(LycheeCache(...), DynamicCache())"
)
_OF_TWO_KINDS = (
    "a LycheeCache got the keys of a decoder and those of an encoder: for encoder-decoder models "
    "pass EncoderDecoderCache(LycheeCache(model.config), DynamicCache())"
)


@dataclass
class Shared:
    """State that the growing layers of one cache share, all of it known to the host."""

    slots: int
    """Capacity of every layer."""
    storage: Storage = field(default_factory=Storage)
    """Memory and form in which layers hold their keys and values."""
    at_most: int = 0
    """Upper bound of the number of tokens: those counted last and all announced since."""
    shown: int | None = None
    """Number of slots that the mask of the next forward covers; None: all."""
    eager_steps: int = 0
    """Number of single tokens decoded eagerly since the last compiled step."""
    graph_made: bool = False
    """True if buffers were allocated inside a compiled graph, which may reuse their memory."""
    encoder_decoder: bool = False
    """True if the model has an encoder, whose keys a cache may be given too."""
    announced: int | None = None
    """Number of tokens that the mask of this forward is for, if `encoder_decoder`; None before."""

    @property
    def holds_encoder(self) -> bool:
        """True if the cache holds the keys of an encoder: no mask of a decoder asks for its size.

        Cross-attention reads its buffers as they are, so that they have no free slots.
        """
        return self.encoder_decoder and self.announced is None


class GrowingLayer(StoredLayer):
    """Keys and values [B, Hkv, slots, D] of one layer: a `StaticLayer` that can get more slots.

    In a compiled graph it is a `StaticLayer`: whole buffers, written at positions that a device
    tensor counts. Outside of graphs it returns views of the filled slots.

    The rows of a batch may share their first tokens. These are held once, in buffers
    [1, Hkv, tokens, N] of their own. Slots, counts and `length` are then of the tokens behind them.
    """

    is_croppable = True

    def __init__(self, shared: Shared, last: bool) -> None:
        super().__init__(shared.slots, shared.storage)
        self.shared, self.last = shared, last
        self.length: int | None = 0
        """Number of tokens; None after compiled steps, which only the device counts."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=key_states.device)
        self.max_cache_len = self.shared.slots
        super().lazy_initialization(key_states, value_states)
        if torch.compiler.is_compiling():
            self.shared.graph_made = True
        else:
            mark_static(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, T, D], and return what attention reads.

        The first tokens of all are read as they come, be they held in a form that rounds them.
        Raises `ValueError` if they are those of an encoder, and the cache is a decoder's.
        """
        announced, count = self.shared.announced, key_states.shape[2]
        if announced is not None and count != announced:
            raise ValueError(_OF_TWO_KINDS)
        if self.shared.holds_encoder and not self.storage.is_usual:
            raise ValueError(_ENCODER_KEYS)
        if torch.compiler.is_compiling():
            self._write_in_graph(key_states, value_states)
        else:
            self._write(key_states, value_states)
        shown = self.shared.shown
        if self.last:
            self.shared.shown = None  # it was announced for this forward alone
        if shown == self.length == count and not (self.storage.is_usual or self.prefix):
            return key_states, value_states
        return self.read("keys", shown), self.read("values", shown)

    def _write_in_graph(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write at positions on the device; Python runs here while tracing, so it cannot count."""
        if not self.is_initialized or self._is_of_other_rows(key_states):
            count = key_states.shape[2]
            exact = self.shared.holds_encoder
            self.shared.slots = count if exact else max(self.shared.slots, rounded(count))
            self.lazy_initialization(key_states, value_states)
        slots, count = self.keys.shape[2], key_states.shape[2]
        positions = torch.arange(count, device=self.keys.device) + self.cumulative_length
        # A step without room must neither fault on the device nor go unnoticed: it gives NaN.
        value_states = value_states.masked_fill((positions >= slots)[:, None], torch.nan)
        positions = positions.clamp(max=slots - 1)
        self.cumulative_length.add_(count)
        self.copy_in(positions, key_states, value_states)
        self.length = None
        self.shared.eager_steps = 0

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write eagerly, into larger buffers if the present ones are full."""
        count, begin = key_states.shape[2], self.count()
        end = begin + count
        if self.shared.holds_encoder and begin == 0:
            self.shared.slots, self.is_initialized = end, False
        elif end > self.shared.slots:
            self.shared.slots = larger(self.shared.slots, end)
        if not self.is_initialized or self._is_of_other_rows(key_states):
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[2] < self.shared.slots:
            self.move()
        self.put(begin, key_states, value_states)
        note_filled(self.keys, end)
        self.length = end
        self.cumulative_length.fill_(self.length)
        self.shared.at_most = max(self.shared.at_most, self.length)
        if self.last and count == 1 and begin > 0:
            self.shared.eager_steps += 1

    def _is_of_other_rows(self, states: Tensor) -> bool:
        """True if rows have no token of their own yet, and there is another number of them.

        `states` are the keys [B, Hkv, T, D] of their first tokens. A compiled graph must not ask
        for the length of a cache that fits: it would be compiled anew for each length.
        """
        return states.shape[0] != self.keys.shape[0] and self.length == 0

    def count(self) -> int:
        """Return the number of tokens; waits for the device if compiled steps have run.

        Raises `RuntimeError` if those wrote more tokens than there was room for.
        """
        if self.length is None:
            counted = int(self.cumulative_length)
            if counted > self.keys.shape[2]:
                self.shared.at_most = counted  # the next call looks again
                raise RuntimeError(
                    f"compiled steps wrote {counted} tokens to a LycheeCache with room for "
                    f"{self.keys.shape[2]}, and those beyond are lost (their outputs were NaN): "
                    "call cache.reserve(tokens) before compiled steps that generate() does not "
                    "make, and reset() this cache"
                )
            self.length = counted
        return self.length

    @property
    def used(self) -> int:
        """Number of slots that may be filled: all of them if only the device knows."""
        return int(self.keys.shape[2]) if self.length is None else self.length

    def move(self) -> None:
        """Move to new buffers, of the capacity that all layers are to have."""
        self.move_buffers(self.shared.slots, self.used)
        self.cumulative_length = self.cumulative_length.clone()
        self.max_cache_len = self.shared.slots
        mark_static(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of slots that attention reads, and the first slot, 0."""
        if torch.compiler.is_compiling():
            self.shared.shown = None
            own = self.keys.shape[2] if self.is_initialized else self.shared.slots
        else:
            shown = self.shared.shown
            own = self.shared.slots if shown is None else shown
        return self.prefix + own, 0

    def get_seq_length(self) -> Any:
        """Return the number of tokens: an int, or in a compiled graph a tensor."""
        if torch.compiler.is_compiling():
            return super().get_seq_length() + self.prefix
        return self.count() + self.prefix

    def get_max_length(self) -> int:
        """Return -1, as there is no maximum."""
        return -1

    def share_prefix(self, tokens: int) -> None:
        """Hold the first `tokens` tokens of one row apart, for all rows that follow."""
        rest = self.prefix + self.count() - tokens
        self.divide(tokens, self.count(), self.shared.slots)
        self.length, self.max_cache_len = rest, self.shared.slots
        self.cumulative_length = torch.full_like(self.cumulative_length, rest)
        mark_static(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, without waiting for the device.

        If all rows share their first tokens, the device is waited for.
        """
        own = self.count() if self.prefix else 0
        if self.prefix and -tokens_to_remove > own:
            self.crop_prefix(max(self.prefix + own + tokens_to_remove, 0))
        if self.length is not None:
            self.length = max(self.length + tokens_to_remove, 0)
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch in place, so that CUDA graphs find the buffers where they were."""
        if self.is_initialized:
            for buffer in self.buffers():
                filled = bits(buffer)[:, :, : self.used]
                filled.copy_(filled.index_select(0, beam_idx.to(buffer.device)))

    def reset(self) -> None:
        """Forget all tokens, and keep the buffers that rows have of their own."""
        super().reset()
        self.forget_prefix()
        self.length = 0


def rounded(slots: int) -> int:
    """Round `slots` up to a whole number of the blocks that kernels scan."""
    return whole_scans(slots)


def larger(slots: int, needed: int) -> int:
    """Return the capacity to grow to. It doubles, so that copies and new CUDA graphs are rare."""
    return rounded(max(2 * slots, needed + max(needed // 2, ROOM)))
