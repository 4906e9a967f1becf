"""The shape that every attention operator gives, for PyTorch's tracing."""

from __future__ import annotations

from torch import Tensor


def fake_output(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Return an empty output [B, Hq, T, Dv] for queries [B, Hq, T, D] and values [B, Hkv, L, Dv].

    An operator's other arguments do not matter.
    """
    return query.new_empty(*query.shape[:3], value.shape[-1])
