"""Names that every template can read, for one site."""

from __future__ import annotations

from functools import lru_cache

from lychee_compile.codegen.bounds import visible_range
from lychee_compile.codegen.rendering import render, render_text
from lychee_compile.codegen.specification import AttentionSpec, Captured, H
from lychee_compile.kernels.sizes import power_of_two


def fill(template: str, spec: AttentionSpec, **values: object) -> str:
    """Return the text of a template for a site. `values` are the holes of this template alone."""
    return render(template, _site_values(spec) | values)


def fill_text(text: str, spec: AttentionSpec, **values: object) -> str:
    """Return `text`, a Jinja template of your own, filled for a site as `fill` fills a file.

    `values` are the holes of this text alone. It may import the fragments of this package and
    extend its templates, above all "decode/attend.py.jinja".
    """
    return render_text(text, _site_values(spec) | values)


def sees_range(spec: AttentionSpec) -> bool:
    """True if the keys that a query sees are a range of slots, the same for all heads."""
    return visible_range(spec.visible) is not None


def precision(spec: AttentionSpec) -> str:
    """Return the last argument of a product: tensor cores round float32 unless told not to."""
    return ', input_precision="ieee"' if spec.dtype == "float32" else ""


@lru_cache(maxsize=16)
def _site_values(spec: AttentionSpec) -> dict[str, object]:
    """Return the holes that every template has.

    spec        the specification
    captured    ", name" for each parameter of the captured tensors: the end of a list of parameters
                or arguments
    precision   the last argument of a product: tensor cores round float32 unless told not to
    is_range    True if the keys that a query sees are a range of slots, the same for all heads
    by_written  ", written" if recent tokens count back from the slots written, else ""
    by_mass     True if a choice ends once it holds a share of the softmax
    draws       True if tokens of small shares are drawn by chance
    certified   True if the share of the softmax that is not read is bounded
    key_operand, value_operand  parameters, or arguments, for all keys or values: a pointer and
                strides; or one tuple, if they are a load
    key_own     the same for functions that have keys alone: their strides have shorter names
    key_at      the same for functions of one row and KV head; a load needs the KV head by name
    kv_at       the same for keys and values
    by_head     True if query heads of one group can see different keys
    wide        a cast to 64 bits, if a mask can have more elements than 32 bits count; else ""
    stage       the kernel that decode/attend.py.jinja becomes, "attend" or "choose"
    rows        query heads of a group, padded to what a tensor core's product takes
    heads       query heads of a group, up to a power of two
    dim, width  head_dim and value_dim, padded to what a tensor core's product takes
    """
    return {
        "spec": spec,
        "captured": "".join(f", {name}" for each in spec.captured for name in _parameters(each)),
        "precision": precision(spec),
        "is_range": sees_range(spec),
        "by_written": "" if sees_range(spec) else ", written",
        "by_mass": spec.sparse is not None and spec.sparse.coverage is not None,
        "draws": spec.sparse is not None and spec.sparse.draws,
        "certified": spec.sparse is not None and spec.sparse.epsilon is not None,
        "by_head": spec.visible.has(H),
        "wide": ".to(tl.int64)" if any(each.rank > 1 for each in spec.captured) else "",
        "stage": "attend",
        **_loads(spec),
        "rows": power_of_two(spec.group, 16),
        "heads": power_of_two(spec.group),
        "dim": power_of_two(spec.head_dim, 16),
        "width": power_of_two(spec.value_dim, 16),
    }


def _loads(spec: AttentionSpec) -> dict[str, str]:
    """Return the holes for keys and values."""

    def operand(name: str, is_load: bool, dims: str, prefix: str = "") -> str:
        return ", ".join([name, *(f"{prefix}stride_{dim}" for dim in dims if not is_load)])

    keys, values = spec.keys is not None, spec.values is not None
    key, value = operand("key", keys, "ld", "key_"), operand("value", values, "ld", "value_")
    return {
        "key_operand": operand("key", keys, "bhld", "key_"),
        "value_operand": operand("value", values, "bhld", "value_"),
        "key_own": operand("key", keys, "bhld"),
        "key_at": f"kv_head, {key}" if keys else key,
        "kv_at": f"kv_head, {key}, {value}" if keys or values else f"{key}, {value}",
    }


def _parameters(tensor: Captured) -> list[str]:
    """Return the names of a captured tensor's parameters: a pointer and its strides."""
    return [tensor.name, *(f"{tensor.name}_stride_{dim}" for dim in range(tensor.rank))]
