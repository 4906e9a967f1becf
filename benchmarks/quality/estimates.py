"""Scores of keys or chunks as estimated from summaries of various kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.quality.lab import Lab, log_mean


def _moments(keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the valid keys, and the keys minus it."""
    weight = valid[..., None].float()
    mean = (keys * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
    return mean.squeeze(-2), (keys - mean) * weight


def chunk_mean(lab: Lab) -> Tensor:
    """Return chunk scores q.m by the mean key m."""
    mean, _ = _moments(*lab.chunks[:2])
    return lab.scale * lab.query @ mean.T


def chunk_moments(lab: Lab, rotated: bool = False) -> Tensor:
    """Return q.m + q^2.v / 2, with the variance v along channels or along principal axes."""
    keys, valid, _ = lab.chunks
    mean, centred = _moments(keys, valid)
    query = lab.query
    if rotated:
        axes = torch.linalg.eigh(torch.einsum("cmd,cme->de", centred, centred)).eigenvectors
        centred, query = centred @ axes, query @ axes
    variance = centred.square().sum(1) / valid.sum(1, keepdim=True)
    return lab.scale * lab.query @ mean.T + 0.5 * lab.scale**2 * query.square() @ variance.T


def chunk_parts(lab: Lab, parts: int) -> Tensor:
    """Return chunk scores by a centroid for each of several equal parts of a chunk."""
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
    """Return chunk scores by a centroid and coordinates along the `rank` main directions."""
    keys, valid, _ = lab.chunks
    mean, centred = _moments(keys, valid)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:, :rank]
    along = torch.einsum("gtd,crd->gtcr", lab.query, axes)
    coordinates = centred @ axes.transpose(-1, -2)
    spread = torch.einsum("gtcr,cmr->gtcm", along, coordinates)
    return log_mean(lab.scale * ((lab.query @ mean.T)[..., None] + spread), valid)


def sketch(lab: Lab, plan: list[tuple[int, int]], block: int) -> Tensor:
    """Return token scores by principal coordinates; `plan` lists (share of D as 1/n, bits)."""
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
    """Return token scores by all channels in `bits` bits after a random rotation, as RaBitQ."""
    size = lab.key.shape[1]
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    centre = lab.key.mean(0)
    kept = _quantised(((lab.key - centre) @ axes).T, bits).T
    return lab.scale * lab.query @ (centre + kept @ axes.T).T


def _quantised(values: Tensor, bits: int) -> Tensor:
    """Round columns to 2^bits levels with the step that is best for a Gaussian (Max, 1960)."""
    step = {1: 1.596, 2: 0.9957, 4: 0.3352}[bits] * values.square().mean(0).sqrt()
    half = 2 ** (bits - 1)
    return ((values / step - 0.5).round().clamp(-half, half - 1) + 0.5) * step
