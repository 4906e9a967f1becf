"""Keys and values of one layer as a cache holds them: in which form, and in whose memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from lychee_compile.cache.number_formats import FORMATS, NumberFormat, bits
from lychee_compile.kernels.host_memory import lies_on_host, zeros_on_host
from lychee_compile.options import one_of

STORAGES = ("device", "host")
"""Values of `LycheeCache(storage=...)`."""


@dataclass(frozen=True)
class Storage:
    """Where and how the layers of a cache hold their keys and values."""

    memory: str = "device"
    """"device", or "host": memory of the host that kernels of a GPU read over the link."""
    dtype: str | None = None
    """Name of the format of the numbers."""

    def __post_init__(self) -> None:
        """Raise `OptionError` (a ValueError) for values that do not exist."""
        one_of("storage", self.memory, STORAGES)
        one_of("dtype", self.dtype, tuple(FORMATS))

    @property
    def format(self) -> NumberFormat:
        """Format of the numbers."""
        return FORMATS[self.dtype]

    @property
    def is_usual(self) -> bool:
        """True if buffers hold what attention reads, in the memory of the device."""
        return self == Storage()

    def zeros(self, like: Tensor, slots: int) -> Tensor:
        """Return a buffer [B, H, slots, N] of zeros for tokens such as `like` [B, H, T, N]."""
        shape = (*like.shape[:2], slots, like.shape[3])
        if self.memory == "host" and like.is_cuda and not torch.compiler.is_compiling():
            return zeros_on_host(shape, like.dtype, like.device)
        return like.new_zeros(shape)


class StoredLayer(StaticLayer):
    """A `StaticLayer` whose buffers [B, Hkv, slots, N] are held as a `Storage` says.

    `keys` and `values` are the buffers of numbers. Others, as of scales, have names such as
    `keys_scales`.
    """

    keys: Any
    values: Any

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

    def buffers(self) -> Iterator[Tensor]:
        """Yield all buffers."""
        yield from self.parts("keys")
        yield from self.parts("values")

    def change_buffers(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each buffer by what `change` makes of it; floats of 8 bits come as integers."""
        for kind in ("keys", "values"):
            for name in self.names_of(kind):
                buffer = getattr(self, name)
                setattr(self, name, change(bits(buffer)).view(buffer.dtype))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers."""
        slots, self.max_cache_len = self.max_cache_len, 0
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len, self.states_dtype = slots, key_states.dtype
        for kind, states in (("keys", key_states), ("values", value_states)):
            encoded = self.storage.format.encode(states[:, :, :0])
            for name, part in zip(self.names_of(kind), encoded, strict=True):
                setattr(self, name, self.storage.zeros(part, slots))

    def copy_in(self, positions: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Write tokens [B, Hkv, T, D] at `positions`, int64 [T]."""
        for kind, states in (("keys", key_states), ("values", value_states)):
            encoded = self.storage.format.encode(states)
            for buffer, part in zip(self.parts(kind), encoded, strict=True):
                bits(buffer).index_copy_(2, positions, bits(part))

    def put(self, begin: int, key_states: Tensor, value_states: Tensor) -> None:
        """Write tokens [B, Hkv, T, D] from slot `begin` on."""
        for kind, states in (("keys", key_states), ("values", value_states)):
            encoded = self.storage.format.encode(states)
            for buffer, part in zip(self.parts(kind), encoded, strict=True):
                buffer[:, :, begin : begin + states.shape[2]] = part

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

    def move_buffers(self, slots: int, used: int) -> None:
        """Move to new buffers of `slots` slots, one after the other, with the first `used`."""
        for kind in ("keys", "values"):
            for name in self.names_of(kind):
                old = getattr(self, name)
                new = self.storage.zeros(old, slots)
                new[:, :, :used] = old[:, :, :used]
                setattr(self, name, new)


def mark_static(layer: Any) -> None:
    """Tell CUDA graphs that the buffers of `layer` stay where they are."""
    from lychee_compile import torch_private  # loads the compiler: not before a cache is filled

    held = layer.buffers() if isinstance(layer, StoredLayer) else (layer.keys, layer.values)
    for tensor in (*held, layer.cumulative_length):
        torch_private.mark_static_address(tensor)
