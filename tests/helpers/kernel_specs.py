"""Specifications whose generated modules are kept as golden files."""

from __future__ import annotations

import math
from dataclasses import replace

import sympy

from lychee_compile.codegen.specification import (
    KV,
    AttentionSpec,
    B,
    Captured,
    D,
    H,
    LoadSpec,
    Q,
    S,
    SparseSpec,
    Stored,
    TileSpec,
)
from lychee_compile.passes.symbolic.elementwise import Flag

LENGTH = Captured("length", "int64", 0)
POSITION = Q + sympy.Symbol("length", integer=True)
MASK = Flag(sympy.Indexed(sympy.IndexedBase("mask"), B, 0, Q, KV))
MASK_BY_HEAD = Flag(sympy.Indexed(sympy.IndexedBase("mask"), B, H, Q, KV))
SLOPE = sympy.Indexed(sympy.IndexedBase("slopes"), H)
SPARSE = SparseSpec("lychee", 1024, sinks=16, recent=64, overfetch=16, flat_tokens=65536)
QUEST, HISA, FASA, DHSA, LYCHEECLUSTER, CLUSTERKV = (
    replace(SPARSE, policy=name)
    for name in ("quest", "hisa", "fasa", "dhsa", "lycheecluster", "clusterkv")
)


def stored(name: str, dtype: str, *sizes: int | None) -> tuple[sympy.IndexedBase, Stored]:
    """Return a tensor of an expression, and what a kernel knows of it."""
    integer = {"integer": True} if "int" in dtype else {}
    return sympy.IndexedBase(sympy.Symbol(name, **integer)), Stored(name, dtype, sizes)


def rotated_bytes() -> LoadSpec:
    """Return keys of 128 channels: int8, a scale per token, rotated in halves when read."""
    cache, cosines = stored("key_0", "int8", None, None, None, 128), ("bfloat16", None, 64)
    scale = stored("key_1", "float32", None, None, None, None)
    cos, sin = stored("key_2", *cosines), stored("key_3", *cosines)

    def number(channel: sympy.Expr) -> sympy.Expr:
        return cache[0][B, H, KV, channel] * scale[0][B, H, KV, 0]

    low = number(D) * cos[0][KV, D] - number(D + 64) * sin[0][KV, D]
    high = number(D) * cos[0][KV, D - 64] + number(D - 64) * sin[0][KV, D - 64]
    element = sympy.Piecewise((low, D < 64), (high, True))
    return LoadSpec(element, (cache[1], scale[1], cos[1], sin[1]))


def float8(scale: sympy.Expr) -> LoadSpec:
    """Return values of 8 bits, with one scale for all."""
    cache, tensor = stored("value_0", "float8_e4m3fn", None, None, None, 128)
    return LoadSpec(cache[B, H, KV, D] * scale, (tensor, Stored(str(scale), "float32", ())))


def paged_bytes() -> LoadSpec:
    """Return keys of 128 channels: int8 in pages of 16 tokens, a scale and zero point per group."""
    table, cache = stored("key_0", "int32", None, None), stored("key_1", "int8", *[None] * 3, 128)
    unit, zero = (stored(name, "float16", *[None] * 3, 4) for name in ("key_2", "key_3"))
    page, slot = sympy.Mod(table[0][B, sympy.floor(KV / 16)], 4096), sympy.Mod(KV, 16)
    group = page, slot, H, sympy.floor(D / 32)
    element = (cache[0][page, slot, H, D] - zero[0][group]) * unit[0][group]
    return LoadSpec(element, (table[1], cache[1], unit[1], zero[1]))


SPECS = {
    "exact_causal": AttentionSpec(
        "float32", 1, 64, 64, S / 8, visible=POSITION >= KV, captured=(LENGTH,)
    ),
    "sparse_llama": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), POSITION >= KV, (LENGTH,), sparse=SPARSE
    ),
    "exact_softcap_window": AttentionSpec(
        "bfloat16",
        2,
        256,
        256,
        50 * sympy.tanh(S / 16 / 50),
        visible=sympy.And(POSITION >= KV, POSITION - 4096 < KV),
        captured=(LENGTH,),
    ),
    "sparse_by_mass": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(SPARSE, coverage=0.95),
    ),
    "sparse_drawn": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(SPARSE, draws=True),
    ),
    "sparse_certified": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(SPARSE, epsilon=0.1),
    ),
    "sparse_mask_extra_logit": AttentionSpec(
        "bfloat16", 8, 64, 64, S / 8, MASK, (Captured("mask", "bool", 4),), True, SPARSE
    ),
    "sparse_slopes_odd_sizes": AttentionSpec(
        "float16",
        3,
        80,
        64,
        S / math.sqrt(80) + SLOPE * (KV - POSITION),
        visible=POSITION >= KV,
        captured=(LENGTH, Captured("slopes", "float32", 1)),
        sparse=SPARSE,
    ),
    "quest_llama": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), POSITION >= KV, (LENGTH,), sparse=QUEST
    ),
    "quest_certified": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(QUEST, epsilon=0.1),
    ),
    "quest_mask_by_head_odd_sizes": AttentionSpec(
        "float32",
        3,
        80,
        64,
        S / math.sqrt(80),
        sympy.And(MASK_BY_HEAD, POSITION >= KV),
        (Captured("mask", "bool", 4), LENGTH),
        sparse=QUEST,
    ),
    "hisa_llama": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), POSITION >= KV, (LENGTH,), sparse=HISA
    ),
    "fasa_by_mass_odd_sizes": AttentionSpec(
        "float16",
        3,
        80,
        64,
        S / math.sqrt(80),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(FASA, coverage=0.9),
    ),
    "lycheecluster_llama": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), POSITION >= KV, (LENGTH,), sparse=LYCHEECLUSTER
    ),
    "dhsa_slopes_mask_odd_sizes": AttentionSpec(
        "float16",
        3,
        80,
        64,
        S / math.sqrt(80) + SLOPE * (KV - POSITION),
        sympy.And(MASK, POSITION >= KV),
        (Captured("mask", "bool", 4), LENGTH, Captured("slopes", "float32", 1)),
        sparse=DHSA,
    ),
    "clusterkv_mask_by_head": AttentionSpec(
        "float32",
        2,
        64,
        64,
        S / 8,
        sympy.And(MASK_BY_HEAD, POSITION >= KV),
        (Captured("mask", "bool", 4), LENGTH),
        sparse=CLUSTERKV,
    ),
    "sparse_loads_certified": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(SPARSE, epsilon=0.1),
        keys=rotated_bytes(),
        values=float8(sympy.Symbol("value_1")),
    ),
    "fasa_loads_by_mass": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128),
        POSITION >= KV,
        (LENGTH,),
        sparse=replace(FASA, coverage=0.9),
        keys=paged_bytes(),
    ),
    "prefill_llama": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), KV <= Q, tiles=TileSpec("lychee", 16, 64)
    ),
    "prefill_listed_slopes": AttentionSpec(
        "bfloat16",
        4,
        128,
        128,
        S / math.sqrt(128) + SLOPE * (KV - Q),
        KV <= Q,
        (Captured("slopes", "float32", 1),),
        tiles=TileSpec("mine", 16, 64),  # a policy of one's own
    ),
    "prefill_streaming": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), KV <= Q, tiles=TileSpec("streaming", 16, 64)
    ),
    "prefill_s2o": AttentionSpec(
        "bfloat16", 4, 128, 128, S / math.sqrt(128), KV <= Q, tiles=TileSpec("s2o", 16, 64)
    ),
    "prefill_groups_slopes": AttentionSpec(
        "float16",
        3,
        80,
        64,
        S / math.sqrt(80) + SLOPE * (KV - Q),
        KV <= Q,
        (Captured("slopes", "float32", 1),),
        tiles=TileSpec("dhsa", 16, 64),
    ),
    "prefill_mask_softcap_odd_sizes": AttentionSpec(
        "float16",
        3,
        80,
        64,
        30 * sympy.tanh(S / 8 / 30),
        sympy.And(MASK, POSITION - 4096 < KV),
        (Captured("mask", "bool", 4), LENGTH),
        extra=True,
        tiles=TileSpec("lychee", 16, 64),
    ),
}
