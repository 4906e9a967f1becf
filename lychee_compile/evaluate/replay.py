"""Replay of a policy over the tensors of one captured attention, as decoding runs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lychee_compile.evaluate.tensors import Capture, Columns, SiteTensors
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.adaptive import certified_attention
from lychee_compile.kernels.reference.attention import attend
from lychee_compile.kernels.reference.certificate import log_unread_bound, missed_share
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import Selection, select
from lychee_compile.kernels.reference.softcap import capped

BYTES = 2
"""Bytes of a number of keys and values, counted as bfloat16."""


@dataclass(frozen=True)
class Truth:
    """Dense attention of one query over the keys it sees, in float64."""

    step: int
    """Number of the query in the capture."""
    query: Tensor
    """Query, float32 [1, Hq, 1, D]."""
    key: Tensor
    """Keys that the query sees, [1, Hkv, n, D]."""
    value: Tensor
    """Values of those keys, [1, Hkv, n, Dv]."""
    share: Tensor
    """Softmax share of each key, float64 [Hq, n]."""
    output: Tensor
    """Output of dense attention, float64 [Hq, Dv]."""


@dataclass(frozen=True)
class Measured(Columns):
    """Figures of one or many choices of tokens, with steps T along the first axis."""

    mass: Tensor
    """Share of the dense softmax mass that was read, float64 [T, Hq]."""
    error: Tensor
    """|o - o_dense| / |o_dense|, float64 [T, Hq]."""
    bound: Tensor
    """Certificate, an upper bound of the share that was not read, float64 [T, Hq]."""
    violated: Tensor
    """True if more was missed than the certificate allows, bool [T, Hq]."""
    tokens: Tensor
    """Number of tokens read, float64 [T, Hkv]."""
    index_bytes: Tensor
    """Bytes read per KV head to choose them, float64 [T]."""
    attended_bytes: Tensor
    """Bytes of the keys and values attended to, float64 [T, Hkv]."""
    seconds: Tensor
    """Time of the choice in seconds, float64 [T]."""


def dense_truths(site: SiteTensors, capture: Capture) -> Iterator[Truth]:
    """Yield dense attention of each query of a site, in order."""
    key, value = site.key.double(), site.value.double()
    for step, length in enumerate(capture.lengths.tolist()):
        query = site.query[:, :, step : step + 1]
        share = _softmax(query, key[:, :, :length], site)
        grouped = share.unflatten(0, (key.shape[1], -1))
        output = (grouped @ value[0, :, :length]).flatten(0, 1)
        yield Truth(step, query, site.key[:, :, :length], site.value[:, :, :length], share, output)


def _softmax(query: Tensor, key: Tensor, site: SiteTensors) -> Tensor:
    """Return the softmax shares of all keys [1, Hkv, n, D] for one query: float64 [Hq, n]."""
    grouped = query[0, :, 0].double().unflatten(0, (key.shape[1], -1))
    score = capped(site.scale * (grouped @ key[0].transpose(-1, -2)), site.softcap)
    return score.softmax(-1).flatten(0, 1)


class Replay:
    """Index over the keys of one site that follows them token by token, and its choices."""

    def __init__(self, site: SiteTensors, capture: Capture, config: IndexConfig) -> None:
        heads, head_dim, device = site.key.shape[1], site.key.shape[3], site.key.device
        self.site, self.config = site, config
        self.index = make_index(1, heads, head_dim, config, device)
        self.build_seconds = 0.0
        """Time to index the prompt, in seconds."""
        self.follow_seconds = 0.0
        """Time to follow the keys since the prompt, in seconds."""
        self.followed = 0
        """Number of keys since the prompt."""
        self._end = 0
        if capture.strengths is not None:
            slots = torch.arange(len(capture.strengths), device=device)[None]
            self.index.strengths.note(slots, capture.strengths[None].to(device))

    def follow(self, length: int) -> None:
        """Index the first `length` keys: at once in the first call, one by one in later calls."""
        started, fresh = self._now(), self._end == 0
        for end in (length,) if fresh else range(self._end + 1, length + 1):
            ends = torch.tensor([end], device=self.index.device)
            self.index.fresh = ends - 1  # the query's own token, as a step has just written it
            self.index.extend(self.site.key[:, :, :end], ends)
        seconds = self._now() - started
        if fresh:
            self.build_seconds = seconds
        else:
            self.follow_seconds += seconds
            self.followed += length - self._end
        self._end = length

    def measure(self, truth: Truth, budget: int) -> Measured:
        """Choose and attend for one query; the index has followed the keys that it sees."""
        site, config = self.site, self.config
        # A policy may remember what it chose at a site: budgets must not share that.
        name = f"{site.name} at {budget}"
        operands = Operands(truth.query, truth.key, truth.value, None, site.scale, site.softcap)
        started = self._now()
        if config.epsilon is not None:
            output, selection, bound = certified_attention(
                self.index, operands, budget, config.epsilon, name
            )
            seconds = self._now() - started
        else:
            selection = select(self.index, operands.score_inputs, budget, name)
            seconds = self._now() - started
            output, log_read = attend(operands, selection)
            bound = self._certificate(truth, selection, log_read)
        return self._compare(truth, selection, output, bound, budget, seconds)

    def _certificate(self, truth: Truth, selection: Selection, log_read: Tensor) -> Tensor:
        unread = log_unread_bound(self.index, truth.query, selection, self.site.softcap)
        bounded = replace(selection, log_unread_bound=unread)
        return missed_share(truth.key, truth.query, bounded, log_read)

    def _compare(
        self,
        truth: Truth,
        selection: Selection,
        output: Tensor,
        bound: Tensor,
        budget: int,
        seconds: float,
    ) -> Measured:
        read = selection.token_mask()[0, :, 0]
        group = truth.share.shape[0] // read.shape[0]
        wide = read.repeat_interleave(group, 0)
        missed = truth.share.masked_fill(wide, 0).sum(-1)
        length = truth.output.norm(dim=-1)
        error = (output[0, :, 0].double() - truth.output).norm(dim=-1) / length.clamp(min=1e-300)
        certificate = bound[0, :, 0].double()
        tokens = read.sum(-1).double()
        numbers = truth.key.shape[3] + truth.value.shape[3]
        seen = truth.key.shape[2]
        index_bytes = 0  # if everything is read, nothing is chosen
        if not bool(read.all()):
            index_bytes = self.index.bytes_per_step(seen, budget)
        return Measured(
            mass=(1 - missed).cpu()[None],
            error=error.cpu()[None],
            bound=certificate.cpu()[None],
            violated=(missed > certificate).cpu()[None],
            tokens=tokens.cpu()[None],
            index_bytes=torch.tensor([float(index_bytes)], dtype=torch.float64),
            attended_bytes=(BYTES * numbers * tokens).cpu()[None],
            seconds=torch.tensor([seconds], dtype=torch.float64),
        )

    def _now(self) -> float:
        if self.index.device.type == "cuda":
            torch.cuda.synchronize(self.index.device)
        return time.perf_counter()
