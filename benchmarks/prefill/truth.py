"""Causal attention in float64 at sampled queries, and the error of an output against it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.prefill.tensors import HEAD_DIM

SCALE = HEAD_DIM**-0.5
"""Softmax scale of the attention."""


def dense_at(query: Tensor, key: Tensor, value: Tensor, sample: Tensor) -> Tensor:
    """Return causal attention in float64 of the queries at `sample`, int64 [N]: [Hq, N, Dv]."""
    outputs = []
    group = query.shape[1] // key.shape[1]
    slot = torch.arange(key.shape[2], device=key.device)
    for head in range(query.shape[1]):
        queries = query[0, head, sample].double()
        score = SCALE * (queries @ key[0, head // group].double().T)
        share = score.masked_fill(slot > sample[:, None], -torch.inf).softmax(-1)
        outputs.append(share @ value[0, head // group].double())
    return torch.stack(outputs)


def error_at(output: Tensor, truth: Tensor, sample: Tensor) -> float:
    """Return the mean relative error of the queries at `sample`."""
    error = (output[0, :, sample].double() - truth).norm(dim=-1) / truth.norm(dim=-1)
    return error.mean().item()
