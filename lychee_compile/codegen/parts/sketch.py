"""Sketches of keys: how queries score them, how keys are made into them."""

from __future__ import annotations

from collections.abc import Sequence

from lychee_compile.codegen.parts.terms import captured
from lychee_compile.codegen.specification import KV, AttentionSpec
from lychee_compile.kernels.gpu.lychee.layout import PAGE_MIDDLE, PAGE_STEP, Field, planes
from lychee_compile.kernels.reference.sketch import STEPS
from lychee_compile.kernels.sizes import PAGE, SCAN_SLOTS, power_of_two

_BASE = 128
"""What codes are added to: a bfloat16 of this size has them in its last bits."""
_VARIANCE = {bits: step**-2 for bits, step in STEPS.items()}
"""Of coordinates over a block, in steps, by their bits."""
PROBES = 16
"""Slots of a block, up to its newest, at which a score that depends on the slot is looked at."""


def emit_sketch_constants(spec: AttentionSpec, paged: bool) -> str:
    """How sketches of this head_dim are packed."""
    fine, coarse = planes(spec.head_dim)
    kept = sum(field.width for field in fine + coarse)
    zero = PAGE_MIDDLE + PAGE_STEP * _BASE
    page_zero = f"\nPAGE_ZERO = tl.constexpr({zero})  # of its codes, in steps" if paged else ""
    return f"""
TILE = tl.constexpr({SCAN_SLOTS})  # slots that a program of the scan takes
PAGE = tl.constexpr({PAGE})  # slots summarised together
KEPT = tl.constexpr({kept})  # coordinates of a sketch
KEPT_COLUMNS = tl.constexpr({power_of_two(kept, 16)})
KEPT_FINE = tl.constexpr({sum(field.width for field in fine)})  # those of 4 bits
FINE_BYTES = tl.constexpr({fine[0].width})
FINE_COLUMNS = tl.constexpr({_columns(fine[0])})
COARSE_BYTES = tl.constexpr({coarse[0].width})
COARSE_COLUMNS = tl.constexpr({_columns(coarse[0])})
PAGE_STEP = tl.constexpr({PAGE_STEP})  # of a page's mean, in steps of a coordinate{page_zero}
IN_REGISTERS = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no PTX
"""


def weight_names(spec: AttentionSpec) -> str:
    """What the weights of a sketch's fields are called, one after the other."""
    return ", ".join(f"w{place}" for place in range(sum(map(len, planes(spec.head_dim)))))


def emit_weigh(spec: AttentionSpec, paged: bool) -> str:
    """`weigh`: what a query makes of the codes of each block, and of its pages where they count."""
    fine, coarse = planes(spec.head_dim)
    zeros = "".join(
        f"""
    constant -= {_BASE + field.offset} * tl.sum(tl.where({_within(field)}, rounded, 0.0), 1)"""
        for field in _joined(fine) + _joined(coarse)
    )
    extra = captured(spec)
    variance, of_pages, cleared = _WEIGH_PAGES if paged else ("", "", "")
    return f'''
@triton.jit
def weigh(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    axes, centre, step, spread, weights, constants, page_constants, totals, histogram, arrivals,
    positions, position_stride_b, position_stride_t, written, header,
    kv_len, blocks, kv_heads: tl.constexpr, query_len{extra},
    BLOCK: tl.constexpr, PAGED: tl.constexpr, EARLY: tl.constexpr,
):
    """Weights of the codes of a block in q.k, and what is left of it.

    By second-order cumulants the log of the mean of exp(score) over keys of variance v is that of
    their mean and scale / 2 sum w^2 v: over a whole block it stands for its part of the softmax's
    denominator. Clears what later kernels count.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    block = (b * kv_heads + kv_head).to(tl.int64) * blocks + tile
    kept, d, g = tl.arange(0, KEPT_COLUMNS), tl.arange(0, DIM), tl.arange(0, ROWS)
    axis = tl.load(
        axes + (block * KEPT + kept)[None, :] * HEAD_DIM + d[:, None],
        mask=(kept < KEPT)[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
    )
    steps = tl.load(step + block * KEPT + kept, mask=kept < KEPT, other=0.0)
    middle = tl.load(centre + block * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0){variance}
    # All above was written long ago. What follows may be of the very kernel before this one, and
    # the next, which read it too, must not begin while that still runs.
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    exact = tl.dot(queries, axis.to(queries.dtype)) * steps[None, :]
    weight = exact.to(tl.bfloat16)
    rounded = weight.to(tl.float32)
    constant = tl.sum(queries.to(tl.float32) * middle[None, :], 1)
{of_pages}    moved = tl.where(kept < KEPT_FINE, {_VARIANCE[4]:.4f}, {_VARIANCE[2]:.4f})
    of_block = constant + 0.5 * SCALE * tl.sum(exact * exact * moved[None, :], 1){zeros}
    mine = head_row.to(tl.int64) * blocks + tile
    tl.store(weights + (mine * ROWS + g[:, None]) * KEPT_COLUMNS + kept[None, :], weight)
    tl.store(constants + mine * ROWS + g, constant)
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    held = tl.minimum(fresh - tile * BLOCK, BLOCK)
{_block_bits(spec)}
    whole += tl.log2(tl.maximum(held, 1).to(tl.float32))
    tl.store(totals + mine * ROWS + g, tl.where(held > 0, whole, -1e30))
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32)){cleared}


@triton.jit
def load_weights(weights, mine, FIRST: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """The weights [ROWS, COLUMNS] of the coordinates from FIRST on."""
    column, g = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    place = weights + (mine * ROWS + g[:, None]) * KEPT_COLUMNS + FIRST + column[None, :]
    return tl.load(place, mask=(column < WIDE)[None, :], other=0.0)


@triton.jit
def codes(packed, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """The codes at SHIFT in the bytes `packed`, plus {_BASE}, as bfloat16.

    They are put into the mantissa of {_BASE}.0, two at a time: that spares converting them.
    """
    if IN_REGISTERS:
        made = tl.inline_asm_elementwise(
            f"""{{{{
            .reg .b32 moved, low, high;
            shr.b32 moved, $2, {{SHIFT}};
            prmt.b32 low, moved, 0, 0x4140;
            prmt.b32 high, moved, 0, 0x4342;
            lop3.b32 $0, low, {{MASK * 0x10001}}, 0x43004300, 0xEA;
            lop3.b32 $1, high, {{MASK * 0x10001}}, 0x43004300, 0xEA;
            }}}}""",
            "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4,
        )
    else:
        made = (((packed.to(tl.int16) >> SHIFT) & MASK) | 0x4300).to(tl.bfloat16, bitcast=True)
    return made
'''


_WEIGH_PAGES = (
    """
    variance = tl.zeros([KEPT_COLUMNS], tl.float32)
    if PAGED:
        variance = tl.load(spread + block * KEPT_FINE + kept, mask=kept < KEPT_FINE, other=0.0)""",
    """    if PAGED:
        # Of a page, whose variance is the usual one, the same by second-order cumulants.
        zero = PAGE_ZERO * tl.sum(tl.where((kept < KEPT_FINE)[None, :], rounded, 0.0), 1)
        of_page = constant + 0.5 * SCALE * tl.sum(exact * exact * variance[None, :], 1) - zero
        tl.store(page_constants + (head_row.to(tl.int64) * blocks + tile) * ROWS + g, of_page)
""",
    """
        if PAGED:
            tl.store(arrivals + head_row, 0)""",
)
"""What `weigh` does besides: loads, scores of pages by their codes, and what it clears."""


def _block_bits(spec: AttentionSpec) -> str:
    """The score, in bits, of `of_block`: where slots matter, the mean over some that are seen."""
    extra = captured(spec)
    if KV not in spec.score.free_symbols:
        return f"""    first = (tile * BLOCK + tl.zeros([1, 1], tl.int32))
    bits = score(of_block[:, None], b, heads[:, None], t, first, first < kv_len{extra})
    whole = tl.max(bits, 1)"""
    return f"""    probe = tl.maximum((1 + tl.arange(0, {PROBES})) * held // {PROBES} - 1, 0)
    slot = tile * BLOCK + probe[None, :]
    seen = visible(b, heads[:, None], t, slot, kv_len, slot < kv_len{extra})
    bits = score(of_block[:, None], b, heads[:, None], t, slot, slot < kv_len{extra})
    bits = tl.where(seen, bits, -1e30)
    most = tl.max(bits, 1)
    whole = most + tl.log2(tl.sum(tl.exp2(bits - most[:, None]), 1) / {PROBES})"""


def emit_sketch_scores(spec: AttentionSpec) -> str:
    """`sketch_scores`: estimates of q.k from the sketches of a block."""
    fine, coarse = planes(spec.head_dim)
    names = weight_names(spec).split(", ")
    loads = "".join(
        _load(name, field, "FINE" if field in fine else "COARSE")
        for name, field in zip(names, fine + coarse, strict=True)
    )
    products = _products("packed", fine, names[: len(fine)])
    products += _products("packed_coarse", coarse, names[len(fine) :])
    return f'''
@triton.jit
def load_codes(fine, coarse, slot, inside):
    """Packed codes, uint8 [FINE_COLUMNS, N] and [COARSE_COLUMNS, N], of the slots [N]."""
    byte, column = tl.arange(0, FINE_COLUMNS), tl.arange(0, COARSE_COLUMNS)
    packed = tl.load(
        fine + slot[None, :] * FINE_BYTES + byte[:, None],
        mask=inside[None, :] & (byte < FINE_BYTES)[:, None], other=0,
    )
    packed_coarse = tl.load(
        coarse + slot[None, :] * COARSE_BYTES + column[:, None],
        mask=inside[None, :] & (column < COARSE_BYTES)[:, None], other=0,
    )
    return packed, packed_coarse


@triton.jit
def sketch_scores(packed, packed_coarse, weights, constants, mine):
    """Estimates [ROWS, N] of q.k from packed codes of the block whose weights are `mine`."""
    constant = tl.load(constants + mine * ROWS + tl.arange(0, ROWS)){loads}
    total = tl.zeros([ROWS, packed.shape[1]], tl.float32) + constant[:, None]{products}
    return total
'''


def emit_encoder(spec: AttentionSpec) -> str:
    """`encode_keys` and `page_means`: sketches of keys, and what pages of them are summed up to."""
    fine, coarse = planes(spec.head_dim)
    return f'''
@triton.jit
def field_codes(
    centred, axes, step,
    FIRST: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):
    """Codes, int32 [N, COLUMNS], of the coordinates from FIRST on."""
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DIM)
    inside = (column < WIDE)[None, :] & (d < HEAD_DIM)[:, None]
    axis = tl.load(axes + (FIRST + column)[None, :] * HEAD_DIM + d[:, None], mask=inside, other=0.0)
    steps = tl.load(step + FIRST + column, mask=column < WIDE, other=0.0)[None, :]
    level = tl.dot(centred.to(axis.dtype), axis) / tl.maximum(steps, 1e-30)
    level = tl.where((steps > 0) & (level == level), level, 0.0)  # of a NaN, nothing
    code = tl.floor(tl.minimum(tl.maximum(level, -1.0 * (LEVELS // 2)), 1.0 * LEVELS)) + LEVELS // 2
    code = tl.minimum(code, LEVELS - 1).to(tl.int32)
    return tl.where((column < WIDE)[None, :], code, 0)


@triton.jit
def encode_keys(keys, axes, centre, step):
    """Packed codes, uint8 [N, FINE_COLUMNS] and [N, COARSE_COLUMNS], of keys [N, DIM]."""
    d = tl.arange(0, DIM)
    middle = tl.load(centre + d, mask=d < HEAD_DIM, other=0.0)
    centred = keys - middle[None, :]
    fine = {_packed("FINE", fine)}
    coarse = {_packed("COARSE", coarse)}
    return fine.to(tl.uint8), coarse.to(tl.uint8)


@triton.jit
def page_code(mean):
    """The 4-bit code of a page's mean code, float32."""
    code = tl.floor((mean - 7.5) / PAGE_STEP + 8.0)
    return tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)
'''


def _columns(field: Field) -> int:
    return power_of_two(field.width, 16)


def _joined(fields: Sequence[Field]) -> list[Field]:
    """Consecutive fields of one offset as one."""
    return [fields[0]._replace(width=sum(field.width for field in fields))] if fields else []


def _within(field: Field) -> str:
    last = field.first + field.width
    low = f"(kept >= {field.first}) & " if field.first else ""
    return f"({low}(kept < {last}))[None, :]"


def _load(name: str, field: Field, plane: str) -> str:
    return (
        f"\n    {name} = load_weights(weights, mine, {field.first}, {field.width}, {plane}_COLUMNS)"
    )


def _products(packed: str, fields: Sequence[Field], names: Sequence[str]) -> str:
    return "".join(
        f"""
    total = tl.dot({name}, codes({packed}, {field.shift}, {2**field.bits - 1}), total)"""
        for name, field in zip(names, fields, strict=True)
    )


def _packed(plane: str, fields: Sequence[Field]) -> str:
    parts = [
        f"field_codes(centred, axes, step, {field.first}, {field.width}, {plane}_COLUMNS, "
        f"{2**field.bits})" + (f" << {field.shift}" if field.shift else "")
        for field in fields
    ]
    return f"\n    {plane.lower()} |= ".join(parts)
