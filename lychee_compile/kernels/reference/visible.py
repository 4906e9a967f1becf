"""Visible keys: an attention mask of any form, reduced to what a selection needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.reference.hidden import shown, shown_to_step

WORD = 8
"""Number of slots whose bools fill an int64."""


@dataclass(frozen=True)
class Visible:
    """The keys each query position may attend to, over slots 0 to L - 1 of a cache."""

    first: Tensor
    """First visible slot, int64 [B, Tq]; L if no slot is visible."""
    end: Tensor
    """One past the last visible slot, int64 [B, Tq]; 0 if no slot is visible."""
    counts: Tensor | None
    """Number of visible slots before each slot, int64 [B, Tq, L + 1]; None: no holes."""
    bias: Tensor | None
    """Biases added to the scaled scores, float [B, 1 or Hq, Tq, L]; None: no bias."""
    mask: Tensor | None
    """Visible slots, bool [B, 1 or Hq, Tq, L]; None: every slot is visible."""
    kv_len: int
    """Number of slots, L."""

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask as SDPA takes it: the bias if there is one, else the bool mask, else None."""
        return self.mask if self.bias is None else self.bias

    @property
    def is_range(self) -> bool:
        """True if all heads see each slot from `first` to `end`, and no biases."""
        one_head = self.mask is None or self.mask.shape[1] == 1
        return one_head and self.counts is None and self.bias is None

    def tokens_within(self, begin: Tensor, end: Tensor) -> Tensor:
        """Count the visible tokens in the slots [begin, end), each int64 [B, Tq, N]."""
        if self.counts is None:
            begin = torch.maximum(begin, self.first[..., None])
            end = torch.minimum(end, self.end[..., None])
            return (end - begin).clamp(min=0)
        through = self.counts.gather(2, torch.maximum(begin, end).clamp(0, self.kv_len))
        return through - self.counts.gather(2, begin.clamp(0, self.kv_len))


def visible_keys(
    mask: Tensor | None, batch: int, query_len: int, kv_len: int, device: torch.device
) -> Visible:
    """Read an SDPA mask: None, bool or additive float, broadcastable to [B, Hq, Tq, L].

    `shown_to_step` says which keys a float mask shows; it is a bias for these. A key is a candidate
    if any head sees it; `mask` and `bias` keep the heads apart.
    """
    if mask is None:
        full = torch.full((batch, query_len), kv_len, dtype=torch.int64, device=device)
        return Visible(torch.zeros_like(full), full, None, None, None, kv_len)
    wide = with_four_axes(mask).expand(batch, -1, query_len, kv_len)
    seen, bias = seen_and_bias(wide, shown_to_step)
    anywhere = seen[:, 0] if seen.shape[1] == 1 else seen.any(1)
    count = anywhere.sum(-1)
    first, end = _span(anywhere, count > 0)
    counts = None
    if bool((count != (end - first).clamp(min=0)).any()):
        counts = torch.nn.functional.pad(anywhere.long().cumsum(-1), (1, 0))
    return Visible(first, end, counts, bias, seen, kv_len)


def seen_span(
    mask: Tensor | None, batch: int, kv_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the first slot that any query of a row sees and the one after the last: int64 [B].

    They are `kv_len` and 0 if none sees any. `mask` is that of `visible_keys`.
    """
    if mask is None:
        full = torch.full((batch,), kv_len, dtype=torch.int64, device=device)
        return torch.zeros_like(full), full
    wide = with_four_axes(mask).expand(batch, -1, -1, kv_len)
    seen = wide if wide.dtype == torch.bool else shown_to_step(wide)
    rows = seen.flatten(1, 2)
    anywhere = rows[:, 0] if rows.shape[1] == 1 else rows.any(1)
    return _span(anywhere, anywhere.view(torch.uint8).amax(-1) > 0)


def _span(seen: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first slot that is `seen`, bool [..., L], and the one after the last: [...].

    They are L and 0 unless `some`, bool [...], are seen.
    """
    kv_len = seen.shape[-1]
    first = torch.where(some, _first(seen), kv_len)
    return first, torch.where(some, kv_len - _first(seen.flip(-1)), 0)


def _first(seen: Tensor) -> Tensor:
    """Return the first slot that is `seen`, bool [..., L], if any is: int64 [...].

    Eight slots are looked at as one number, and then those of the first number that is not zero.
    """
    if seen.shape[-1] % WORD:
        return seen.to(torch.uint8).argmax(-1)
    word = seen.contiguous().view(torch.int64)
    number = (word != 0).to(torch.uint8).argmax(-1, keepdim=True)
    within = word.gather(-1, number).view(torch.uint8).argmax(-1)
    return WORD * number[..., 0] + within


def seen_and_bias(
    mask: Tensor, rule: Callable[[Tensor], Tensor] = shown
) -> tuple[Tensor, Tensor | None]:
    """Return what an SDPA mask shows, bool, and what it adds to scores, None if nothing.

    `rule` says which keys an additive mask shows.
    """
    if mask.dtype == torch.bool:
        return mask, None
    seen = rule(mask)
    return seen, mask if bool(((mask != 0) & seen).any()) else None


def per_kv_head(mask: Tensor, heads: int, group: int) -> Tensor:
    """Split the heads of a mask or bias [B, 1 or Hq, Tq, L]: [B, 1 or Hkv, 1 or G, Tq, L]."""
    return mask.unflatten(1, (1, 1) if mask.shape[1] == 1 else (heads, group))


def with_four_axes(mask: Tensor) -> Tensor:
    """Return a mask broadcastable to [B, Hq, Tq, L] with four dimensions."""
    return mask[(None,) * (4 - mask.dim())]
