"""Record what sparse attention reads while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.operators.observe import SparseCall, TileCall, observers, tile_observers
from lychee_compile.kernels.reference.prefill_attention import TileConfig, prefill_attention
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import visible_keys


@dataclass(frozen=True)
class Call:
    """One sparse attention of one step."""

    site: str
    """Module path."""
    kv_len: int
    """Keys that the longest row of the batch could have read."""
    tokens: Tensor
    """Slots read, int64 [B, Hkv, Tq, S], -1 where a head reads fewer."""
    chunk_starts: Tensor
    """First slot of every chunk of the index then, int64 [B, C], the undecided tail among them."""
    chunk_lengths: Tensor
    """Their lengths, int64 [B, C]; 0: no chunk."""
    mass: Tensor | None
    """Share of the dense softmax mass on the slots read, float32 [B, Hq, Tq]."""
    certificate: Tensor | None = None
    """Upper bound of the share of the softmax mass not read, float32 [B, Hq, Tq], where the option
    `epsilon` asks for one."""

    @property
    def tokens_read(self) -> Tensor:
        """Slots read per row, KV head and query position, int64 [B, Hkv, Tq]."""
        return (self.tokens >= 0).sum(-1)


@dataclass(frozen=True)
class WholeCall:
    """One attention of a whole sequence that read part of its keys."""

    site: str
    """Module path."""
    query_len: int
    kv_len: int
    tokens_read: Tensor
    """Keys that each tile of 128 queries read, int64 [B, Hq, tiles]."""
    mass: Tensor | None
    """Share of the dense softmax mass on them, float32 [B, Hq, T]."""
    certificate: Tensor
    """Upper bound of the share not read, float32 [B, Hq, T]; 1 where no `epsilon` asks for one."""


class Recorder:
    """Collects a `Call` for each sparse attention of decoding, a `WholeCall` for each other."""

    def __init__(self, mass: bool) -> None:
        self.calls: list[Call] = []
        self.whole: list[WholeCall] = []
        self._mass = mass

    def observe_whole(self, call: TileCall) -> None:
        """Keep how much `call` read; its operands are not held."""
        self.whole.append(
            WholeCall(
                site=call.site,
                query_len=call.query.shape[2],
                kv_len=call.key.shape[2],
                tokens_read=_read(call).sum(-1),
                mass=whole_mass(call) if self._mass else None,
                certificate=call.result.certificate,
            )
        )

    def observe(self, call: SparseCall) -> None:
        """Keep what `call` read; its operands are not held."""
        visible = call.selection.visible
        starts, lengths = call.index.partition()
        tokens = call.selection.tokens()
        self.calls.append(
            Call(
                site=call.site,
                kv_len=int((visible.end - visible.first).max()),
                tokens=tokens,
                chunk_starts=starts,
                chunk_lengths=lengths,
                mass=captured_mass(call, tokens) if self._mass else None,
                certificate=call.certificate,
            )
        )


def _read(call: TileCall) -> Tensor:
    """The keys that a call read, kept as somebody listens."""
    assert call.result.read is not None
    return call.result.read


@contextmanager
def record(*, mass: bool = False) -> Iterator[Recorder]:
    """Record every sparse attention that runs within the context.

    With `mass` each call also scores all keys, to say what share of the dense softmax mass was
    read: slow, for study alone. Generated kernels tell nothing, with a warning; the option
    `reference` has the plain operators run on a GPU, too.
    """
    recorder = Recorder(mass)
    observers.append(recorder.observe)
    tile_observers.append(recorder.observe_whole)
    try:
        yield recorder
    finally:
        observers.remove(recorder.observe)
        tile_observers.remove(recorder.observe_whole)


def whole_mass(call: TileCall) -> Tensor:
    """Share of the dense softmax on the keys that `call` read: float32 [B, Hq, T]."""
    everything = prefill_attention(
        call.query, call.key, call.value, call.mask, call.causal, call.scale,
        TileConfig("streaming", budget=call.key.shape[2]), call.softcap, call.extra, call.order,
    )  # fmt: skip
    read, dense = call.result.log_sum, everything.log_sum
    if call.extra is not None:  # the logit of a key without a value is no key
        read, dense = (_without(each, call.extra) for each in (read, dense))
    return (read - dense).exp().nan_to_num(nan=1.0).clamp(max=1)  # who sees nothing misses nothing


def _without(log_sum: Tensor, extra: Tensor) -> Tensor:
    """`log_sum` of scores of which `extra` is one, without it."""
    return log_sum + (-(extra.float() - log_sum).exp()).log1p()


def captured_mass(call: SparseCall, tokens: Tensor) -> Tensor:
    """Share of dense softmax mass on the slots `tokens` [B, Hkv, Tq, S]: float32 [B, Hq, Tq]."""
    batch, query_heads, query_len, _ = call.query.shape
    heads, kv_len = call.key.shape[1], call.key.shape[2]
    grouped = call.query.float().unflatten(1, (heads, -1)).flatten(2, 3)
    score = capped((grouped @ call.key.float().transpose(-1, -2)) * call.scale, call.softcap)
    score = score.view(batch, query_heads, query_len, kv_len)
    visible = visible_keys(call.mask, batch, query_len, kv_len, call.key.device)
    if visible.bias is not None:
        score = score + visible.bias.float()
    if visible.mask is not None:
        score = score.masked_fill(~visible.mask, -torch.inf)
    share = score.softmax(-1).view(batch, heads, -1, query_len, kv_len)
    read = torch.zeros(batch, heads, query_len, kv_len + 1, device=share.device)
    read.scatter_(-1, torch.where(tokens < 0, kv_len, tokens), 1.0)
    return (share * read[:, :, None, :, :kv_len]).sum(-1).flatten(1, 2)
