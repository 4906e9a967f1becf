"""Handles: small tensors that stand for an index in a graph, as graphs hold nothing but tensors."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import CacheIndex


class HandleOwner:
    """An object that operators find by a tensor.

    `tensor` is int64 [2] on the CPU: a number that finds this object, and a count of updates that
    gives reads and writes of the index their order in the graph. A copy of it is as good.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        with torch.inference_mode(False):  # operators write to it in every mode
            self.tensor = torch.tensor([self.number, 0], device="cpu")
        with _lock:
            _alive[self.number] = self


def find(tensor: Tensor) -> Any:
    """What `tensor`, or the tensor it was copied from, stands for."""
    with _lock:
        return _alive[int(tensor[0])]


class Handle(HandleOwner):
    """What a compiled graph knows of the index of one key cache."""

    def __init__(
        self, config: IndexConfig, strength_of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.strength_of = strength_of
        """Boundary strengths, uint8, of token ids of any shape; None where no table is known."""
        self.cache: CacheIndex | None = None

    def index_for(self, key: Tensor) -> CacheIndex:
        """The index of `key` [B, Hkv, L, D]: an empty one where there is none of its shape."""
        if self.cache is None or not _fits(self.cache, key):
            self.cache = CacheIndex(key, self.config)
        return self.cache

    def distrust(self) -> None:
        """Somebody else may have written the cache: compare its keys before the next use."""
        if self.cache is not None:
            self.cache.suspect = True


def _fits(cache: CacheIndex, key: Tensor) -> bool:
    index = cache.index
    shape = (index.batch, index.kv_heads, index.head_dim)
    return shape == (key.shape[0], key.shape[1], key.shape[3]) and index.device == key.device


_numbers = itertools.count(1)
_lock = threading.Lock()
_alive: weakref.WeakValueDictionary[int, HandleOwner] = weakref.WeakValueDictionary()
