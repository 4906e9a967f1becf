"""What every module begins with: constants, and where a program finds its query."""

from __future__ import annotations

from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.sizes import power_of_two


def emit_constants(spec: AttentionSpec) -> str:
    """Sizes of a decoding site. Rows are padded to what a tensor core's product takes."""
    rows = power_of_two(spec.group, 16)
    return f"{emit_sizes(spec, rows)}\n{emit_tuned(spec)}{emit_logits(spec)}\n"


def emit_tuned(spec: AttentionSpec) -> str:
    """What launches look at. Without a line's end."""
    return f"AUTOTUNE = {spec.autotune}  # whether tile sizes are measured at the first call"


def emit_sizes(spec: AttentionSpec, rows: int | None = None) -> str:
    """Sizes of heads, padded to what a tensor core's product takes; query rows where they have one.

    Without a line's end: comments and more constants follow.
    """
    padded = "" if rows is None else f"\nROWS = tl.constexpr({rows})"
    return f"""
GROUP = tl.constexpr({spec.group})  # query heads that share a KV head{padded}
HEAD_DIM = tl.constexpr({spec.head_dim})
DIM = tl.constexpr({power_of_two(spec.head_dim, 16)})
VALUE_DIM = tl.constexpr({spec.value_dim})
WIDTH = tl.constexpr({power_of_two(spec.value_dim, 16)})"""


def emit_logits(spec: AttentionSpec) -> str:
    """What turns extra logits into bits, where there are any."""
    if not spec.extra:
        return ""
    return "\nLOG2E = tl.constexpr(1.4426950408889634)  # of extra logits"


def precision(spec: AttentionSpec) -> str:
    """The last argument of products: tensor cores round float32 unless told not to."""
    return ', input_precision="ieee"' if spec.dtype == "float32" else ""


def emit_softmax_step(spec: AttentionSpec) -> str:
    """The end of a step of online softmax: `bits`, where `seen`, weigh `values`."""
    return f"""    bits = tl.where(seen, bits, float("-inf"))
    most = tl.maximum(top, tl.max(bits, 1))
    base = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.exp2(bits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, 1)
    result = result * fade[:, None] + tl.dot(weight.to(values.dtype), values{precision(spec)})
    return most, total, result"""


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
