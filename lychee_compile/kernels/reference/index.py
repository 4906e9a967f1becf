"""Base of all indexes: what a decode policy knows of one key cache."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.question import Choice, Question
from lychee_compile.kernels.reference.strengths import StrengthTrack


class KVIndex(abc.ABC):
    """An index over keys [B, Hkv, L, D] with rows of any length, and a policy to choose from it.

    A policy is a subclass. It follows the keys as they are written (`extend`, `truncate`,
    `restart`) and answers questions (`choose`). Everything else is the same for all policies. A
    query always reads the first and the last tokens (`always_read`), and the tokens from `tail` on,
    which the index does not hold yet.

    `extend` may leave for `complete` what a usual choice does not need. Choices and bounds are
    right without it, but wider, and slower in a long context.
    """

    reads_keys: ClassVar[bool] = False
    """True if `choose` reads the keys of the cache itself."""
    estimates_shares: ClassVar[bool] = True
    """True if `choose` ranks by estimated shares of the softmax, so that `coverage` can end it."""
    dense_layers: ClassVar[int] = 0
    """Number of first attention layers that the paper leaves dense."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        self.batch, self.kv_heads, self.head_dim = batch, kv_heads, head_dim
        self.config, self.device = config, device
        self.strengths = StrengthTrack(batch, config.boundaries, device)
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        """First token of each row, int64 [B]."""
        self.tail = self.start.clone()
        """First token of each row that cannot be chosen yet, int64 [B]."""
        self.end = self.start.clone()
        """Number of tokens of each row at the last update, int64 [B]."""
        self.newest: Tensor | None = None
        """Slots that the last step wrote, int64 [B, T], in a cache that wraps. At a row that does
        not wrap, any slot behind its last one. None: no row wraps."""
        self.fresh: Tensor | None = None
        """First slot that the last step wrote, int64 [B]; None: the index is used without steps."""
        self.step: Tensor | None = None
        """Least slot that the last step wrote, int64 [B], also in a cache that wraps. Tokens that
        are drawn by chance have another luck at another step. None: the index is used without
        steps."""

    @abc.abstractmethod
    def extend(self, key: Tensor, end: Tensor) -> None:
        """Index the tokens up to `end`, int64 [B], of the whole cache `key` [B, Hkv, L, D].

        Keys before `tail` are unchanged since they were indexed. Sets `end` and moves `tail`.
        """

    @abc.abstractmethod
    def choose(self, question: Question) -> Choice:
        """Return the tokens that matter most to each query, as runs of slots."""

    @abc.abstractmethod
    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Return the bytes that choosing among `tokens` reads, per row and KV head.

        It reads summaries and keys, at 2 bytes a number. The keys and values that attention then
        reads do not count.
        """

    @property
    def always_read(self) -> tuple[int, int]:
        """Numbers of first and of last tokens of a row that every query reads."""
        return self.config.sinks, self.config.recent

    def always_read_of(self, budget: int | None) -> tuple[int, int]:
        """Return `always_read` for queries that read `budget` tokens; None: all, or any number."""
        return self.always_read

    @property
    def unread(self) -> Tensor:
        """First token of each row, int64 [B], from which on every query reads all."""
        return self.tail

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return an upper bound of scale q.k for the keys in the first N slots: [B, Hkv, R, N].

        `query` is float32 [B, Hkv, R, D]. Bounds hold for the slots in [start, tail). None: the
        policy bounds nothing.
        """
        return None

    def complete(self, key: Tensor) -> None:  # noqa: B027  most policies leave nothing for later
        """Build what `extend` left for later, from the same keys `key` [B, Hkv, L, D]."""

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Follow a write of single slots of `key` [B, Hkv, L, D]; the keys behind stay.

        `slots`, int64 [B, T], lie in [start, tail); -1 is none. A policy that does not override
        this indexes all keys from the first of them anew.
        """
        end = self.end.clone()
        self.truncate(torch.where(slots >= 0, slots, end[:, None]).min(1).values)
        self.extend(key, end)

    def close(self, key: Tensor, rows: Tensor) -> None:  # noqa: B027  most let no token wait
        """Index the last tokens of the rows `rows`, bool [B], though none may come after them.

        Without this, tokens that wait for others stay behind `tail`, and are always read.
        """

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on."""
        self.strengths.forget(keep)
        self.end = torch.minimum(self.end, keep)
        self.tail = torch.maximum(torch.minimum(self.tail, keep), self.start)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they then begin at `start`, int64 [B]."""
        self.start = torch.where(rows, start, self.start)
        self.tail = torch.where(rows, start, self.tail)

    def partition(self) -> tuple[Tensor, Tensor]:
        """Return all tokens as groups in order: (starts, lengths), int64 [B, C].

        The last group of a row holds the tokens that are not indexed yet. Length 0: no group.
        """
        starts = torch.stack((self.start, self.tail), 1)
        lengths = torch.stack((self.tail - self.start, self.end - self.tail), 1)
        return starts, lengths.clamp(min=0)
