"""The operands of a launch: tensors of one attention, under the names kernels have for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor


@dataclass(frozen=True)
class AttentionOperands:
    """The tensors of one attention on a device."""

    query: Tensor
    """[B, Hq, T, D]"""
    key: Tensor
    """[B, Hkv, L, D], with any strides."""
    value: Tensor
    """[B, Hkv, L, Dv], with any strides."""
    captured: Sequence[Tensor] = ()
    """Tensors that score and mask read, in the order of the module's `CAPTURED`."""
    extra: Tensor | None = None
    """Logit of one more key, broadcastable to [B, Hq, T]; None: there is none."""
    extra_value: Tensor | None = None
    """Value of that key, [B, Hq, T, Dv]; None: it adds nothing to the output."""
    key_parts: Sequence[Tensor] = ()
    """Tensors that keys are computed from, if kernels do that; then `key` tells their shape and
    dtype alone."""
    value_parts: Sequence[Tensor] = ()
    """Tensors that values are computed from, likewise."""
    numbers: Sequence[int] = ()
    """Sizes that the expressions of keys and values take besides."""

    heads: int = field(init=False)
    """Number of query heads, Hq."""
    kv_heads: int = field(init=False)
    """Number of KV heads, Hkv."""
    group: int = field(init=False)
    """Number of query heads that share a KV head."""
    query_len: int = field(init=False)
    """Number of query positions, T."""
    kv_len: int = field(init=False)
    """Number of slots, L."""
    rows: int = field(init=False)
    """Number of KV heads times query positions, over the batch: a decode program has one."""

    def __post_init__(self) -> None:
        batch, heads, query_len, _ = self.query.shape
        _, kv_heads, kv_len, _ = self.key.shape
        self.__dict__.update(  # once, as a launch reads them many times
            heads=heads,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            query_len=query_len,
            kv_len=kv_len,
            rows=batch * kv_heads * query_len,
        )

    def arguments(self, module: ModuleType) -> dict[str, object]:
        """Return the arguments of the kernels of `module` that these tensors decide, by name.

        Raises ValueError if the module reads another number of captured tensors.
        """
        query, key, value = self.query, self.key, self.value
        values: list[object] = [
            *(query, *query.stride()),
            *(key, *key.stride()),
            *(value, *value.stride()),
            *(self.heads, self.kv_heads, self.query_len, self.kv_len),
        ]
        for tensor in self.captured:
            values += tensor, *tensor.stride()
        names = _argument_names(module.CAPTURED, tuple([each.ndim for each in self.captured]))
        arguments = dict(zip(names, values, strict=True))
        if self.key_parts:
            arguments["key"] = parts_argument(self.key_parts, self.numbers)
        if self.value_parts:
            arguments["value"] = parts_argument(self.value_parts, self.numbers)
        return arguments

    def key_arguments(self) -> dict[str, object]:
        """Return the arguments of kernels that have keys alone."""
        return _key_arguments(self.key, self.key_parts, self.numbers)


def key_arguments(key: Tensor) -> dict[str, object]:
    """Return the arguments of kernels that have keys [B, Hkv, L, D] alone, stored or computed."""
    if not isinstance(key, LoadedTensor):
        return _key_arguments(key, (), ())
    arguments = _key_arguments(key, key.load.tensors, key.load.numbers)
    return {**arguments, "first_row": key.load.first_row}


def _key_arguments(
    key: Tensor, parts: Sequence[Tensor], numbers: Sequence[int]
) -> dict[str, object]:
    if parts:
        return {"key": parts_argument(parts, numbers)}
    return {"key": key, **strides("", key, "bhld")}


def parts_argument(parts: Sequence[Tensor], numbers: Sequence[int] = ()) -> tuple[object, ...]:
    """Return the one argument of a kernel for several tensors, each with its strides, and sizes."""
    return (*(each for part in parts for each in (part, *part.stride())), *numbers)


@lru_cache(maxsize=256)
def _argument_names(captured: tuple[str, ...], ranks: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of all arguments of a module, whose captured tensors have these ranks."""
    tensors = [("query", "bhtd"), ("key", "bhld"), ("value", "bhld")]
    names = [each for name, dims in tensors for each in _strided_names(name, dims)]
    names += "heads", "kv_heads", "query_len", "kv_len"
    for name, rank in zip(captured, ranks, strict=True):
        names += _strided_names(name, "".join(map(str, range(rank))))
    return tuple(names)


def strided(name: str, tensor: Tensor, dims: str) -> Mapping[str, object]:
    """Return `tensor` under its name, and its strides: `name_stride_b` for the dim "b"."""
    return dict(zip(_strided_names(name, dims), (tensor, *tensor.stride()), strict=True))


def strides(prefix: str, tensor: Tensor, dims: str) -> Mapping[str, int]:
    """Return the strides of `tensor` by name: `<prefix>stride_b` for the dim "b"."""
    return dict(zip(_stride_names(prefix, dims), tensor.stride(), strict=True))


@lru_cache(maxsize=256)
def _strided_names(name: str, dims: str) -> tuple[str, ...]:
    return name, *_stride_names(f"{name}_", dims)


@lru_cache(maxsize=256)
def _stride_names(prefix: str, dims: str) -> tuple[str, ...]:
    return tuple(f"{prefix}stride_{dim}" for dim in dims)
