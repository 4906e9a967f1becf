"""The operands of a launch: tensors of one attention, under the names kernels have for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from torch import Tensor


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
    """Logit of a key without a value, broadcastable to [B, Hq, T]; None: there is none."""

    @property
    def heads(self) -> int:
        """Number of query heads, Hq."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Number of KV heads, Hkv."""
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Number of query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def query_len(self) -> int:
        """Number of query positions, T."""
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        """Number of slots, L."""
        return self.key.shape[2]

    @property
    def rows(self) -> int:
        """Number of KV heads times query positions, over the batch: a decode program has one."""
        return self.query.shape[0] * self.kv_heads * self.query_len

    def arguments(self, module: ModuleType) -> dict[str, object]:
        """Return the arguments of the kernels of `module` that these tensors decide, by name.

        Raises ValueError if the module reads another number of captured tensors.
        """
        named: dict[str, object] = {
            **strided("query", self.query, "bhtd"),
            **strided("key", self.key, "bhld"),
            **strided("value", self.value, "bhld"),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "query_len": self.query_len,
            "kv_len": self.kv_len,
        }
        for name, tensor in zip(module.CAPTURED, self.captured, strict=True):
            named.update(strided(name, tensor, "".join(map(str, range(tensor.ndim)))))
        return named


def strided(name: str, tensor: Tensor, dims: str) -> Mapping[str, object]:
    """Return `tensor` under its name, and its strides: `name_stride_b` for the dim "b"."""
    return {name: tensor, **strides(f"{name}_", tensor, dims)}


def strides(prefix: str, tensor: Tensor, dims: str) -> Mapping[str, int]:
    """Return the strides of `tensor` by name: `<prefix>stride_b` for the dim "b"."""
    return dict(zip(_stride_names(prefix, dims), tensor.stride(), strict=True))


@lru_cache(maxsize=256)
def _stride_names(prefix: str, dims: str) -> tuple[str, ...]:
    return tuple(f"{prefix}stride_{dim}" for dim in dims)
