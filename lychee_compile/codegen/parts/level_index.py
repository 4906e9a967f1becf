"""Kernels of levels that bring an index up to date with the keys that a step has written."""

from __future__ import annotations

from lychee_compile.codegen.level_source import summary_source
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.specification import AttentionSpec, SparseSpec
from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.groups import Chunks
from lychee_compile.kernels.sizes import power_of_two

NUMBERS_AT_ONCE = 4096
"""Numbers of the keys of a group that are summarised at a time."""


def parts_of_chunks(stack: LevelStack) -> str:
    """Return the parts of an index that new chunks are written to, as parameters."""
    number, fields = len(stack.levels) - 1, stack.levels[-1].fields
    labels = f"label_{number}, open_{number}, " if number else ""
    return f"strength, span, numbers, {labels}" + "".join(f"summary_{name}, " for name in fields)


def emit_index_new(
    spec: AttentionSpec, stack: LevelStack, sparse: SparseSpec, shared: dict[str, object]
) -> str:
    """Return what brings the index up to date with the slots that a step has written."""
    if shared["last_kind"] == "token clusters":
        return fill("levels/index_waiting.py.jinja", spec, **shared)
    if shared["last_kind"] == "pages":
        levels = [_described(spec, *each) for each in enumerate(stack.levels)]
        return fill("levels/index_pages.py.jinja", spec, **shared, levels=levels)
    return emit_index_chunks(spec, stack, sparse, shared)


def emit_index_chunks(
    spec: AttentionSpec, stack: LevelStack, sparse: SparseSpec, shared: dict[str, object]
) -> str:
    """Return what cuts and summarises the chunks that a step closes."""
    similar, level = sparse.groups.by_similarity, _described(spec, 0, stack.levels[-1])
    level["tile"] = min(power_of_two(sparse.groups.chunk[1]), 16)
    return fill("levels/index_chunks.py.jinja", spec, **shared, level=level, by_similarity=similar)


def _described(spec: AttentionSpec, number: int, level: Level) -> dict[str, object]:
    """Return what templates read of the summaries of a level."""
    rounds = spec.dtype != "float32" and (level.rounds_fields or isinstance(level.groups, Chunks))
    source = summary_source(level, spec.head_dim, f"tl.{spec.dtype}" if rounds else None)
    tile = min(level.groups.size, max(NUMBERS_AT_ONCE // power_of_two(spec.head_dim, 16), 16))
    return {
        "number": number,
        "tile": tile,
        "passes": source.passes,
        "fields": [(name, wide, source.fields[name]) for name, wide in level.channels.items()],
    }
