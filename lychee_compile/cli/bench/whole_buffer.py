"""Dense attention over a whole buffer by PyTorch's own operator, the fastest that it gets.

transformers copies grouped keys and passes a mask. Without both, PyTorch takes its flash kernels.
That is right only for plain causal attention over a full buffer. A model whose attention is another
one is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE_BUFFER = "lychee_whole_buffer"
"""Name by which transformers knows this attention."""
OTHERS = ("softcap", "s_aux", "sinks", "position_bias", "sliding_window", "head_mask")
"""Arguments by which models ask for another attention than the plain one."""


def attend_to_all(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention [B, T, Hq, D] to the whole buffer, without copies and without a mask.

    Raise `NotImplementedError` for attention that is not plain.
    """
    if any(others.get(name) is not None for name in OTHERS):
        raise NotImplementedError("its attention has a window, a soft-cap or a bias")
    output = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def register() -> None:
    """Make this attention known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(WHOLE_BUFFER, attend_to_all)
    ALL_MASK_ATTENTION_FUNCTIONS.register(WHOLE_BUFFER, lambda *_, **__: None)
