"""The functions that compute keys and values from what is stored: `load_key` and `load_value`."""

from __future__ import annotations

from lychee_compile.codegen.load_source import ITEM_BYTES, LoadSource, load_source
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.specification import AttentionSpec, LoadSpec


def emit_loads(spec: AttentionSpec) -> list[str]:
    """Return `load_key`, `load_one_key` and `load_value`, as far as keys and values are loads.

    Raises Unprintable for an expression without a Triton form.
    """
    loads = [("key", spec.keys, "HEAD_DIM", spec.head_dim)]
    loads.append(("value", spec.values, "VALUE_DIM", spec.value_dim))
    functions, names, size = [], [], 0
    for name, load, channels, count in loads:
        if load is None:
            size += count * ITEM_BYTES[spec.dtype]
            continue
        source = load_source(load, channels, count)
        functions.append(_function(spec, name, load, source, channels))
        names.append(f'"{name}"')
        size += source.bytes_read
    if not functions:
        return []
    comma = "," if len(names) == 1 else ""
    constants = (
        f"LOADS = ({', '.join(names)}{comma})  # operands that are tuples of tensors\n"
        f"ENTRY_BYTES = {size}  # bytes that one key and its value are computed from"
    )
    return [constants, *functions]


def _function(
    spec: AttentionSpec, name: str, load: LoadSpec, source: LoadSource, channels: str
) -> str:
    names = [part for each in load.tensors for part in _parameters(each.name, len(each.sizes))]
    names += map(str, load.numbers)
    return fill(
        "common/load.py.jinja",
        spec,
        name=name,
        formula=load.element,
        parts=", ".join(names) + ("," if len(names) == 1 else ""),
        reads=source.reads,
        result=source.result,
        channels=channels,
    )


def _parameters(name: str, rank: int) -> list[str]:
    return [name, *(f"{name}_stride_{dim}" for dim in range(rank))]
