"""Soft-cap of scores, as in Gemma 2 (arXiv 2408.00118)."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(score: Tensor, softcap: float | None) -> Tensor:
    """Return softcap tanh(score / softcap), or `score` if `softcap` is None.

    The function is monotone: a bound of a score stays a bound.
    """
    return score if softcap is None else softcap * torch.tanh(score / softcap)
