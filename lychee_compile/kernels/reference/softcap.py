"""Soft-capping of scores, as in Gemma 2 (arXiv 2408.00118)."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(score: Tensor, softcap: float | None) -> Tensor:
    """Softcap tanh(score / softcap): monotone, so that a bound of a score stays one."""
    return score if softcap is None else softcap * torch.tanh(score / softcap)
