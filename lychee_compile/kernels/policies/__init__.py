"""Policies: methods of choosing what a query reads, one file each."""

from __future__ import annotations

import inspect

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.clusterkv import ClusterKVIndex
from lychee_compile.kernels.policies.hisa import HISAIndex
from lychee_compile.kernels.policies.lychee import LycheeIndex
from lychee_compile.kernels.policies.oracle import OracleIndex
from lychee_compile.kernels.policies.quest import QuestIndex
from lychee_compile.kernels.policies.streaming import StreamingIndex
from lychee_compile.kernels.policies.tokenselect import TokenSelectIndex
from lychee_compile.kernels.reference.index import KVIndex

_registered: dict[str, type[KVIndex]] = {
    "lychee": LycheeIndex,
    "quest": QuestIndex,
    "clusterkv": ClusterKVIndex,
    "tokenselect": TokenSelectIndex,
    "hisa": HISAIndex,
    "streaming": StreamingIndex,
    "oracle": OracleIndex,
}


def policy_names() -> tuple[str, ...]:
    """Every policy that options can name."""
    return tuple(_registered)


def register_policy(name: str, index: type[KVIndex]) -> None:
    """Let `options={"policy": name}` choose tokens as `index`, a class of indexes, does.

    Raises ValueError where another class has that name, and TypeError for what is not such a class
    or leaves abstract methods undefined.
    """
    given: object = index
    if not (inspect.isclass(given) and issubclass(given, KVIndex)):
        raise TypeError(f"a policy is a subclass of KVIndex, got {index!r}")
    missing = ", ".join(sorted(index.__abstractmethods__))
    if missing:
        raise TypeError(f"policy {name!r}: {index.__qualname__} does not define {missing}")
    if _registered.get(name, index) is not index:
        raise ValueError(f"there is a policy {name!r} already: {_registered[name].__qualname__}")
    _registered[name] = index


def index_class(name: str) -> type[KVIndex]:
    """The indexes of a policy. Raises ValueError for an unknown one."""
    if name not in _registered:
        raise ValueError(f"unknown policy {name!r}; known are {', '.join(_registered)}")
    return _registered[name]


def make_index(
    batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
) -> KVIndex:
    """An empty index over keys [B, Hkv, L, D] for the policy of `config`."""
    return index_class(config.policy)(batch, kv_heads, head_dim, config, device)
