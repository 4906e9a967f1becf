"""Policies: methods of choosing what a query reads, one file each."""

from __future__ import annotations

import inspect

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.decode.clusterkv import ClusterKVIndex
from lychee_compile.kernels.policies.decode.hisa import HISAIndex
from lychee_compile.kernels.policies.decode.lychee import LycheeIndex
from lychee_compile.kernels.policies.decode.oracle import OracleIndex
from lychee_compile.kernels.policies.decode.quest import QuestIndex
from lychee_compile.kernels.policies.decode.streaming import StreamingIndex
from lychee_compile.kernels.policies.decode.tokenselect import TokenSelectIndex
from lychee_compile.kernels.policies.prefill_registry import (
    register_tile_policy,
    tile_policy_names,
)
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.prefill_question import PrefillChoice

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
    """Every policy that can decode."""
    return tuple(_registered)


def has_index(name: str) -> bool:
    """Whether a policy can decode; others choose for whole sequences alone."""
    return name in _registered


def register_policy(
    name: str, index: type[KVIndex] | None, *, tiles: PrefillChoice | None = None
) -> None:
    """Let `options={"policy": name}` choose tokens as `index`, a class of indexes, does.

    `tiles` is how it chooses for whole sequences, under `options={"prefill": "sparse"}`; None: it
    has no form for them. `index` is None for a policy that cannot decode. Raises ValueError where
    there is another of that name, and TypeError for what is no such class or function, or leaves
    abstract methods undefined.
    """
    if index is not None or tiles is None:
        _check_index(name, index)
    if tiles is not None:
        register_tile_policy(name, tiles)
    if index is not None:
        _registered[name] = index


def _check_index(name: str, index: object) -> None:
    if not (inspect.isclass(index) and issubclass(index, KVIndex)):
        raise TypeError(f"a policy is a subclass of KVIndex, got {index!r}")
    missing = ", ".join(sorted(index.__abstractmethods__))
    if missing:
        raise TypeError(f"policy {name!r}: {index.__qualname__} does not define {missing}")
    if _registered.get(name, index) is not index:
        raise ValueError(f"there is a policy {name!r} already: {_registered[name].__qualname__}")


def index_class(name: str) -> type[KVIndex]:
    """The indexes of a policy. Raises ValueError for an unknown one, or one that cannot decode."""
    if name in _registered:
        return _registered[name]
    known = ", ".join(_registered)
    if name in tile_policy_names():
        raise ValueError(f"policy {name!r} cannot decode, only whole sequences; those can: {known}")
    raise ValueError(f"unknown policy {name!r}; known are {known}")


def make_index(
    batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
) -> KVIndex:
    """An empty index over keys [B, Hkv, L, D] for the policy of `config`."""
    return index_class(config.policy)(batch, kv_heads, head_dim, config, device)
