"""HISA: blocks first, by their mean key, then the best tokens of the best blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs

BLOCK = 128
"""Number of tokens of a block, as in the paper."""
CANDIDATE_BLOCKS = 64
"""Number of blocks whose tokens are scored one by one, as in the paper: 8192 tokens."""
CANDIDATES_PER_TOKEN = 4
"""Least number of tokens scored for each that is read: the paper scores 8192 to read 2048."""


class HISAIndex(KVIndex):
    """HISA (arXiv 2603.28458): exact top tokens within the blocks whose mean key scores best.

    A block of 128 neighbouring tokens is summarised by the mean of its keys and ranked by the score
    of that mean. The first and the last block that a query sees are always candidates, then the
    best ones, 64 in all. Within them every key is read, and the tokens of largest score are taken,
    in any number per block. Nothing but the query's own token is always read. A block is summarised
    when it is full; the block being written is the last one and needs no summary.

    Not as in the paper: it speeds up the indexer of DeepSeek's sparse attention, which has keys of
    its own and sums weighted ReLU of their scores over its heads. Other models have no indexer, so
    the attention's own scores rank blocks and tokens, for each KV head apart, by the mean of the
    softmax shares over its query heads. A bias counts with its largest value in a block.
    """

    reads_keys = True
    block = BLOCK
    candidate_blocks = CANDIDATE_BLOCKS

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.mean = torch.zeros(batch, kv_heads, 0, head_dim, device=device)
        """Mean key of each full block, float32 [B, Hkv, N, D]: block n of a row starts at
        start + n * 128."""
        self.full = torch.zeros_like(self.start)
        """Full blocks of each row, int64 [B]."""

    @property
    def always_read(self) -> tuple[int, int]:
        """Only the query's own token."""
        return 0, 1

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Average the blocks that have become full. Every token may be chosen at once."""
        self.end, self.tail = end.clone(), torch.maximum(end, self.start)
        full = (self.tail - self.start).div(self.block, rounding_mode="floor")
        begin, last = int(self.full.min()), int(full.max())
        if last > self.mean.shape[2]:
            self.mean = F.pad(self.mean, (0, 0, 0, last + last // 4 - self.mean.shape[2]))
        for number in range(begin, last):
            self._average(key, number, (self.full <= number) & (number < full))
        self.full = torch.maximum(self.full, full)

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Average the full blocks that `slots`, int64 [B, T], lie in; -1 is none."""
        block = (slots - self.start[:, None]).div(self.block, rounding_mode="floor")
        block = torch.where((slots >= 0) & (block < self.full[:, None]), block, -1)
        for number in block[block >= 0].unique().tolist():
            self._average(key, number, (block == number).any(1))

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on, and the blocks they were in."""
        super().truncate(keep)
        whole = (self.tail - self.start).div(self.block, rounding_mode="floor")
        self.full = torch.minimum(self.full, whole)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        super().restart(rows, start)
        self.full = torch.where(rows, 0, self.full)

    def choose(self, question: Question) -> Runs:
        """Return the best tokens of the candidate blocks."""
        number = self._block_of_slot(question.visible.kv_len)
        chosen = self._candidate_blocks(question, number)
        wide = number[:, None, None].expand(-1, *chosen.shape[1:3], -1)
        raw = question.scale * (question.query @ question.keys().float().transpose(-1, -2))
        return question.take_tokens(question.token_share(raw), chosen.gather(-1, wide))

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count a mean for each block, and the keys of the candidate blocks."""
        blocks = max(self.candidate_blocks, CANDIDATES_PER_TOKEN * budget // self.block)
        return 2 * self.head_dim * (tokens // self.block + min(blocks * self.block, tokens))

    def _average(self, key: Tensor, number: int, rows: Tensor) -> None:
        """Take the mean key of block `number` in the rows `rows`, bool [B]."""
        offset = torch.arange(self.block, device=self.device)
        slot = (self.start[:, None] + number * self.block + offset).clamp(max=key.shape[2] - 1)
        index = slot[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
        mean = key.gather(2, index).float().mean(2)
        old = self.mean[:, :, number]
        self.mean[:, :, number] = torch.where(rows[:, None, None], mean, old)

    def _block_of_slot(self, slots: int) -> Tensor:
        """Return the number of the block that each slot is in, int64 [B, L]."""
        offset = torch.arange(slots, device=self.device) - self.start[:, None]
        return offset.clamp(min=0).div(self.block, rounding_mode="floor")

    def _candidate_blocks(self, question: Question, number: Tensor) -> Tensor:
        """Return the blocks whose tokens are scored: bool [B, Hkv, Tq, N]."""
        count = int(number.max()) + 1
        place = torch.arange(count, device=self.device)
        start = self.start[:, None] + place * self.block
        tokens = question.held(start, torch.full_like(start, self.block))[:, None]
        rank = self._block_share(question, number, tokens)
        edge = (tokens > 0) & (
            (place == _first(tokens)) | (place == count - 1 - _first(tokens.flip(-1)))
        )
        order = rank.masked_fill(edge, torch.inf).argsort(dim=-1, descending=True, stable=True)
        most = (CANDIDATES_PER_TOKEN * question.room).div(self.block, rounding_mode="floor")
        inside = place < most.clamp(min=self.candidate_blocks)[..., None]
        return torch.zeros_like(inside).scatter(-1, order, inside)

    def _block_share(self, question: Question, number: Tensor, tokens: Tensor) -> Tensor:
        """Return each block's log share of the softmax, by its mean key: [B, Hkv, Tq, N]."""
        count = tokens.shape[-1]
        mean = F.pad(self.mean, (0, 0, 0, max(count - self.mean.shape[2], 0)))[:, :, :count]
        score = question.scale * (question.query @ mean.transpose(-1, -2))
        score = question.split(question.capped(score))
        if question.visible.bias is not None:
            score = score + _largest_bias(question, number, count)
        known = torch.arange(count, device=self.device) < self.full[:, None, None, None]
        return question.share(score.masked_fill(~(known & (tokens > 0))[:, :, None], -torch.inf))


def _first(tokens: Tensor) -> Tensor:
    """Return the first block that holds a token, int64 [..., 1]."""
    return (tokens > 0).to(torch.uint8).argmax(-1, keepdim=True)


def _largest_bias(question: Question, number: Tensor, count: int) -> Tensor:
    """Return the largest bias of a visible token in each block: [B, Hkv, G, Tq, N]."""
    zeros = question.query.new_zeros(1).expand(*question.query.shape[:3], number.shape[-1])
    bias = question.finish(zeros)
    floor = bias.new_full((*bias.shape[:4], count), -torch.inf)
    return floor.scatter_reduce(-1, number[:, None, None, None].expand_as(bias), bias, "amax")
