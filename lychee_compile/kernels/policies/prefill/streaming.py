"""StreamingLLM for prefill: the first and the nearest tokens, whatever the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.prefill_question import PrefillQuestion


def choose_last(question: PrefillQuestion) -> Tensor:
    """Return a window that fills the budget: the last keys that a tile sees.

    StreamingLLM (arXiv 2309.17453) reads sinks and such a window. If every query sees all keys, as
    in an encoder, the last keys are the end of the sequence; each tile always reads the keys near
    its own tokens as well.
    """
    slot = torch.arange(question.key.shape[2], device=question.key.device)
    return question.take(slot.float().expand_as(question.candidates))
