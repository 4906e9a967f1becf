"""Fingerprints of keys, by which kernels notice that a key is not the one that was indexed.

`record_fingerprints`, grid (programs of 64 slots, B * Hkv), has these parameters:

key, strides    [B, Hkv, L, D]
fingerprints    int32 [B, Hkv, slots]               written: hashes of the keys
end             int                                 slots to hash
slots, kv_heads int                                 slots of the index, Hkv
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.bins import written_slots
    from lychee_compile.codegen.triton_lib.names import DIM, HEAD_DIM, NEWEST, SAMPLED


@triton.jit
def fingerprint(keys):
    """Return a hash, int32 [N], of the bits of each of the keys [N, DIM].

    It is a sum of bit patterns with odd weights, modulo 2^32: exact in any order of summation. High
    bits are folded down first, so that differences in sign bits alone do not cancel.
    """
    if keys.dtype.primitive_bitwidth == 32:
        bits = keys.to(tl.uint32, bitcast=True)
        bits = bits ^ (bits >> 16)
    else:
        bits = keys.to(tl.uint16, bitcast=True).to(tl.uint32)
    bits = bits ^ (bits >> 8)
    weight = (tl.arange(0, DIM).to(tl.uint32) + 1) * 0x9E3779B1
    weight = (weight ^ (weight >> 15)) * 0x85EBCA77
    weight = (weight ^ (weight >> 13)) | 1
    return tl.sum((bits * weight[None, :]).to(tl.int32, bitcast=True), 1).to(tl.int32)


@triton.jit
def changed_keys(keys, slot, inside, fingerprints):
    """Return 1 for each of the keys [N, DIM] that is not the one that was indexed, int32 [N].

    `slot` [N] are their slots. Those that are not `inside` [N] are not compared.
    """
    known = tl.load(fingerprints + slot, mask=inside, other=0)
    return (inside & (known != fingerprint(keys))).to(tl.int32)


@triton.jit
def check_sample(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, positions, position_stride_b, position_stride_t, written, fresh,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Distrust the index if one of SAMPLED keys, or a key of the last step, is not as indexed.

    The sample has the NEWEST keys, which whoever appends has written, and others at equal
    distances, which each step and each KV head begins elsewhere. All are before `fresh`, and none
    was written by this step. This step already reads all keys.
    """
    fresh = tl.minimum(fresh, kv_len)
    trust = tl.load(header)
    if trust > 1:
        tl.store(header, 0)
    elif (trust == 1) & (fresh > 0):
        number, d = tl.arange(0, SAMPLED), tl.arange(0, DIM)
        turn = fresh.to(tl.int64) * 40503 + kv_head * (65536 // kv_heads)  # the golden ratio's part
        begin = (turn & 65535) * fresh >> 16
        others = SAMPLED - NEWEST
        slot = ((number - NEWEST).to(tl.int64) * fresh + begin) // others
        slot = tl.where(number < NEWEST, tl.maximum(fresh - 1 - number, 0), slot).to(tl.int64)
        place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
        place = place + slot[:, None] * stride_l + d[None, :] * stride_d
        keys = tl.load(place, mask=(d < HEAD_DIM)[None, :], other=0.0)
        fingerprints += (b * kv_heads + kv_head).to(tl.int64) * slots
        inside = slot < fresh
        if written > 1:
            new = written_slots(
                positions, position_stride_b, position_stride_t, written, b, kv_len, -1
            )
            inside &= tl.max((slot[:, None] == new[None, :]).to(tl.int32), 1) == 0
        if tl.max(changed_keys(keys, slot, inside, fingerprints), 0) > 0:
            tl.store(header, 0)


@triton.jit(do_not_specialize=["end"])
def record_fingerprints(
    key, stride_b, stride_h, stride_l, stride_d, fingerprints, end, slots, kv_heads
):
    """Hash the keys in the slots [0, end), 64 a program."""
    space, slot = tl.program_id(1), tl.program_id(0) * 64 + tl.arange(0, 64)
    b, kv_head, d = space // kv_heads, space % kv_heads, tl.arange(0, DIM)
    place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    place = place + slot.to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
    keys = tl.load(place, mask=(slot < end)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    tl.store(
        fingerprints + space.to(tl.int64) * slots + slot, fingerprint(keys), mask=slot < end
    )
