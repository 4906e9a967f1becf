"""Fingerprints of keys, by which kernels notice that a key is not the one that was indexed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import DIM


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
