"""Queries of a level that reads some of their channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import CHANNELS, GATHERED, GROUP, ROWS


@triton.jit
def load_query_channels(
    query, channels, b, kv_head, t, stride_b, stride_h, stride_t, stride_d
):
    """Return the queries [ROWS, GATHERED] of a group at position t, and their heads and channels.

    `channels`, int32 [CHANNELS], are those of the KV head.
    """
    h = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    inside = tl.arange(0, GATHERED) < CHANNELS
    channel = tl.load(channels + tl.arange(0, GATHERED), mask=inside, other=0)
    place = query + b.to(tl.int64) * stride_b + t * stride_t
    place = place + h[:, None] * stride_h + channel[None, :] * stride_d
    return tl.load(place, mask=inside[None, :], other=0.0), h, channel
