"""Handles: small tensors that stand for objects in a graph, as graphs hold nothing but tensors."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TypeVar

import torch
from torch import Tensor

OwnerT = TypeVar("OwnerT")


def new_handle(owner: object) -> Tensor:
    """Return a new tensor that operators find `owner` by, for as long as `owner` lives.

    The tensor is int64 [2] on the CPU: the number of the owner, and a count of updates that gives
    reads and writes of an index their order in a graph. A copy of the tensor works as well.
    """
    number = next(_numbers)
    with _lock:
        _owners[number] = owner
    with torch.inference_mode(False):  # operators write to the tensor in every mode
        return torch.tensor([number, 0], device="cpu")


def find(handle: Tensor, kind: type[OwnerT]) -> OwnerT:
    """Return the owner of a handle, or of the handle that it was copied from.

    Raises KeyError if the owner is gone, and TypeError if it is not of the class `kind`.
    """
    with _lock:
        owner = _owners[int(handle[0])]
    if not isinstance(owner, kind):
        raise TypeError(f"expected the handle of a {kind.__name__}, not a {type(owner).__name__}")
    return owner


_numbers = itertools.count(1)
_lock = threading.Lock()
_owners: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
