"""The policies: one record a name. A policy is a method of choosing the keys that a query reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.levels.groups import Chunks
from lychee_compile.kernels.policies.decode.clusterkv import CLUSTERKV
from lychee_compile.kernels.policies.decode.dhsa import DHSA
from lychee_compile.kernels.policies.decode.fasa import FASA
from lychee_compile.kernels.policies.decode.hisa import HISA
from lychee_compile.kernels.policies.decode.longheads import LONGHEADS
from lychee_compile.kernels.policies.decode.lychee import LycheeIndex
from lychee_compile.kernels.policies.decode.lycheecluster import LYCHEECLUSTER
from lychee_compile.kernels.policies.decode.oracle import OracleIndex
from lychee_compile.kernels.policies.decode.quest import QUEST
from lychee_compile.kernels.policies.decode.streaming import STREAMING
from lychee_compile.kernels.policies.decode.tokenselect import TOKENSELECT
from lychee_compile.kernels.policies.prefill.compact import choose_block_union
from lychee_compile.kernels.policies.prefill.dhsa import choose_by_chunks
from lychee_compile.kernels.policies.prefill.lychee import choose_by_centres
from lychee_compile.kernels.policies.prefill.s2o import choose_until_it_wanes
from lychee_compile.kernels.policies.prefill.streaming import choose_last
from lychee_compile.kernels.reference.declared_index import declared_index
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.prefill_question import PrefillChoice


class GpuKernels(Protocol):
    """Facts of a policy's GPU kernels; `kernels/gpu/methods.py` knows how they run."""

    @property
    def multiple(self) -> int:
        """A number that must divide the head_dim."""


@dataclass(frozen=True)
class Policy:
    """Everything that is known of one policy."""

    name: str
    """The value of the option `policy`."""
    words: str
    """One line that says what the policy does."""
    index: type[KVIndex] | None = None
    """Class of its indexes for decoding, in plain PyTorch; None: it cannot decode."""
    prefill: PrefillChoice | None = None
    """Its choice for a prefill, in plain PyTorch, on any device; None: it has no form for that."""
    gpu: GpuKernels | None = None
    """Its kernels for decoding; None: it has none. `kernels/gpu/methods.py` attaches those it has.
    """
    levels: LevelStack | None = None
    """Its declaration, of which index and kernels are made; None: they are written by hand."""

    @classmethod
    def declared(
        cls, name: str, words: str, levels: LevelStack, prefill: PrefillChoice | None = None
    ) -> Policy:
        """Return the record of a policy that is declared as levels."""
        return cls(name, words, declared_index(name, levels), prefill, levels=levels)

    @property
    def dense_layers(self) -> int:
        """Number of first attentions that its paper leaves dense."""
        return 0 if self.index is None else self.index.dense_layers


_policies = {
    each.name: each
    for each in (
        Policy(
            "lychee",
            "single tokens, ranked by sketches of their keys (LycheeCluster, extended)",
            LycheeIndex,
            choose_by_centres,
        ),
        Policy.declared(
            "lycheecluster",
            "whole chunks, ranked by centre and radius below clusters (LycheeCluster's letter)",
            LYCHEECLUSTER,
        ),
        Policy.declared("quest", "pages of 16, ranked by the box around their keys", QUEST),
        Policy.declared("clusterkv", "clusters of keys, ranked by their centroid", CLUSTERKV),
        Policy.declared("tokenselect", "single tokens, ranked by their true scores", TOKENSELECT),
        Policy.declared(
            "longheads", "chunks of 256, ranked by an attention-weighted mean key", LONGHEADS
        ),
        Policy.declared("fasa", "single tokens, ranked by few rotary pairs of channels", FASA),
        Policy.declared("hisa", "blocks of keys first, then the tokens in the best of them", HISA),
        Policy.declared(
            "streaming",
            "the first and the last tokens, whatever the query (StreamingLLM)",
            STREAMING,
            choose_last,
        ),
        Policy("oracle", "chunks, ranked by the softmax mass that they really hold", OracleIndex),
        Policy.declared("dhsa", "chunks of keys, against a query or chunks of queries", DHSA,
                        choose_by_chunks),
        Policy("s2o", "prefill alone: keys in order of importance, until the rest adds little",
               prefill=choose_until_it_wanes),
        Policy("compact", "prefill alone: a union of the blocks that query heads choose",
               prefill=choose_block_union),
    )
}  # fmt: skip


def policies() -> tuple[Policy, ...]:
    """Return all policies, the built-in ones first."""
    return tuple(_policies.values())


def policy_names() -> tuple[str, ...]:
    """Return the names of all policies that can decode."""
    return tuple(each.name for each in policies() if each.index is not None)


def prefill_policy_names() -> tuple[str, ...]:
    """Return the names of all policies that have a form for prefill."""
    return tuple(each.name for each in policies() if each.prefill is not None)


def find_policy(name: str) -> Policy | None:
    """Return the policy of that name; None if there is none."""
    return _policies.get(name)


def has_index(name: str) -> bool:
    """Return True if there is a policy of that name and it can decode."""
    return name in policy_names()


def estimates_shares(name: str) -> bool:
    """Return True if a policy of that name can decode and tells what share of a softmax it reads.

    The option `coverage` needs that.
    """
    policy = _policies.get(name)
    return policy is not None and policy.index is not None and policy.index.estimates_shares


def index_class(name: str) -> type[KVIndex]:
    """Return the class of a policy's indexes.

    Raises ValueError for a policy that is unknown or cannot decode.
    """
    policy, known = _policies.get(name), ", ".join(policy_names())
    if policy is None:
        raise ValueError(f"unknown policy {name!r}; known are {known}")
    if policy.index is None:
        raise ValueError(f"policy {name!r} is for prefill alone; those that decode are {known}")
    return policy.index


def levels_of(name: str) -> LevelStack:
    """Return the declaration of a policy. Raises ValueError for a policy that has none."""
    policy = _policies.get(name)
    if policy is None or policy.levels is None:
        known = ", ".join(each.name for each in policies() if each.levels is not None)
        raise ValueError(f"policy {name!r} is not declared as levels; those that are are {known}")
    return policy.levels


def reads_chunks(name: str) -> bool:
    """Return True if a policy is declared, and has a level of chunks."""
    policy = _policies.get(name)
    levels = () if policy is None or policy.levels is None else policy.levels.levels
    return any(isinstance(level.groups, Chunks) for level in levels)


def prefill_choice(name: str) -> PrefillChoice:
    """Return how a policy chooses for a prefill. Raises ValueError if it has no form for that."""
    policy = _policies.get(name)
    if policy is None or policy.prefill is None:
        known = ", ".join(prefill_policy_names())
        raise ValueError(f"policy {name!r} has no form for prefill; those that have are {known}")
    return policy.prefill


def make_index(
    batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
) -> KVIndex:
    """Return an empty index over keys [B, Hkv, L, D] for the policy of `config`."""
    return index_class(config.policy)(batch, kv_heads, head_dim, config, device)


def register_policy(
    name: str,
    policy: LevelStack | type[KVIndex] | None,
    *,
    tiles: PrefillChoice | None = None,
    gpu: GpuKernels | None = None,
    words: str = "",
) -> None:
    """Let `options={"policy": name}` choose tokens as `policy` says.

    A `LevelStack` declares the policy: it then runs on every device. A class of indexes runs in
    plain PyTorch, and with `gpu`, a `lychee_compile.extend.GpuMethod` whose kernels
    `register_emitter` gives, on a GPU too; without, it decodes there under `reference=True` alone.
    None: the policy cannot decode. `tiles` is how it chooses for a prefill, under
    `options={"prefill": "sparse"}`, on any device; None: it has no form for that. `words` say in a
    line what it does.

    Registering the same again changes nothing. Raises ValueError if there is another policy of that
    name, or kernels are given for a declaration; TypeError for a `policy` that is neither, or
    leaves abstract methods undefined, and for a `tiles` that cannot be called.
    """
    if isinstance(policy, LevelStack):
        index = None
    else:
        index = policy
        if index is not None or tiles is None:
            _check_index(name, index)
    if tiles is not None and not callable(tiles):
        raise TypeError(f"policy {name!r} chooses for prefill by a function, got {tiles!r}")
    before = _policies.get(name, Policy(name, words))
    _check_new(before, policy, tiles, gpu)
    if isinstance(policy, LevelStack) and before.levels is None:
        before = Policy.declared(name, before.words, policy, before.prefill)
    _policies[name] = replace(
        before,
        words=words or before.words,
        index=index or before.index,
        prefill=tiles or before.prefill,
        gpu=gpu or before.gpu,
    )


def _check_new(
    before: Policy,
    policy: LevelStack | type[KVIndex] | None,
    tiles: PrefillChoice | None,
    gpu: GpuKernels | None,
) -> None:
    """Raise ValueError if a policy is another than the one of its name registered `before`."""
    name, known = before.name, before.index if before.levels is None else before.levels
    declared = before.levels is not None or isinstance(policy, LevelStack)
    if declared and gpu is not None:
        raise ValueError(f"policy {name!r} is declared: its kernels are made from levels")
    if None not in (known, policy) and known != policy:
        raise ValueError(f"there is a policy {name!r} already: {before.words or known!r}")
    if before.prefill not in (None, tiles) and tiles is not None:
        raise ValueError(f"there is a policy {name!r} for prefill already")
    if before.gpu not in (None, gpu) and gpu is not None:
        raise ValueError(f"there are kernels of a policy {name!r} already")


def attach_kernels(name: str, gpu: GpuKernels) -> None:
    """Note that the policy `name` has these kernels. Raises KeyError for an unknown policy."""
    _policies[name] = replace(_policies[name], gpu=gpu)


def _check_index(name: str, index: object) -> None:
    """Raise TypeError unless `index` is a class of indexes without abstract methods."""
    if not (inspect.isclass(index) and issubclass(index, KVIndex)):
        raise TypeError(f"a policy is a LevelStack or a subclass of KVIndex, got {index!r}")
    missing = ", ".join(sorted(index.__abstractmethods__))
    if missing:
        raise TypeError(f"policy {name!r}: {index.__qualname__} does not define {missing}")
