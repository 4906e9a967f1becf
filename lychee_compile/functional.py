"""Functions to build an index and run sparse attention by hand, without a compiler.

index = build_index(key)                       # key: [B, Hkv, L, D]
selection = select(index, query)               # query: [B, Hq, Tq, D]
output = sparse_attention(query, key, value, selection)
index = update_index(index, longer_key)        # while decoding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lychee_compile.functional_kernels import Choice, KernelIndex, KernelSelection, has_kernels
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.attention import attend
from lychee_compile.kernels.reference.certificate import log_unread_bound, missed_share
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import Operands, ScoreInputs
from lychee_compile.kernels.reference.selection import Selection
from lychee_compile.kernels.reference.selection import select as _select
from lychee_compile.options import Options

__all__ = [
    "KVIndex",
    "KernelIndex",
    "KernelSelection",
    "Selection",
    "build_index",
    "select",
    "sparse_attention",
    "update_index",
]


def build_index(
    k: Tensor,
    boundaries: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> KVIndex | KernelIndex:
    """Index the keys `k` [B, Hkv, L, D], at once and in full.

    `boundaries`, uint8 [B, L], is the strength of the cut after each token, which `boundary_table`
    looks up for token ids. Without it chunks are cut between keys that differ most. `lengths`, int
    [B], are the lengths of the rows; None: all are L. Raises ValueError for shapes that do not fit.

    On a GPU kernels build and read the index, and the result is a `KernelIndex`. With `boundaries`,
    with the options `reference`, `epsilon` or `draw`, and for a policy without kernels it is a
    `KVIndex` there too, whose operations are PyTorch's own.
    """
    _expect(k.dim() == 4, "k must be [B, Hkv, L, D]", k)
    chosen = options if isinstance(options, Options) else Options.parse(None, options)
    batch, heads, kv_len, head_dim = k.shape
    config = chosen.index_config()
    if boundaries is None and has_kernels(k, config):
        return KernelIndex(k, _checked_lengths(k, lengths, None), config)
    index = make_index(batch, heads, head_dim, config, k.device)
    if boundaries is not None:
        _expect(
            boundaries.shape == (batch, kv_len),
            f"boundaries must be [{batch}, {kv_len}]",
            boundaries,
        )
        _expect(boundaries.dtype == torch.uint8, "boundaries must be uint8", boundaries)
        slots = torch.arange(kv_len, device=k.device).expand(batch, -1)
        index.strengths.note(slots, boundaries)
    return update_index(index, k, lengths=lengths)


def update_index(
    index: KVIndex | KernelIndex, k: Tensor, *, lengths: Tensor | None = None
) -> KVIndex | KernelIndex:
    """Index the keys of `k` [B, Hkv, L, D] that are new, and return `index` itself.

    `k` is the whole cache so far. Keys that were indexed before must be unchanged. `lengths`, int
    [B], are the lengths of the rows; None: all are L. Raises ValueError for shapes that do not fit.
    """
    fits = (index.batch, index.kv_heads, index.head_dim) == (*k.shape[:2], *k.shape[3:])
    _expect(fits, f"k must be [{index.batch}, {index.kv_heads}, L, {index.head_dim}]", k)
    ends = _checked_lengths(k, lengths, index.end)
    if isinstance(index, KernelIndex):
        index.update(k, ends)
    else:
        index.extend(k, ends)
        index.complete(k)
    return index


def _checked_lengths(k: Tensor, lengths: Tensor | None, before: Tensor | None) -> Tensor:
    """Return the lengths of the rows of `k`, int64 [B], which were `before` or less.

    Raises ValueError for lengths that do not fit.
    """
    batch, kv_len = k.shape[0], k.shape[2]
    if lengths is None:
        lengths = torch.full((batch,), kv_len, device=k.device)
    _expect(lengths.shape == (batch,), f"lengths must be [{batch}]", lengths)
    least = 0 if before is None else before
    in_range = bool(((lengths >= least) & (lengths <= kv_len)).all())
    _expect(in_range, f"lengths must not shrink, nor exceed {kv_len}", lengths)
    return lengths.to(torch.int64)


def select(
    index: KVIndex | KernelIndex,
    q: Tensor,
    *,
    budget: int | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    k: Tensor | None = None,
) -> Selection | KernelSelection:
    """Choose the tokens that each position of `q` [B, Hq, Tq, D] reads, per KV head.

    `budget` overrides that of the index; `scale` multiplies q.k, 1 / sqrt(D) by default; `mask` is
    an SDPA mask over the cache, bool or additive. Without a mask every query sees every key, so
    that several query positions need a causal mask. `k` [B, Hkv, L, D] are the keys that were
    indexed, for policies that read them. Raises ValueError for arguments that do not fit.

    On a GPU kernels choose while they attend: `sparse_attention` runs both at once.
    """
    _expect_queries(index, q, k)
    if budget is not None and budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if isinstance(index, KernelIndex):
        most = index.config.budget if budget is None else budget
        assert most is not None, "an index without a budget has no kernels"
        return KernelSelection(index, q, Choice(mask, factor, most))
    kv_len = int(index.end.max()) if mask is None else mask.shape[-1]
    if mask is None and bool((index.end != kv_len).any()):
        slots = torch.arange(kv_len, device=q.device)
        mask = (slots < index.end[:, None])[:, None, None]
    inputs = ScoreInputs(q, k, kv_len, mask, factor)
    selection = _select(index, inputs, index.config.budget if budget is None else budget)
    return replace(selection, log_unread_bound=log_unread_bound(index, q, selection))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | KernelSelection,
    *,
    scale: float | None = None,
    return_certificate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from `q` [B, Hq, Tq, D] to the selected tokens of `k`, `v` [B, Hkv, L, D or Dv].

    Returns [B, Hq, Tq, Dv], and with `return_certificate` also an upper bound of the share of the
    dense softmax mass that was not read, float32 [B, Hq, Tq]. `scale` multiplies q.k, by default as
    in the selection. Raises ValueError for shapes that do not fit the selection, and for a
    certificate with another scale, which would prove nothing.
    """
    factor = selection.scale if scale is None else scale
    if isinstance(selection, KernelSelection):
        own = q is selection.query and factor == selection.scale
        if own and (selection.certifies or not return_certificate):
            _expect_values(k, v, selection)
            run = selection.attend_certified if return_certificate else selection.attend
            return run(q, k, v)
        selection = selection.plain
    _expect_operands(q, k, v, selection)
    operands = Operands(q, k, v, selection.visible.attention_mask, factor)
    output, log_read = attend(operands, selection)
    if not return_certificate:
        return output
    if factor != selection.scale:
        raise ValueError(
            f"scale={scale} is not the {selection.scale} that the selection was made with"
        )
    return output, missed_share(k, q, selection, log_read)


def _expect_queries(index: KVIndex | KernelIndex, q: Tensor, k: Tensor | None) -> None:
    """Raise ValueError if queries, or keys that the policy reads, do not fit the index."""
    _expect(q.dim() == 4, "q must be [B, Hq, Tq, D]", q)
    fits = q.shape[0] == index.batch and q.shape[3] == index.head_dim
    _expect(fits, f"q must be [{index.batch}, Hq, Tq, {index.head_dim}]", q)
    if index.reads_keys:
        fits = k is not None and k.shape[:2] == (index.batch, index.kv_heads)
        what = f"policy {index.config.policy!r} reads keys: k must be [{index.batch}, "
        _expect(fits, f"{what}{index.kv_heads}, L, {index.head_dim}]", k)
    _expect(q.shape[1] % index.kv_heads == 0, f"Hq must be a multiple of {index.kv_heads}", q)


def _expect_operands(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> None:
    """Raise ValueError if queries, keys and values do not fit the selection."""
    batch, heads, query_len, _ = selection.run_start.shape
    slots = selection.visible.kv_len
    fits = k.dim() == 4 and k.shape[:2] == (batch, heads) and k.shape[2] >= slots
    _expect(fits, f"k must be [{batch}, {heads}, {slots} or more, D]", k)
    fits = v.dim() == 4 and v.shape[:3] == k.shape[:3]
    _expect(fits, f"v must be [{batch}, {heads}, {k.shape[2]}, Dv]", v)
    fits = q.dim() == 4 and (q.shape[0], *q.shape[2:]) == (batch, query_len, k.shape[3])
    _expect(
        fits and q.shape[1] % heads == 0,
        f"q must be [{batch}, n * {heads}, {query_len}, {k.shape[3]}]",
        q,
    )


def _expect_values(k: Tensor, v: Tensor, selection: KernelSelection) -> None:
    """Raise ValueError if keys and values do not fit a selection by kernels."""
    index, mask = selection.index, selection.choice.mask
    slots = int(index.end.max()) if mask is None else mask.shape[-1]
    fits = k.dim() == 4 and k.shape[:2] == (index.batch, index.kv_heads) and k.shape[2] >= slots
    fits = fits and k.shape[3] == index.head_dim
    _expect(fits, f"k must be [{index.batch}, {index.kv_heads}, {slots} or more, D]", k)
    fits = v.dim() == 4 and v.shape[:3] == k.shape[:3]
    _expect(fits, f"v must be [{index.batch}, {index.kv_heads}, {k.shape[2]}, Dv]", v)


def _expect(holds: bool, what: str, got: Tensor | None) -> None:
    """Raise ValueError, saying what was expected and what was passed, unless `holds`."""
    if holds:
        return
    if got is None:
        raise ValueError(f"{what}, got None")
    raise ValueError(f"{what}, got {str(got.dtype).removeprefix('torch.')} {list(got.shape)}")
