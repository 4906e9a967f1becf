"""Sketches of keys: their principal coordinates in four and two bits.

Keys of one head over a few thousand tokens lie near a low-dimensional affine subspace (measured in
Loki, arXiv 2406.02542). A sketch is the coordinates of a key along the principal axes of its block
of tokens. The first quarter of the dimensions takes 4 bits each, the second quarter 2 bits: 3/16 of
a byte per channel, against 4 bytes of key and value. Coordinates are quantised uniformly, with the
step that is best for a Gaussian (Max, "Quantizing for minimum distortion", 1960).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.loaded_tensor import row_of
from lychee_compile.kernels.reference.nodes import rounding_slack
from lychee_compile.kernels.reference.rows import alike
from lychee_compile.kernels.reference.sketch_axes import (
    STEPS,
    fit_axes,
    rows_at_once,
    sketch_bits,
)

BLOCK = 4096
"""Number of slots that share one set of axes: block s begins at slot s * BLOCK."""
TILE = 64
"""Number of slots of one block that are scored together, if a query has slots of its own."""
FIRST_FIT, GROWTH = 16, 2
"""A block uses the axes of the block before until it has 1/16 of its keys. Then it gets axes of its
own, and new ones each time its number of keys has doubled."""
SHORT = 1 / 64
"""Square of the distance of a key from its subspace, as a part of its squared distance from the
centre, below which the distance is computed from the key itself."""


class KeySketches:
    """Sketches of the keys of one cache, and the distance of each sketch from its key.

    Bounds are true for any axes. The axes of a block change only when all of its keys are encoded
    anew.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        block: int = BLOCK,
        repair: bool = True,
    ) -> None:
        self.block, self._repair = block, repair
        self.any_lost = False
        """True once a key was not finite."""
        bits = torch.tensor(sketch_bits(head_dim), device=device)
        self._half = 2.0 ** (bits - 1)
        self._step = torch.tensor([STEPS[each] for each in bits.tolist()], device=device)
        kept = len(bits)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, kv_heads, *shape, device=device)

        self.centre = zeros(0, head_dim)
        """Mean key of each block, float32 [B, Hkv, S, D]."""
        self.axes = zeros(0, head_dim, kept)
        """Principal axes, orthonormal columns [B, Hkv, S, D, r]."""
        self.step = zeros(0, kept)
        """Quantisation steps [B, Hkv, S, r]."""
        self.longest = zeros(0)
        """Largest distance of an encoded key of a block from its centre, [B, Hkv, S]."""
        self.fitted = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        """Number of keys that the axes of each block were fitted to, int64 [B, S]."""
        self.codes = zeros(0, kept).to(torch.int8)
        """Quantised coordinates, int8 [B, Hkv, S * block, r]."""
        self.error = zeros(0, 2)
        """Distance of each key from its sketch, within the subspace and out of it, float32
        [B, Hkv, S * block, 2]; infinite for a key that is not finite."""

    def encode(self, key: Tensor, start: Tensor, begin: Tensor, end: Tensor) -> None:
        """Sketch the keys in the slots [begin, end) of `key` [B, Hkv, L, D], each int64 [B].

        The keys of a row begin at `start`, int64 [B]. A block gets new axes if its axes were fitted
        to far fewer keys than it has now. A block that just begins takes the axes of the block
        before.
        """
        self._reserve((int(end.max()) + self.block - 1) // self.block)
        for row, rows in alike(begin, end):
            part, keys = (self, key) if row is None else (self._of_row(row), row_of(key, row))
            first, last = int(begin[rows].min()), int(end[rows].max())
            for block in range(first // self.block, (last + self.block - 1) // self.block):
                part._encode_block(block, keys, start[rows], begin[rows], end[rows])
            self.any_lost |= part.any_lost

    def _of_row(self, row: int) -> KeySketches:
        """Return the sketches of one row, in the same memory."""
        alone = copy.copy(self)
        for name in ("centre", "axes", "step", "longest", "fitted", "codes", "error"):
            setattr(alone, name, getattr(self, name)[row : row + 1])
        return alone

    def rewrite(self, key: Tensor, start: Tensor, end: Tensor, slots: Tensor) -> None:
        """Sketch the keys at `slots`, int64 [B, T], of `key` [B, Hkv, L, D] anew; -1 is none.

        The keys of a row lie in the slots [start, end), each int64 [B]. A block gets new axes when
        half of the keys that its axes were fitted to are gone.
        """
        row, place = (slots >= 0).nonzero(as_tuple=True)
        slot = slots[row, place]
        block = slot // self.block
        keys = key[row, :, slot].float()[:, :, None]
        codes, error, reach = self._encoded(keys, row, block, _all_finite(keys))
        self.any_lost |= bool(error.isinf().any())
        self.codes[row, :, slot], self.error[row, :, slot] = codes[:, :, 0], error[:, :, 0]
        for number in range(len(row)):  # several slots may lie in one block
            at = row[number], slice(None), block[number]
            self.longest[at] = torch.maximum(self.longest[at], reach[number, :, 0])
        lost = torch.full_like(slot, -1)
        self.fitted = self.fitted.index_put((row, block), lost, accumulate=True).clamp(min=0)
        held = torch.minimum(end[row], (block + 1) * self.block)
        held = held - torch.maximum(start[row], block * self.block)
        stale = block[2 * self.fitted[row, block] <= held] if self._repair else block[:0]
        for number in stale.unique().tolist():
            self._encode_block(number, key, start, end, end)

    def forget(self, start: Tensor, keep: Tensor) -> None:
        """Forget the keys from slot `keep`, int64 [B], on; rows begin at `start`, int64 [B]."""
        low = torch.arange(self.fitted.shape[1], device=keep.device) * self.block
        left = torch.minimum(keep[:, None], low + self.block) - torch.maximum(start[:, None], low)
        self.fitted = torch.minimum(self.fitted, left.clamp(min=0))

    def scores(self, query: Tensor, scale: float, slots: int) -> Tensor:
        """Estimate scale q.k for the first `slots` keys: float32 [B, Hkv, R, N].

        `query` is float32 [B, Hkv, R, D]. The estimate is infinite for a key that is not finite.
        """
        blocks = (slots + self.block - 1) // self.block
        weight, constant = self.weights(query, scale, blocks)
        parts = [  # block by block, so that unpacked codes stay in the cache of a CPU
            (weight[:, :, number] @ codes.float().transpose(-1, -2)).add_(constant[:, :, number])
            for number, codes in enumerate(self.codes[:, :, :slots].split(self.block, 2)[:blocks])
        ]
        score = torch.cat(parts, -1) if parts else query.new_zeros(*query.shape[:3], 0)
        if not self.any_lost:
            return score
        return score.masked_fill(self.error[:, :, None, :slots, 0].isinf(), torch.inf)

    def scores_at(self, query: Tensor, scale: float, slot: Tensor) -> Tensor:
        """Estimate scale q.k for slots of each query's own: float32 [B, Hkv, G, Tq, M].

        `query` is float32 [B, Hkv, G, Tq, D]. The slots of a query, `slot` int64 [B, H, Tq, M], H
        being 1 or Hkv, are in order; it may fill up with smaller ones, whose scores mean nothing.
        The estimate is infinite for a key that is not finite.
        """
        (batch, own, query_len, most), heads = slot.shape, query.shape[1]
        if slot.numel() == 0:
            return query.new_zeros(*query.shape[:4], most)
        slot = slot.flatten(0, 2).cummax(-1).values
        blocks = int(slot[:, -1].max()) // self.block + 1
        owner, place, table = _tiles(slot, self.block, blocks)
        row, block = owner // blocks, owner % blocks
        b, t = row // (own * query_len), row % query_len
        h = row // query_len % own * (heads // own)
        h = h + torch.arange(heads // own, device=h.device)[:, None]
        at = ((b * heads + h) * self.codes.shape[2])[..., None] + table
        codes = self.codes.flatten(0, 2).index_select(0, at.flatten()).float()
        weight, constant = (
            each.unflatten(3, (-1, query_len))[b, h, block, :, t]
            for each in self.weights(query.flatten(2, 3), scale, blocks)
        )
        score = (codes.unflatten(0, at.shape) @ weight.mT + constant.mT).flatten(1, 2)
        score = score.index_select(1, place).unflatten(1, (batch, own, query_len, most))
        score = score.permute(1, 2, 0, 5, 3, 4).flatten(1, 2)
        if not self.any_lost:
            return score
        slot = slot.view(batch, own, -1).repeat_interleave(heads // own, 1)
        lost = self.error[..., 0].gather(-1, slot).isinf().unflatten(-1, (query_len, most))
        return score.masked_fill(lost[:, :, None], torch.inf)

    def weights(self, query: Tensor, scale: float, blocks: int) -> tuple[Tensor, Tensor]:
        """Return weights of codes [B, Hkv, S, R, r], and what is added [B, Hkv, S, R, 1].

        Their sum is the estimate of scale q.k for keys of each of the first blocks.
        """
        inside = query[:, :, None] @ self.axes[:, :, :blocks]
        constant = (query[:, :, None] * self.centre[:, :, :blocks, None]).sum(-1)
        weight = inside * self.step[:, :, :blocks, None]
        constant = constant + 0.5 * weight.sum(-1)
        return scale * weight, scale * constant[..., None]

    def score_bound(self, query: Tensor, scale: float, slots: int) -> Tensor:
        """Bound scale q.k for the first `slots` keys from above: [B, Hkv, R, N].

        Cauchy-Schwarz bounds the error of a sketch, within the subspace and orthogonal to it:
        q.k <= q.k~ + |q_in| |e_in| + |q_out| |e_out|. The bound is widened by what rounding can
        hide.
        """
        blocks = (slots + self.block - 1) // self.block
        axes = self.axes[:, :, :blocks]
        inside = query[:, :, None] @ axes
        outside = query[:, :, None] - inside @ axes.transpose(-1, -2)
        reach = torch.stack([_norm(inside), _norm(outside)], -1)  # [B, Hkv, S, R, 2]
        error = self.error[:, :, : blocks * self.block].unflatten(2, (blocks, self.block))
        width = reach @ error.transpose(-1, -2)
        size = _norm(self.centre) + 3 * self.longest
        slack = rounding_slack(2 * query.shape[-1])
        width = (
            width * (1 + slack)
            + slack * (_norm(query)[:, :, None] * size[:, :, :blocks, None])[..., None]
        )
        width = width.transpose(2, 3).flatten(3)[..., :slots]
        bound = self.scores(query, scale, slots) + abs(scale) * width
        return bound.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def _encode_block(
        self, block: int, key: Tensor, start: Tensor, begin: Tensor, end: Tensor
    ) -> None:
        """Sketch the keys of one block, as `encode` says."""
        low = block * self.block
        slots = torch.arange(low, min(low + self.block, int(end.max())), device=key.device)
        valid = (slots >= start[:, None]) & (slots < end[:, None])
        bare = begin <= start.clamp(min=low)
        due = self._inherit(block, valid, bare, begin <= start)
        fresh = valid & (due[:, None] | (slots >= begin[:, None]))
        columns = fresh.any(0).nonzero()
        if not len(columns):
            return
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        if bool(due.any()):
            keys = key[:, :, low : low + len(slots)].float()
            finite = _all_finite(keys)
            centred = self._fit(block, keys, valid, due, finite)
            keys = keys[:, :, part]
            centred = None if centred is None else centred[:, :, part]
        else:
            keys, centred = key[:, :, low + part.start : low + part.stop].float(), None
            finite = _all_finite(keys)
        self._store(low + part.start, keys, fresh[:, part], finite, centred)

    def _inherit(self, block: int, valid: Tensor, bare: Tensor, first: Tensor) -> Tensor:
        """Give a block that begins the axes of the one before; return the rows to fit, bool [B].

        Its keys are there where `valid`, bool [B, T]. In the rows `bare`, bool [B], no key of the
        block is encoded yet; in the rows `first`, bool [B], no key at all.
        """
        count, fitted = valid.sum(1), self.fitted[:, block]
        waiting = torch.zeros_like(bare)
        if block:
            enough = self.block // FIRST_FIT
            waiting = (fitted == 0) & (count < enough) & (self.fitted[:, block - 1] >= enough)
            waiting = waiting if self._repair else ~first
            for mine in (self.centre, self.axes, self.step):
                before = mine[:, :, block - 1]
                rows = (waiting & bare).view(-1, *(1,) * (before.dim() - 1))
                mine[:, :, block] = torch.where(rows, before, mine[:, :, block])
        full = (count == self.block) & (2 * fitted < self.block)
        due = (count > 0) & ~waiting & ((count >= GROWTH * fitted) | full)
        return due if self._repair else due & first

    def _fit(
        self, block: int, keys: Tensor, valid: Tensor, due: Tensor, finite: bool
    ) -> Tensor | None:
        """Find the axes of a block in the rows `due`, bool [B].

        Its keys [B, Hkv, T, D] are there where `valid`, bool [B, T]. All are finite if `finite`
        says so. Returns the keys less the centre of the block, if all have been fitted.
        """
        whole, centred = finite and bool(valid.all()), None
        if whole and bool(due.all()):
            centred = torch.empty_like(keys, memory_format=torch.contiguous_format)
        centre, axes, step = fit_axes(keys, valid[:, None, :, None], whole, centred)
        rows = due.nonzero().flatten()
        self.centre[rows, :, block] = centre[rows]
        self.axes[rows, :, block] = axes[rows]
        self.step[rows, :, block] = step[rows]
        self.longest[rows, :, block] = 0
        self.fitted[:, block] = torch.where(due, valid.sum(1), self.fitted[:, block])
        return centred

    def _store(
        self, first: int, keys: Tensor, fresh: Tensor, finite: bool, centred: Tensor | None
    ) -> None:
        """Encode and keep keys [B, Hkv, T, D] of one block where `fresh`, bool [B, T].

        They lie in the slots from `first` on. All are finite if `finite` says so. `centred` are
        those keys less the centre, if known.
        """
        block, row = first // self.block, torch.arange(keys.shape[0], device=keys.device)
        where = slice(first, first + keys.shape[2])
        whole = bool(fresh.all())
        into = (self.codes[:, :, where], self.error[:, :, where]) if whole else None
        at = torch.full_like(row, block)
        codes, error, length = self._encoded(keys, row, at, finite, centred, into)
        self.any_lost |= bool((error[..., 0].isinf() & fresh[:, None]).any())
        if not whole:
            mask = fresh[:, None, :, None]
            self.codes[:, :, where] = torch.where(mask, codes, self.codes[:, :, where])
            self.error[:, :, where] = torch.where(mask, error, self.error[:, :, where])
        reach = torch.where(fresh[:, None], length, 0).amax(-1)
        self.longest[:, :, block] = torch.maximum(self.longest[:, :, block], reach)

    def _encoded(
        self,
        keys: Tensor,
        row: Tensor,
        block: Tensor,
        finite: bool,
        centred: Tensor | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, errors and distances from the centre of the keys [N, Hkv, T, D].

        Entry n of the keys is of the batch row `row` and the block `block`, each int64 [N]. All
        keys are finite if `finite` says so. `centred` are the keys less the centre, if known. Codes
        and errors are written `into` two tensors, if these are given.
        """
        centre, axes, step = (each[row, :, block] for each in (self.centre, self.axes, self.step))
        length = keys.new_empty(keys.shape[:3])
        codes, error = into or (
            keys.new_empty(*keys.shape[:3], axes.shape[-1], dtype=torch.int8),
            keys.new_empty(*keys.shape[:3], 2),
        )
        rows = rows_at_once(keys)
        for low in range(0, keys.shape[2], rows):
            part = (slice(None), slice(None), slice(low, low + rows))
            known, mine = None, keys[part] if centred is None else centred[part]
            if not finite:
                known = keys[part].isfinite().all(-1)
                mine = torch.where(known[..., None], mine, 0)
            if centred is None:
                mine = mine - centre[:, :, None]
            length[part] = self._encode_part(mine, axes, step, codes[part], error[part])
            if known is not None:
                error[part].masked_fill_(~known[..., None], torch.inf)
        return codes, error, length

    def _encode_part(
        self, centred: Tensor, axes: Tensor, step: Tensor, codes: Tensor, error: Tensor
    ) -> Tensor:
        """Write codes and errors of keys less their centre, [N, Hkv, T, D]; return their lengths.

        Axes and steps are those of each entry. `codes` is [N, Hkv, T, r], `error` [N, Hkv, T, 2].
        """
        step, inside = step[:, :, None], centred @ axes
        length, within = _norm(centred), _norm(inside)
        error[..., 1] = _lengths_outside(centred, inside, axes, length, within)
        level = inside / step.clamp(min=torch.finfo(step.dtype).tiny)
        level = level if bool((step > 0).all()) else torch.where(step > 0, level, 0)
        level = level.sub_(0.5).round_().clamp_(-self._half, self._half - 1)
        codes.copy_(level)
        error[..., 0] = _norm(inside.addcmul_(level.add_(0.5), step, value=-1))
        return length

    def _reserve(self, blocks: int) -> None:
        """Make room for `blocks` blocks, in amortised constant time per key."""
        known = self.fitted.shape[1]
        if blocks <= known:
            return
        more = max(blocks, known + known // 2) - known
        self.centre = F.pad(self.centre, (0, 0, 0, more))
        self.axes = F.pad(self.axes, (0, 0, 0, 0, 0, more))
        self.step = F.pad(self.step, (0, 0, 0, more))
        self.longest = F.pad(self.longest, (0, more))
        self.fitted = F.pad(self.fitted, (0, more))
        self.codes = F.pad(self.codes, (0, 0, 0, more * self.block))
        self.error = F.pad(self.error, (0, 0, 0, more * self.block))


def _tiles(slot: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put the slots of each row and block into tiles of `TILE`.

    `slot` is int64 [X, M], never falling in a row. Returns number of row times `blocks` plus number
    of block of each tile, int64 [n]; the place of each slot in the tiles, int64 [X * M]; and the
    slots of the tiles, int64 [n, TILE], 0 where a tile is not full.
    """
    row = torch.arange(len(slot), device=slot.device)[:, None]
    space, slot = (row * blocks + slot // block).flatten(), slot.flatten()
    size = torch.bincount(space, minlength=len(row) * blocks)
    tiles = (size + TILE - 1).div(TILE, rounding_mode="floor")
    skipped = (tiles * TILE).cumsum(0) - tiles * TILE - (size.cumsum(0) - size)
    place = torch.arange(len(slot), device=slot.device) + skipped[space]
    owner = torch.arange(len(tiles), device=slot.device).repeat_interleave(tiles)
    table = slot.new_zeros(len(owner) * TILE).scatter(0, place, slot)
    return owner, place, table.view(-1, TILE)


def _all_finite(keys: Tensor) -> bool:
    """Return True only if all keys are finite; False as well if their sum is too large."""
    return bool(keys.sum().isfinite())


def _norm(vectors: Tensor) -> Tensor:
    """Return the Euclidean length of vectors [..., D]: [...]."""
    return torch.linalg.vector_norm(vectors, dim=-1)


def _lengths_outside(
    vectors: Tensor, inside: Tensor, axes: Tensor, length: Tensor, within: Tensor
) -> Tensor:
    """Return how far vectors [..., T, D] are from the subspace of orthonormal `axes` [..., D, r].

    Their coordinates `inside`, [..., T, r], are `within` long, and they themselves are of `length`,
    each [..., T]. By Pythagoras that tells the distance, unless it is so short that rounding shows:
    such vectors are projected.
    """
    share = 1 - (within / length).square_()
    outside = length * share.clamp(min=0).sqrt_()
    short = (~(share >= SHORT)).flatten(0, -2).any(0).nonzero()[:, 0]  # NaN is short too
    if len(short):
        vectors, inside = vectors[..., short, :], inside[..., short, :]
        outside[..., short] = _norm(vectors - inside @ axes.mT)
    return outside
