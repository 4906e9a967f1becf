"""Say in words what mask an attention has."""

from __future__ import annotations

import torch

from lychee_compile.passes.dataflow import shape_of, value_of
from lychee_compile.passes.detect import Attention


def describe_mask(attention: Attention) -> str:
    """Class of the mask: "none", "causal", or the tensor it is."""
    if attention.mask is None:
        return "causal" if attention.is_causal else "none"
    value = value_of(attention.mask)
    kind = (
        "bool"
        if value.dtype == torch.bool
        else "additive " + str(value.dtype).removeprefix("torch.")
    )
    sizes = ", ".join(str(size) for size in shape_of(attention.mask))
    return f"{kind} tensor [{sizes}]"
