"""Tokens that `generate()` is forced to choose."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Forced(LogitsProcessor):
    """Logits processor that makes greedy decoding choose the tokens `forced`, int64 [N], first."""

    def __init__(self, prompt_length: int, forced: Tensor) -> None:
        self._prompt_length = prompt_length
        self._forced = forced

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, float [1, vocabulary], that allow the next forced token alone."""
        step = input_ids.shape[1] - self._prompt_length
        if step >= len(self._forced):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill_(1, self._forced[step : step + 1], 0)
