"""The one definition of the keys that an additive mask hides.

A bias of -8192 or less takes all softmax weight from its key: exp(-8192) is zero in every floating
dtype, beside any key of the same row whose bias is near zero or above. Masks that hide write -10000
(which is -9984 in bfloat16), -1e9, `torch.finfo(dtype).min` or -inf.

Zero is not always at hand. In a row whose biases are all negative, as where a whole row is padding,
the weights of the softmax depend on how far each bias is below the largest one. `shown` therefore
measures from the largest bias of the row, or from zero if that is larger. Expressions, in detection
and in kernels, see one element at a time and measure from zero. Both agree on every row that has a
bias of zero or above. When decoding they also agree on rows that one low number fills: these show
nothing (`shown_to_step`).
"""

from __future__ import annotations

from torch import Tensor

HIDDEN = -8192.0
"""Bias at or below which a key is hidden. float16, bfloat16, float32 and float64 hold it."""


def shown(bias: Tensor) -> Tensor:
    """Return which keys an additive mask float [..., L] does not hide, as bool [..., L].

    A row of equal numbers so low that `HIDDEN` is lost beside them shows nothing: that holds for
    -inf and for `torch.finfo(dtype).min` of float32, bfloat16 and float64.
    """
    wide = bias.float()
    return wide > wide.amax(-1, keepdim=True).clamp(max=0) + HIDDEN


def shown_to_step(bias: Tensor) -> Tensor:
    """Return `shown` for a decoding step: a row that one low number fills shows nothing.

    Such a row is idle, as a slot of a server without a request. Its output means nothing, and to
    read its keys would cost as much as those of a busy row.
    """
    least, most = bias.aminmax(dim=-1, keepdim=True)
    idle = (least == most) & (most <= HIDDEN)
    return shown(bias) & ~idle
