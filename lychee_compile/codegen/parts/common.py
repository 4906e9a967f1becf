"""What every module begins with: constants, and where a program finds its query."""

from __future__ import annotations

from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.launch_parts import power_of_two


def emit_constants(spec: AttentionSpec) -> str:
    """Sizes of this site. Rows and columns are padded to what a tensor core's product takes."""
    logits = "\nLOG2E = tl.constexpr(1.4426950408889634)  # of extra logits" if spec.extra else ""
    return f"""
GROUP = tl.constexpr({spec.group})  # query heads that share a KV head
ROWS = tl.constexpr({power_of_two(spec.group, 16)})
HEAD_DIM = tl.constexpr({spec.head_dim})
DIM = tl.constexpr({power_of_two(spec.head_dim, 16)})
VALUE_DIM = tl.constexpr({spec.value_dim})
WIDTH = tl.constexpr({power_of_two(spec.value_dim, 16)})
AUTOTUNE = {spec.autotune}  # whether tile sizes are measured at the first call{logits}
"""


def emit_queries() -> str:
    """`load_queries`: the heads of one group at one position."""
    return '''
@triton.jit
def load_queries(query, b, kv_head, t, stride_b, stride_h, stride_t, stride_d):
    """Queries [ROWS, DIM] of a group at position t, and their heads; the last one fills up."""
    h = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    d = tl.arange(0, DIM)
    place = query + b.to(tl.int64) * stride_b + t * stride_t
    place = place + h[:, None] * stride_h + d[None, :] * stride_d
    return tl.load(place, mask=d[None, :] < HEAD_DIM, other=0.0), h
'''
