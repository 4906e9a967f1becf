"""StreamingLLM for whole sequences: the first and the nearest tokens, whatever is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.prefill_question import PrefillQuestion


def choose_last(question: PrefillQuestion) -> Tensor:
    """A window that fills the budget (StreamingLLM, arXiv 2309.17453): the last keys a tile sees.

    Where every query sees all keys, that is the end of the sequence: the window of an encoder is
    what each tile reads in any case.
    """
    slot = torch.arange(question.key.shape[2], device=question.key.device)
    return question.take(slot.float().expand_as(question.candidates))
