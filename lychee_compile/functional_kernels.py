"""The functional API on a GPU: an index that kernels read, and attention that chooses by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType

import sympy
import torch
from torch import Tensor

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, B, Captured, H, Q, S, SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.certificate import missed_of
from lychee_compile.kernels.gpu.common.launch_sparse import slots_read, watch
from lychee_compile.kernels.gpu.common.layout import IndexOperands, roomy
from lychee_compile.kernels.gpu.common.module_cache import load, store
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.methods import (
    able,
    gpu_method,
    layout_for,
    measures_for_certificates,
    new_index,
    policies_with_kernels,
)
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.operators.decode import KERNEL_DEVICES
from lychee_compile.kernels.operators.reference import DTYPES, LONGEST_QUERY
from lychee_compile.kernels.policies.registry import estimates_shares, make_index
from lychee_compile.kernels.reference.certificate import log_unread_bound
from lychee_compile.kernels.reference.hidden import shown
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import Selection, select
from lychee_compile.kernels.reference.visible import with_four_axes
from lychee_compile.kernels.sizes import MOST_DRAWN_FROM
from lychee_compile.passes.lower.kernel_support import LARGEST_HEAD
from lychee_compile.passes.symbolic.elementwise import Flag


def has_kernels(key: Tensor, config: IndexConfig) -> bool:
    """Return True if kernels index the keys [B, Hkv, L, D] and choose from them by `config`.

    They do on a GPU, for dtypes and sizes that kernels have, for a policy with kernels, without
    `epsilon`, and unless `reference` is set.
    """
    if key.device.type not in KERNEL_DEVICES or config.reference or config.epsilon is not None:
        return False
    if key.dtype not in DTYPES or key.shape[3] > LARGEST_HEAD:
        return False
    if config.policy not in policies_with_kernels() or config.budget is None:
        return False
    covers = config.coverage is None or able(config.policy, "covers_mass")
    return covers and key.shape[3] % gpu_method(config.policy).multiple == 0


class KernelIndex:
    """The index of keys [B, Hkv, L, D] on a GPU, as `build_index` returns it there."""

    reads_keys = False

    def __init__(self, key: Tensor, lengths: Tensor, config: IndexConfig) -> None:
        self.config = config
        self.batch, self.kv_heads, _, self.head_dim = key.shape
        self.key = key
        """Keys that the index was last brought up to date with, [B, Hkv, L, D]."""
        self.end = lengths
        """Number of keys of each row, int64 [B]."""
        self._waiting = 0
        """Number of last keys of each row that the next step of attention indexes."""
        self._measured = False
        """True once the index has parts that certificates alone need."""
        self._build(lengths.tolist())

    def update(self, key: Tensor, lengths: Tensor) -> None:
        """Index the keys up to `lengths`, int64 [B], of the whole cache `key` [B, Hkv, L, D].

        A few new keys of each row are indexed by the next step of attention, as in decoding.
        """
        grown = set((lengths - self.end).tolist())
        self.key, self.end = key, lengths
        self._waiting += max(grown)
        few = len(grown) == 1 and self._waiting <= LONGEST_QUERY
        if not (few and key.shape[2] <= self._index.layout.slots):
            self._build(lengths.tolist())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, choice: Choice) -> Tensor:
        """Return attention from `query` [B, Hq, T, D] to the best of `key`: [B, Hq, T, Dv]."""
        parts = [self._attend(*each, key, value, choice) for each in choice.pieces(query)]
        return torch.cat(parts, 2)

    def attend_certified(
        self, query: Tensor, key: Tensor, value: Tensor, choice: Choice
    ) -> tuple[Tensor, Tensor]:
        """Return what `attend` does, and certificates of the share not read: [B, Hq, T].

        The first certificate builds the index anew, if it lacks what certificates need.
        """
        if not self._measured and measures_for_certificates(self.config.policy):
            self._measured = True
            self._build(self.end.tolist())
        with watch() as steps:
            output = self.attend(query, key, value, replace(choice, certified=True))
        return output, torch.cat([missed_of(each.operands, each.scratch) for each in steps], 2)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Let the next step of attention index the waiting keys again, whatever runs within."""
        waiting = self._waiting
        yield
        self._waiting = waiting

    def draws(self, budget: int) -> bool:
        """Return True if a choice of `budget` tokens draws those of small shares by chance."""
        return self.config.draws(budget) and self.key.shape[2] <= MOST_DRAWN_FROM

    def _attend(
        self, query: Tensor, mask: Tensor | None, key: Tensor, value: Tensor, choice: Choice
    ) -> Tensor:
        captured = _captured(mask, self.end)
        spec = self._spec(query.shape[1], value.shape[3], captured, choice)
        slots = key.shape[2] if mask is None else mask.shape[-1]
        tensors = list(captured.values())
        operands = AttentionOperands(query, key[:, :, :slots], value[:, :, :slots], tensors)
        used = IndexOperands(self._index.layout, self._index.parts, self._positions())
        output = gpu_method(self.config.policy).run(_module(spec), operands, used)
        self._waiting = 0
        return output

    def _positions(self) -> Tensor | None:
        if not self._waiting:
            return None
        number = torch.arange(-self._waiting, 0, device=self.end.device)
        return self.end[:, None] + number

    def _build(self, ends: list[int]) -> None:
        spec = self._spec(self.kv_heads, self.head_dim, {}, Choice(None, 1.0, 1))
        layout = roomy(layout_for(_kernel(spec), self.key))
        self._index = new_index(layout, self.key.device)
        self._index.build(_module(spec), self.key, ends)
        self._waiting = 0

    def _spec(
        self, heads: int, value_dim: int, captured: dict[str, Tensor], choice: Choice
    ) -> AttentionSpec:
        """Return the specification of attention with `captured` tensors as its mask."""
        config, score = self.config, S * choice.scale
        visible: sympy.Basic = sympy.true
        if "last" in captured:
            last = sympy.IndexedBase(sympy.Symbol("last", integer=True))
            visible = sympy.Indexed(last, B) >= KV
        if "mask" in captured:
            head = H if captured["mask"].shape[1] > 1 else 0
            visible = Flag(sympy.Indexed(sympy.IndexedBase("mask"), B, head, Q, KV))
        if "bias" in captured:
            head = H if captured["bias"].shape[1] > 1 else 0
            score += sympy.Indexed(sympy.IndexedBase("bias"), B, head, Q, KV)
        named = tuple(
            Captured(name, str(tensor.dtype).removeprefix("torch."), tensor.ndim)
            for name, tensor in captured.items()
        )
        coverage = config.coverage if estimates_shares(config.policy) else None
        sparse = SparseSpec(
            config.policy,
            choice.budget,
            config.sinks,
            config.recent,
            config.overfetch,
            config.flat_tokens,
            None if coverage == 1 else coverage,
            GroupSettings.of(config),
            1.0 if choice.certified or self._measured else None,
            self.draws(choice.budget),
        )
        dtype = str(self.key.dtype).removeprefix("torch.")
        sizes = heads // self.kv_heads, self.head_dim, value_dim
        return AttentionSpec(dtype, *sizes, score, visible, named, sparse=sparse)


@dataclass(frozen=True)
class Choice:
    """Mask, scale and budget: all that a choice depends on besides queries and index."""

    mask: Tensor | None
    """SDPA mask, bool or additive, broadcastable to [B, Hq, T, L]."""
    scale: float
    """Factor of q.k."""
    budget: int
    """Number of tokens to read."""
    certified: bool = False
    """True if the share of the softmax that is not read is bounded."""

    def pieces(self, query: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return `query` [B, Hq, T, D] in pieces of few positions, with the mask of each."""
        queries = query.split(LONGEST_QUERY, 2)
        if self.mask is None:
            return [(each, None) for each in queries]
        mask = with_four_axes(self.mask).expand(query.shape[0], -1, query.shape[2], -1)
        return list(zip(queries, mask.split(LONGEST_QUERY, 2), strict=True))


@dataclass(frozen=True)
class KernelSelection:
    """A choice that kernels make while they attend, as `select` returns it on a GPU."""

    index: KernelIndex
    query: Tensor
    """Queries that choose, [B, Hq, T, D]."""
    choice: Choice

    @property
    def scale(self) -> float:
        """Softmax scale that the tokens are chosen with."""
        return self.choice.scale

    @property
    def certifies(self) -> bool:
        """True if kernels bound the share of the softmax that they do not read.

        They do not if they draw tokens, each of which they add up as often as it counts.
        """
        proves = able(self.index.config.policy, "certifies") and not self.index.draws(
            self.choice.budget
        )
        return proves and 0 < self.scale < math.inf

    def tokens(self) -> Tensor:
        """Return the slots that kernels read, int64 [B, Hkv, T, S]; -1 pads shorter lists.

        Runs the kernels once, and waits for them. Slots that a mask hides may be among them.
        """
        with watch() as steps, self.index.looking():
            self.index.attend(self.query, self.index.key, self.index.key, self.choice)
        lists = [slots_read(step) for step in steps]
        width = max(each.shape[-1] for each in lists)
        padded = [torch.nn.functional.pad(e, (0, width - e.shape[-1]), value=-1) for e in lists]
        return torch.cat(padded, 2)

    def token_mask(self) -> Tensor:
        """Return a mask of the slots that kernels read, bool [B, Hkv, T, L]."""
        token, slots = self.tokens(), self.index.key.shape[2]
        read = torch.zeros(*token.shape[:3], slots + 1, dtype=torch.bool, device=token.device)
        read.scatter_(-1, torch.where(token < 0, slots, token), True)
        return read[..., :-1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention [B, Hq, T, Dv] from the queries that choose, by kernels."""
        return self.index.attend(query, key, value, self.choice)

    def attend_certified(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `attend` does, and certificates [B, Hq, T], if the choice `certifies`."""
        return self.index.attend_certified(query, key, value, self.choice)

    @cached_property
    def plain(self) -> Selection:
        """The choice of the plain form, on the same device.

        Attention from other queries than those that chose needs it, and so do certificates of
        policies whose kernels have no bound.
        """
        mine, choice = self.index, self.choice
        index = make_index(mine.batch, mine.kv_heads, mine.head_dim, mine.config, mine.key.device)
        index.extend(mine.key, mine.end)
        index.complete(mine.key)
        mask = choice.mask
        kv_len = int(mine.end.max()) if mask is None else mask.shape[-1]
        if mask is None:
            slot = torch.arange(kv_len, device=mine.key.device)
            mask = (slot < mine.end[:, None])[:, None, None]
        inputs = ScoreInputs(self.query, mine.key, kv_len, mask, choice.scale)
        selection = select(index, inputs, choice.budget)
        bound = log_unread_bound(index, self.query, selection)
        return replace(selection, log_unread_bound=bound)


def _captured(mask: Tensor | None, end: Tensor) -> dict[str, Tensor]:
    """Return the tensors that say what is visible, and a bias, by the names of the mask's terms."""
    if mask is None:
        return {"last": end - 1}
    if mask.dtype == torch.bool:
        return {"mask": mask}
    return {"mask": shown(mask), "bias": mask.float()}


def _kernel(spec: AttentionSpec) -> str:
    """Return the name of the generated module. Raises ValueError if none can be generated."""
    try:
        return store(emit_module(spec), spec.name).stem
    except Unprintable as error:
        raise ValueError(f"policy {spec.policy!r} has no kernel here: {error}") from error


def _module(spec: AttentionSpec) -> ModuleType:
    return load(_kernel(spec))
