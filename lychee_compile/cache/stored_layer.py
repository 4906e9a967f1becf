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
    `keys_scales`. Tokens that all rows share lie in buffers [1, Hkv, tokens, N] of their own, such
    as `prefix_keys`.
    """

    keys: Any
    values: Any
    max_cache_len: int

    def __init__(self, slots: int, storage: Storage) -> None:
        super().__init__(max_cache_len=slots)
        self.storage = storage
        self.states_dtype: torch.dtype | None = None
        """Dtype of the keys and values that attention reads; None before the first of them."""
        self.prefix = 0
        """Number of tokens that all rows share, in front of those of each row."""

    def names_of(self, kind: str) -> tuple[str, ...]:
        """Return the names of the buffers of `kind`, "keys" or "values"."""
        return (kind, *(f"{kind}_{name}" for name in self.storage.format.beside))

    def parts(self, kind: str) -> tuple[Tensor, ...]:
        """Return the buffers of `kind`, "keys" or "values"."""
        return tuple(getattr(self, name) for name in self.names_of(kind))

    def names(self) -> tuple[str, ...]:
        """Return the names of all buffers that rows have of their own."""
        return self.names_of("keys") + self.names_of("values")

    def buffers(self) -> tuple[Tensor, ...]:
        """Return all buffers that rows have of their own."""
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
        """Return keys or values [B, Hkv, N, D] as attention reads them.

        They are those of the tokens that all rows share, and of `slots` slots of each row behind
        them; None: all slots. Outside of graphs what lies in memory of the host is copied to the
        device first, as operators of PyTorch read it more than once.
        """
        parts = self.parts(kind)
        if slots is not None:
            parts = tuple(part[:, :, :slots] for part in parts)
        own = self._decoded(parts)
        if not self.prefix:
            return own
        shared = tuple(getattr(self, _shared(name)) for name in self.names_of(kind))
        wide = self._decoded(shared).expand(own.shape[0], -1, -1, -1)
        return torch.cat((wide, own), 2)

    def _decoded(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return keys or values of what is held of them."""
        if self.storage.is_usual:
            return parts[0]
        if not torch.compiler.is_compiling():
            parts = tuple(part.clone() if lies_on_host(part) else part for part in parts)
        assert self.states_dtype is not None
        return self.storage.format.decode(parts, self.states_dtype)

    def divide(self, tokens: int, used: int, slots: int) -> None:
        """Hold the first `tokens` of the tokens of one row apart, for all rows that follow.

        The row has `used` slots filled, perhaps behind tokens that are held apart already. The
        tokens behind `tokens` get new buffers of `slots` slots.
        """
        for name in self.names():
            own = bits(getattr(self, name))[:, :, :used]
            whole = torch.cat((bits(getattr(self, _shared(name))), own), 2) if self.prefix else own
            for place, room, part in (
                (_shared(name), tokens, whole[:, :, :tokens]),
                (name, slots, whole[:, :, tokens:]),
            ):
                buffer = self.storage.zeros(getattr(self, name), room)
                bits(buffer)[:, :, : part.shape[2]] = part
                setattr(self, place, buffer)
        self.prefix = tokens

    def shared_buffers(self) -> tuple[Tensor, ...]:
        """Return the buffers [1, Hkv, tokens, N] of the tokens that all rows share."""
        names = self.names() if self.prefix else ()
        return tuple(getattr(self, _shared(name)) for name in names)

    def crop_prefix(self, tokens: int) -> None:
        """Keep the first `tokens` of the tokens that all rows share."""
        if tokens == 0:
            self.forget_prefix()
            return
        for name in self.names():
            old = getattr(self, _shared(name))
            new = self.storage.zeros(old, tokens)
            bits(new).copy_(bits(old)[:, :, :tokens])
            setattr(self, _shared(name), new)
        self.prefix = tokens

    def forget_prefix(self) -> None:
        """Let go of the tokens that all rows share."""
        for name in self.names() if self.prefix else ():
            delattr(self, _shared(name))
        self.prefix = 0

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


def _shared(name: str) -> str:
    """Return the name of the buffer of shared tokens beside that of each row's own."""
    return f"prefix_{name}"


def _copy_on_host(buffer: Tensor) -> Tensor:
    return zeros_on_host(tuple(buffer.shape), buffer.dtype, buffer.device).copy_(buffer)


def mark_static(layer: Any) -> None:
    """Tell CUDA graphs that the buffers of `layer` stay where they are."""
    from lychee_compile import torch_private  # loads the compiler: not before a cache is filled

    held: tuple[Tensor, ...] = (layer.keys, layer.values)
    if isinstance(layer, StoredLayer):
        held = layer.buffers() + layer.shared_buffers()
    for tensor in (*held, layer.cumulative_length):
        torch_private.mark_static_address(tensor)
