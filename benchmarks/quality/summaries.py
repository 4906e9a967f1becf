"""Which summary of keys chooses best? Captured mass and output error, at equal tokens read.

    python -m lychee_compile evaluate fidelity --out results ...      # leaves results/capture...
    python -m benchmarks.quality.summaries CAPTURE [--budget 1024] [--queries 64]

Every summary of a family is tried on the same keys and queries of a real model, each head group
reading sinks, recent tokens and the best of the rest by the mean softmax share over its heads.
Bytes are per token of context and KV head, 2 a number where nothing else is said.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lychee_compile.evaluate.capture import Capture, SiteTensors
from lychee_compile.kernels.reference.chunking import cut_chunks, similarity_strengths

SINKS, RECENT, CHUNK = 16, 64, (8, 16)


@dataclass(frozen=True)
class Lab:
    """One KV head of one attention: its keys, the queries that read them, and the truth."""

    query: Tensor
    """[G, T, D]"""
    key: Tensor
    """[L, D]"""
    value: Tensor
    """[L, Dv]"""
    positions: Tensor
    """[T]"""
    strength: Tensor
    """[L], uint8"""
    scale: float
    budget: int

    @cached_property
    def score(self) -> Tensor:
        """[G, T, L], -inf for what a query does not see."""
        seen = torch.arange(len(self.key)) <= self.positions[:, None]
        return (self.scale * self.query @ self.key.T).masked_fill(~seen, -torch.inf)

    @cached_property
    def free(self) -> Tensor:
        """What may be chosen: bool [T, L]."""
        slot = torch.arange(len(self.key))
        return (slot >= SINKS) & (slot <= self.positions[:, None] - RECENT)

    @cached_property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of each chunk [C, M, D], which of them are in it [C, M], and their slots."""
        length = torch.tensor([len(self.key)])
        starts, sizes = cut_chunks(self.strength[None], torch.tensor([0]), length, CHUNK)
        offset = torch.arange(CHUNK[1])
        valid = offset < sizes[0, :, None]
        slot = (starts[0, :, None] + offset).clamp(max=len(self.key) - 1)
        return self.key[slot], valid, slot

    def read_tokens(self, estimate: Tensor) -> tuple[float, float]:
        """(mass, error) of the best tokens by estimated scores [G, T, L]."""
        share = self._share(estimate.masked_fill(~self.free, -torch.inf))
        best = share.topk(self.budget - SINKS - RECENT, -1).indices
        return self._result(torch.zeros_like(self.free).scatter(-1, best, True) & self.free)

    def read_chunks(self, mean_score: Tensor) -> tuple[float, float]:
        """(mass, error) of the best whole chunks by estimated log mean exp(score) [G, T, C]."""
        _, valid, slot = self.chunks
        held = (self.free[:, slot] & valid).sum(-1)
        rank = self._share(mean_score + held.float().log())
        order = rank.argsort(-1, descending=True)
        size = held.gather(-1, order)
        fits = (size.cumsum(-1) <= self.budget - SINKS - RECENT) & (size > 0)
        chosen = torch.zeros_like(fits).scatter(-1, order, fits)
        read = torch.zeros_like(self.free)
        read.scatter_(-1, slot.flatten().expand(len(read), -1), self._spread(chosen, valid))
        return self._result(read & self.free)

    def pooled(self, estimate: Tensor) -> Tensor:
        """Token scores [G, T, L] as log mean exp of each chunk [G, T, C]."""
        _, valid, slot = self.chunks
        return _log_mean(estimate[..., slot], valid)

    def _share(self, log_mass: Tensor) -> Tensor:
        return (log_mass - log_mass.logsumexp(-1, keepdim=True)).logsumexp(0)

    def _spread(self, chosen: Tensor, valid: Tensor) -> Tensor:
        return (chosen[..., None] & valid).flatten(1)

    def _result(self, read: Tensor) -> tuple[float, float]:
        seen = self.score > -torch.inf
        weight = self.score.softmax(-1) * (read | (seen[0] & ~self.free))
        mass = weight.sum(-1)
        dense = self.score.softmax(-1) @ self.value
        output = weight @ self.value / mass[..., None]
        error = (output - dense).norm(dim=-1) / dense.norm(dim=-1)
        return float(mass.mean()), float(error.mean())


def _log_mean(scores: Tensor, valid: Tensor) -> Tensor:
    """Log of the mean exp over the last axis, where `valid`."""
    total = scores.masked_fill(~valid, -torch.inf).logsumexp(-1)
    return total - valid.sum(-1).float().log()


def _moments(keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred keys."""
    weight = valid[..., None].float()
    mean = (keys * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
    return mean.squeeze(-2), (keys - mean) * weight


def chunk_mean(lab: Lab) -> Tensor:
    """q.m"""
    mean, _ = _moments(*lab.chunks[:2])
    return lab.scale * lab.query @ mean.T


def chunk_moments(lab: Lab, rotated: bool = False) -> Tensor:
    """q.m + q^2.v / 2, the variance along channels or along principal axes."""
    keys, valid, _ = lab.chunks
    mean, centred = _moments(keys, valid)
    query = lab.query
    if rotated:
        axes = torch.linalg.eigh(torch.einsum("cmd,cme->de", centred, centred)).eigenvectors
        centred, query = centred @ axes, query @ axes
    variance = centred.square().sum(1) / valid.sum(1, keepdim=True)
    return lab.scale * lab.query @ mean.T + 0.5 * lab.scale**2 * query.square() @ variance.T


def chunk_parts(lab: Lab, parts: int) -> Tensor:
    """A centroid for each of several equal parts of a chunk."""
    keys, valid, _ = lab.chunks
    count, offset = valid.sum(1), torch.arange(valid.shape[1])
    total = []
    for part in range(parts):
        first, last = count * part // parts, count * (part + 1) // parts
        inside = (offset >= first[:, None]) & (offset < last[:, None])
        mean, _ = _moments(keys, inside)
        total.append(lab.scale * lab.query @ mean.T + (last - first).float().log())
    return torch.stack(total).logsumexp(0) - count.float().log()


def chunk_directions(lab: Lab, rank: int) -> Tensor:
    """A centroid and the directions its keys are spread along most, with their coordinates."""
    keys, valid, _ = lab.chunks
    mean, centred = _moments(keys, valid)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:, :rank]
    along = torch.einsum("gtd,crd->gtcr", lab.query, axes)
    coordinates = centred @ axes.transpose(-1, -2)
    spread = torch.einsum("gtcr,cmr->gtcm", along, coordinates)
    return _log_mean(lab.scale * ((lab.query @ mean.T)[..., None] + spread), valid)


def sketch(lab: Lab, plan: list[tuple[int, int]], block: int) -> Tensor:
    """Scores of tokens by principal coordinates: `plan` is (share of D as 1/n, bits) in turn."""
    blocks = []
    for keys in lab.key.split(block):
        centre = keys.mean(0)
        axes = torch.linalg.eigh((keys - centre).T @ (keys - centre)).eigenvectors.flip(-1)
        coordinates, known = (keys - centre) @ axes, 0
        kept = torch.zeros_like(coordinates)
        for share, bits in plan:
            columns = slice(known, known + keys.shape[1] // share)
            kept[:, columns] = _quantised(coordinates[:, columns], bits)
            known = columns.stop
        blocks.append(centre + kept @ axes.T)
    return lab.scale * lab.query @ torch.cat(blocks).T


def rotated_bits(lab: Lab, bits: int) -> Tensor:
    """Scores of tokens by all channels in a few bits after a random rotation, as RaBitQ has it."""
    size = lab.key.shape[1]
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    centre = lab.key.mean(0)
    kept = _quantised(((lab.key - centre) @ axes).T, bits).T
    return lab.scale * lab.query @ (centre + kept @ axes.T).T


def _quantised(values: Tensor, bits: int) -> Tensor:
    """Columns rounded to 2^bits levels with the step that is best for a Gaussian (Max, 1960)."""
    step = {1: 1.596, 2: 0.9957, 4: 0.3352}[bits] * values.square().mean(0).sqrt()
    half = 2 ** (bits - 1)
    return ((values / step - 0.5).round().clamp(-half, half - 1) + 0.5) * step


Summary = tuple[str, str, float, Callable[[Lab], tuple[float, float]]]


def summaries(head_dim: int) -> Iterator[Summary]:
    """(name, what is read, bytes per token, how)."""
    vector = 2 * head_dim / (sum(CHUNK) / 2)

    def exact(lab: Lab) -> Tensor:
        return lab.score

    def of_chunks(name: str, vectors: float, how: Callable[[Lab], Tensor]) -> Summary:
        return name, "chunks", vectors * vector, lambda lab: lab.read_chunks(how(lab))

    yield "every key", "tokens", 2 * head_dim, lambda lab: lab.read_tokens(exact(lab))
    yield "every key", "chunks", 2 * head_dim, lambda lab: lab.read_chunks(lab.pooled(exact(lab)))
    yield of_chunks("mean", 1, chunk_mean)
    yield of_chunks("mean, diagonal variance", 2, chunk_moments)
    rotated = lambda lab: chunk_moments(lab, rotated=True)  # noqa: E731
    yield of_chunks("mean, variance on common axes", 2, rotated)
    for parts in (2, 4):
        yield of_chunks(f"{parts} centroids", parts, lambda lab, n=parts: chunk_parts(lab, n))
    for rank in (1, 3):
        yield of_chunks(
            f"mean, {rank} directions", 1 + rank, lambda lab, n=rank: chunk_directions(lab, n)
        )
    for bits in (1, 2):
        size = head_dim * bits / 8
        how = lambda lab, n=bits: lab.read_tokens(rotated_bits(lab, n))  # noqa: E731
        yield f"random rotation, {bits} bit", "tokens", size, how
    plans = {
        "1/4 of axes, 4 bit": [(4, 4)],
        "1/2 of axes, 2 bit": [(2, 2)],
        "1/8 4 bit, 1/4 2 bit": [(8, 4), (4, 2)],
        "1/4 4 bit, 1/4 2 bit": [(4, 4), (4, 2)],
        "1/2 of axes, 4 bit": [(2, 4)],
    }
    for name, plan in plans.items():
        size = sum(head_dim / share * bits / 8 for share, bits in plan)
        for block in (10**9, 4096):
            axes = 2 * head_dim * sum(head_dim // share for share, _ in plan) / block
            where = "one set of axes" if block > 10**6 else f"axes per {block} tokens"
            how = lambda lab, p=plan, b=block: lab.read_tokens(sketch(lab, p, b))  # noqa: E731
            yield f"{name}, {where}", "tokens", size + axes, how
    plan = plans["1/4 4 bit, 1/4 2 bit"]
    size = head_dim * 3 / 16 + 2 * head_dim * head_dim / 2 / 4096
    how = lambda lab: lab.read_chunks(lab.pooled(sketch(lab, plan, 4096)))  # noqa: E731
    yield "1/4 4 bit, 1/4 2 bit, axes per 4096 tokens", "chunks", size, how


def labs(capture: Capture, budget: int, queries: int) -> Iterator[Lab]:
    """Every KV head of every attention captured."""
    some = torch.linspace(0, len(capture.positions) - 1, queries).long().unique()
    for site in capture.sites:
        strength = capture.strengths
        if strength is None:
            strength = F.pad(similarity_strengths(site.key)[0], (0, 1))
        for head in range(site.key.shape[1]):
            yield Lab(
                _group(site, head)[:, some].float(),
                site.key[0, head].float(),
                site.value[0, head].float(),
                capture.positions[some],
                strength,
                site.scale,
                budget,
            )


def _group(site: SiteTensors, head: int) -> Tensor:
    return site.query[0].unflatten(0, (site.key.shape[1], -1))[head]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("capture", type=Path)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=64)
    arguments = parser.parse_args()
    capture = Capture.load(arguments.capture)
    tried = list(labs(capture, arguments.budget, arguments.queries))
    length, head_dim = tried[0].key.shape
    title = f"{capture.text}, {length} tokens, budget {arguments.budget}, {len(tried)} KV heads"
    table = Table("summary", "read", "bytes", "mass", "error", title=title)
    for name, unit, size, how in track(list(summaries(head_dim)), "Summaries"):
        results = torch.tensor([how(lab) for lab in tried]).mean(0)
        table.add_row(name, unit, f"{size:.0f}", f"{results[0]:.3f}", f"{results[1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
