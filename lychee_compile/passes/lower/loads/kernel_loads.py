"""Keys and values that generated kernels compute from what is stored.

    keys = cache.to(float32) * scale            key_0[b, h, kv, d] * key_1[b, h, kv, 0]

A kernel gets the tensors of such an expression instead of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import sympy
import torch
import torch.fx
from torch import Tensor

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.load_source import load_source
from lychee_compile.codegen.specification import LoadSpec, Stored
from lychee_compile.kernels.gpu.methods import able
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.call_numbers import emit_number
from lychee_compile.passes.detect.caching.load_text import load_text
from lychee_compile.passes.detect.caching.loads import CHANNEL, Load
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.graph.dataflow import shape_of, value_of
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.kernel_support import NoKernel, check_in_place, static
from lychee_compile.passes.lower.rearrange import Size
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.elements import symbol_of


@dataclass(frozen=True)
class KernelLoads:
    """Keys and values of one attention, of which kernels compute at least one."""

    keys: LoadSpec | None
    """Keys as an expression; None: `key_nodes` is the tensor that holds them."""
    values: LoadSpec | None
    key_nodes: list[torch.fx.Node]
    """Tensors that keys are computed from, in the order of `keys`."""
    value_nodes: list[torch.fx.Node]
    sizes: tuple[Size, ...]
    """Sizes [B, Hkv, L, D, Dv], as numbers or as nodes."""
    dtype: torch.dtype
    key_text: str
    """Expression of keys as `kernels.reference.loads` evaluates it; "" if they are a tensor."""
    numbers: tuple[Size, ...] = ()
    """Sizes that the expressions take besides, as numbers or as nodes."""

    def shape_of_keys(self) -> Tensor | None:
        """Return a tensor of the shape and dtype of keys, without numbers.

        The result is None if the shape is known only when the graph is called.
        """
        if not all(isinstance(size, int) for size in self.sizes[:4]):
            return None
        return torch.empty(self.sizes[:4], dtype=self.dtype, device="meta")  # type: ignore[arg-type]


def no_load(
    attention: Attention, binding: CacheBinding, policy: str | None = None
) -> Reason | None:
    """Return why kernels cannot compute the keys of a cache; None if they can, or need not.

    `policy` is that by which kernels select; None: they read all keys.
    """
    if binding.load is not None and policy is not None and not able(policy, "computes_keys"):
        why = f"those of policy {policy!r} read keys as they are stored"
        return reasons.KEYS_COMPUTED_NO_KERNEL(why=why)
    try:
        _specification(binding, attention, values=False)
    except Unprintable as why:
        return reasons.KEYS_COMPUTED_NO_KERNEL(why=why)
    return None


def is_loaded(attention: Attention, binding: CacheBinding) -> bool:
    """True if kernels compute keys or values. The keys of the cache have no `no_load`."""
    return binding.load is not None or _of_values(attention, binding) is not None


def kernel_loads(
    attention: Attention, binding: CacheBinding, canonical: Canonicaliser
) -> KernelLoads:
    """Emit what kernels compute keys and values from. Raises `NoKernel` and `RewriteError`.

    Values whose expression has no Triton form are computed by the graph.
    """
    if reason := no_load(attention, binding):
        raise NoKernel(reason)
    roles = attention.roles
    axes = roles.batch, roles.kv_heads, roles.key, roles.head_dim, roles.value_dim
    values = _of_values(attention, binding)
    return KernelLoads(
        _specification(binding, attention, values=False),
        values,
        _leaves(binding.load) or [_as_stored("keys", attention.key, canonical.key())],
        _leaves(binding.values)
        if values is not None
        else [_as_stored("values", attention.value, canonical.value())],
        tuple(map(canonical.extent, axes)),
        value_of(attention.query.node).dtype,
        "" if binding.load is None else load_text(binding.load, binding.numbers) or "",
        tuple(emit_number(each, canonical.emit) for each in binding.numbers),
    )


def _as_stored(name: str, operand: Operand, node: torch.fx.Node) -> torch.fx.Node:
    """Return the node of an operand that is a tensor. Raises `NoKernel` if it had to be copied."""
    check_in_place(name, operand.node, node)
    return node


def _leaves(load: Load | None) -> list[torch.fx.Node]:
    return [] if load is None else [leaf for _, leaf in load.leaves]


def _of_values(attention: Attention, binding: CacheBinding) -> LoadSpec | None:
    try:
        return _specification(binding, attention, values=True)
    except Unprintable:
        return None


def _specification(binding: CacheBinding, attention: Attention, *, values: bool) -> LoadSpec | None:
    """Return what a kernel computes of keys or values. Raises Unprintable."""
    load = binding.values if values else binding.load
    if load is None:
        return None
    device = value_of(attention.query.node).device
    for name, leaf in load.leaves:
        if value_of(leaf).device != device:
            raise Unprintable(f"{name} is not on {device}")
    axes = attention.roles.value_dim if values else attention.roles.head_dim
    count = static(attention.size(axes), "the number of channels")
    spec = load_specification(load, "value" if values else "key", binding.numbers)
    load_source(spec, "VALUE_DIM" if values else "HEAD_DIM", count)
    return spec


def load_specification(load: Load, prefix: str, sizes: Sequence[sympy.Symbol] = ()) -> LoadSpec:
    """Return what a kernel computes of a load, whose tensors are named `<prefix>_<number>`.

    `sizes` are those that only a call tells, in its order: they are named `<prefix>_size_<number>`.
    Indices that a tensor holds count from the end if they are negative. Raises Unprintable if it
    takes a size for that which is not known.
    """
    nodes = dict(load.leaves)
    element = load.element.replace(
        lambda each: isinstance(each, sympy.Indexed), partial(_from_front, nodes)
    )
    names: dict[sympy.Basic, sympy.Symbol] = {}
    tensors = []
    for number, (name, leaf) in enumerate(load.leaves):
        dtype = value_of(leaf).dtype
        names[symbol_of(name, dtype)] = symbol_of(f"{prefix}_{number}", dtype)
        short = str(dtype).removeprefix("torch.")
        tensors.append(Stored(f"{prefix}_{number}", short, _sizes(load, name, leaf)))
    numbers = [
        sympy.Symbol(f"{prefix}_size_{place}", integer=True, nonnegative=True)
        for place in range(len(sizes))
    ]
    names |= dict(zip(sizes, numbers, strict=True))
    return LoadSpec(element.xreplace(names), tuple(tensors), tuple(numbers))


def _from_front(nodes: dict[str, torch.fx.Node], element: sympy.Indexed) -> sympy.Indexed:
    base, *indices = element.args
    found = []
    for index, size in zip(indices, shape_of(nodes[str(base)]), strict=True):
        if index.atoms(sympy.Indexed) and not index.is_nonnegative:
            if not isinstance(size, int):
                raise Unprintable(f"{index} may be negative, and the size of {base} is not known")
            index = sympy.Mod(index, size)  # noqa: PLW2901  each is what becomes of an index
        found.append(index)
    return sympy.Indexed(base, *found)


def _sizes(load: Load, name: str, leaf: torch.fx.Node) -> tuple[int | None, ...]:
    """Return the sizes of a leaf along dimensions whose index depends on the channel."""
    reads = load.reads_of(name)
    return tuple(
        size if isinstance(size, int) and any(each[dim].has(CHANNEL) for each in reads) else None
        for dim, size in enumerate(shape_of(leaf))
    )
