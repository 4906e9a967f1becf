"""Handles: small tensors that stand for an index in a graph, as graphs hold nothing but tensors."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lychee_compile.kernels.cache_index import CacheIndex
from lychee_compile.kernels.config import IndexConfig


class Handle:
    """What a compiled graph knows of the index of one key cache.

    `tensor` is int64 [2] on the CPU: a number that finds this object, and a count of updates that
    gives reads and writes of the index their order in the graph. A copy of it is as good.
    """

    def __init__(
        self, config: IndexConfig, strength_of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.config = config
        self.strength_of = strength_of
        """Boundary strengths, uint8, of token ids of any shape; None where no table is known."""
        self.cache: CacheIndex | None = None
        self.number = next(_numbers)
        self.tensor = torch.tensor([self.number, 0])
        with _lock:
            _alive[self.number] = self

    def index_for(self, key: Tensor) -> CacheIndex:
        """The index of `key` [B, Hkv, L, D]: an empty one where there is none of its shape."""
        if self.cache is None or not _fits(self.cache, key):
            self.cache = CacheIndex(key, self.config)
        return self.cache


def find(tensor: Tensor) -> Handle:
    """The handle that `tensor`, or the tensor it was copied from, belongs to."""
    with _lock:
        return _alive[int(tensor[0])]


def _fits(cache: CacheIndex, key: Tensor) -> bool:
    index = cache.index
    shape = (index.batch, index.kv_heads, index.head_dim)
    return shape == (key.shape[0], key.shape[1], key.shape[3]) and index.device == key.device


_numbers = itertools.count(1)
_lock = threading.Lock()
_alive: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
