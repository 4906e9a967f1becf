"""Keys and values of one layer as a cache holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from lychee_compile.cache.number_formats import bits
from lychee_compile.cache.storage import Storage
from lychee_compile.kernels.host_memory import lies_on_host, zeros_on_host


class StoredLayer(StaticLayer):
    """A `StaticLayer` whose buffers [B, Hkv, slots, N] are held as a `Storage` says.

    `keys` and `values` are the buffers of numbers. Others, as of scales, have names such as
    `keys_scales`.
    """

    keys: Any
    values: Any
    max_cache_len: int

    def __init__(self, slots: int, storage: Storage) -> None:
        super().__init__(max_cache_len=slots)
        self.storage = storage
        self.states_dtype: torch.dtype | None = None
        """Dtype of the keys and values that attention reads; None before the first of them."""

    def names_of(self, kind: str) -> tuple[str, ...]:
        """Return the names of the buffers of `kind`, "keys" or "values"."""
        return (kind, *(f"{kind}_{name}" for name in self.storage.format.beside))

    def parts(self, kind: str) -> tuple[Tensor, ...]:
        """Return the buffers of `kind`, "keys" or "values"."""
        return tuple(getattr(self, name) for name in self.names_of(kind))

    def names(self) -> tuple[str, ...]:
        """Return the names of all buffers."""
        return self.names_of("keys") + self.names_of("values")

    def buffers(self) -> tuple[Tensor, ...]:
        """Return all buffers."""
        return self.parts("keys") + self.parts("values")

    def encoded(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        """Return what each of `buffers` is to hold of tokens [B, Hkv, T, D]."""
        encode = self.storage.format.encode
        return encode(key_states) + encode(value_states)

    def change_buffers(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each buffer by what `change` makes of it, in the same kind of memory.

        Floats of 8 bits come as integers.
        """
        for name, buffer in zip(self.names(), self.buffers(), strict=True):
            changed = change(bits(buffer)).view(buffer.dtype)
            on_host = lies_on_host(buffer)
            setattr(self, name, _copy_on_host(changed) if on_host else changed)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        slots, self.max_cache_len = self.max_cache_len, 0
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len, self.states_dtype = slots, key_states.dtype
        nothing = self.encoded(key_states[:, :, :0], value_states[:, :, :0])
        for name, part in zip(self.names(), nothing, strict=True):
            setattr(self, name, self.storage.zeros(part, slots))

    def copy_in(self, positions: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Write tokens [B, Hkv, T, D] at `positions`, int64 [T]."""
        encoded = self.encoded(key_states, value_states)
        for buffer, part in zip(self.buffers(), encoded, strict=True):
            bits(buffer).index_copy_(2, positions, bits(part))

    def put(self, begin: int, key_states: Tensor, value_states: Tensor) -> None:
        """Write tokens [B, Hkv, T, D] from slot `begin` on."""
        encoded = self.encoded(key_states, value_states)
        for buffer, part in zip(self.buffers(), encoded, strict=True):
            buffer[:, :, begin : begin + part.shape[2]] = part

    def read(self, kind: str, slots: int | None = None) -> Tensor:
        """Return keys or values [B, Hkv, slots, D] as attention reads them; None: all slots.

        Outside of graphs what lies in memory of the host is copied to the device first, as
        operators of PyTorch read it more than once.
        """
        parts = self.parts(kind)
        if slots is not None:
            parts = tuple(part[:, :, :slots] for part in parts)
        if self.storage.is_usual:
            return parts[0]
        if not torch.compiler.is_compiling():
            parts = tuple(part.clone() if lies_on_host(part) else part for part in parts)
        assert self.states_dtype is not None
        return self.storage.format.decode(parts, self.states_dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredLayer:
        """Return a copy whose buffers lie in the same kind of memory."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        for name, value in vars(self).items():
            on_host = isinstance(value, Tensor) and lies_on_host(value)
            copied = _copy_on_host(value) if on_host else copy.deepcopy(value, memo)
            if on_host:
                vars(copied).update(vars(value))  # marks of `mark_static`, which CUDA graphs need
            setattr(twin, name, copied)
        return twin

    def move_buffers(self, slots: int, used: int) -> None:
        """Move to new buffers of `slots` slots, one after the other, with the first `used`."""
        for name in self.names():
            old = getattr(self, name)
            new = self.storage.zeros(old, slots)
            new[:, :, :used] = old[:, :, :used]
            setattr(self, name, new)


def _copy_on_host(buffer: Tensor) -> Tensor:
    return zeros_on_host(tuple(buffer.shape), buffer.dtype, buffer.device).copy_(buffer)


def mark_static(layer: Any) -> None:
    """Tell CUDA graphs that the buffers of `layer` stay where they are."""
    from lychee_compile import torch_private  # loads the compiler: not before a cache is filled

    held = layer.buffers() if isinstance(layer, StoredLayer) else (layer.keys, layer.values)
    for tensor in (*held, layer.cumulative_length):
        torch_private.mark_static_address(tensor)
