"""The functions that compute keys and values from what is stored: `load_key` and `load_value`."""

from __future__ import annotations

from lychee_compile.codegen.load_source import load_source
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.specification import AttentionSpec, LoadSpec


def emit_loads(spec: AttentionSpec) -> list[str]:
    """Return `load_key`, `load_one_key` and `load_value`, as far as keys and values are loads.

    Raises Unprintable for an expression without a Triton form.
    """
    loads = [("key", spec.keys, "HEAD_DIM", spec.head_dim)]
    loads.append(("value", spec.values, "VALUE_DIM", spec.value_dim))
    found = [_emit(spec, *each) for each in loads if each[1] is not None]
    names = ", ".join(f'"{name}"' for name, load, *_ in loads if load is not None)
    comma = "," if len(found) == 1 else ""
    return [f"LOADS = ({names}{comma})  # operands that are tuples of tensors", *found] * bool(found)


def _emit(
    spec: AttentionSpec, name: str, load: LoadSpec | None, channels: str, count: int
) -> str:
    assert load is not None
    source = load_source(load, channels, count)
    names = [part for each in load.tensors for part in _parameters(each.name, len(each.sizes))]
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
