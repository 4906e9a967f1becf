"""Outcomes: all that can become of an attention, each with one way to emit it.

    KeepAsIs            the operators of the graph stay
    OneSdpa             one scaled_dot_product_attention for products and a softmax written out
    ReferenceSparse     decoding through an index, in plain PyTorch
    SparseDecodeKernel  decoding through an index, by a generated kernel
    ExactDecodeKernel   decoding over all visible keys, by a generated kernel
    PrefillReference    sparse prefill, in plain PyTorch
    PrefillKernels      sparse prefill, by generated kernels

An outcome is decided from facts alone, and only `emit` acts. It raises `NoKernel` or `RewriteError`
if it cannot do what was decided; `instead` then gives the outcome to try next. An outcome is told
in a report by its `decision`, `kernel`, `reason` (None if it is sparse), `reads` ("" if it is not)
and `by_design`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch.fx

from lychee_compile.kernels.config import ALL_KEYS, IndexConfig
from lychee_compile.kernels.policies.registry import estimates_shares
from lychee_compile.kernels.sizes import QUERY_TILE
from lychee_compile.passes.detect.attention import Attention, Unread
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.graph.dataflow import operator_name
from lychee_compile.passes.lower import prefill_site, reference_site, sdpa_site
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.decode_site import emit_exact_decode, emit_sparse_decode
from lychee_compile.passes.lower.patch_grids import Grid
from lychee_compile.passes.lower.shared.prefix_kernels import emit_shared_decode
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.site import Decision


@dataclass(frozen=True)
class KeepAsIs:
    """The attention stays as the graph has it."""

    attention: Attention | Unread
    reason: Reason
    by_design: bool
    """True if it is meant to be exact, False if it is kept for want of support."""
    decision: ClassVar[Decision] = "kept"
    reads: ClassVar[str] = ""

    @property
    def kernel(self) -> str:
        """The operator that runs, in words."""
        attention = self.attention
        if isinstance(attention, Attention) and attention.form == "flex":
            return "flex_attention"
        one = isinstance(attention, Unread) or attention.form == "sdpa"
        return operator_name(attention.node) if one else "aten (as written)"

    def emit(self, context: LoweringContext) -> Emitted:  # noqa: ARG002  nothing is emitted
        """Emit nothing; the output is the one there is."""
        return self.attention.node, self

    def instead(self, failure: Reason) -> Outcome:
        """Keep the attention for another reason."""
        return replace(self, reason=failure)


@dataclass(frozen=True)
class OneSdpa:
    """PyTorch's one operator takes the place of an attention that is meant to be exact."""

    attention: Attention
    reason: Reason
    by_design: ClassVar[bool] = True
    decision: ClassVar[Decision] = "exact"
    reads: ClassVar[str] = ""
    kernel: ClassVar[str] = sdpa_site.OPERATOR

    def emit(self, context: LoweringContext) -> Emitted:
        """Emit scaled dot-product attention."""
        return sdpa_site.emit_one_sdpa(self.attention, context), self

    def instead(self, failure: Reason) -> Outcome:
        """Keep the attention, and say why it is exact, and why it is not one operator."""
        return KeepAsIs(self.attention, self.reason.and_also(failure), by_design=False)


@dataclass(frozen=True)
class _Sparse:
    """Part of the keys is read, whatever runs."""

    attention: Attention
    by_design: ClassVar[bool] = False
    decision: ClassVar[Decision] = "sparse"
    reason: ClassVar[None] = None

    def instead(self, failure: Reason) -> Outcome:
        """Keep the attention."""
        return KeepAsIs(self.attention, failure, by_design=False)


@dataclass(frozen=True)
class Generated(ABC):
    """A generated module runs."""

    module: str = field(default="", kw_only=True)
    """Name of the module, once there is one."""

    @property
    def kernel(self) -> str:
        """The generated module, or words that stand for it."""
        return self.module or f"{self._stem} kernel (not generated yet)"

    @property
    @abstractmethod
    def _stem(self) -> str:
        """Beginning of the name of the module."""


@dataclass(frozen=True)
class ReferenceSparse(_Sparse):
    """The reference decodes through the index of a cache, on any device."""

    binding: CacheBinding
    reads: str
    """Number of keys that are read, in words."""
    kernel: ClassVar[str] = reference_site.OPERATOR

    def emit(self, context: LoweringContext) -> Emitted:
        """Emit an update of the index, and sparse attention."""
        return reference_site.emit_reference_sparse(self.attention, self.binding, context), self


@dataclass(frozen=True)
class SparseDecodeKernel(_Sparse, Generated):
    """A generated kernel decodes through the index of a cache."""

    binding: CacheBinding
    policy: str
    """Name of the policy that selects keys."""
    reads: str
    """Number of keys that are read, in words."""

    @property
    def _stem(self) -> str:
        return f"decode_{self.policy}"

    def emit(self, context: LoweringContext) -> Emitted:
        """Generate the kernel, try it, and emit its operator."""
        if self.binding.shared is not None:
            output, module = emit_shared_decode(self.attention, self.binding, context)
        else:
            output, module = emit_sparse_decode(self.attention, self.binding, context)
        return output, replace(self, module=module)

    def instead(self, failure: Reason) -> Outcome:
        """Read all keys."""
        return ExactDecodeKernel(self.attention, failure, binding=self.binding)


@dataclass(frozen=True)
class ExactDecodeKernel(Generated):
    """A generated kernel decodes over all visible keys."""

    attention: Attention
    reason: Reason
    by_pytorch: KeepAsIs | OneSdpa | None = None
    """Outcome without such a kernel, if the attention is meant to be exact; None otherwise."""
    binding: CacheBinding | None = None
    """Cache of the keys, which a kernel may compute from what it holds; None: there is none."""
    by_design: ClassVar[bool] = False
    decision: ClassVar[Decision] = "exact"
    reads: ClassVar[str] = ""

    @property
    def _stem(self) -> str:
        return "decode_exact"

    def emit(self, context: LoweringContext) -> Emitted:
        """Generate the kernel, try it, and emit its operator."""
        binding = self.binding
        if binding is not None and binding.shared is not None:
            output, module = emit_shared_decode(self.attention, binding, context, selects=False)
        else:
            output, module = emit_exact_decode(self.attention, context, binding)
        return output, replace(self, module=module)

    def instead(self, failure: Reason) -> Outcome:
        """Read keys that rows share once for each row; if that is tried, leave all to PyTorch."""
        if self.binding is not None and self.binding.shared is not None:
            return replace(self, binding=None)
        if self.by_pytorch is None:
            return KeepAsIs(self.attention, failure, by_design=False)
        return replace(self.by_pytorch, reason=self.reason.and_also(failure))


@dataclass(frozen=True)
class _Prefill(_Sparse):
    """Every tile of a prefill's queries reads what matters to it."""

    config: IndexConfig
    grid: Grid | None
    """Grid in which the queries lie if they are patches that may be reordered; None otherwise."""

    @property
    def reads(self) -> str:
        """Number or share of the keys that are read, in words."""
        budget, coverage = self.config.prefill_budget, self.config.prefill_coverage
        keys = f"{100 * budget:.4g} % of the keys it sees" if budget < 1 else f"up to {budget} keys"
        keys = "all keys it sees" if budget >= ALL_KEYS else keys
        if coverage is not None and self.config.policy == IndexConfig.policy:
            keys += f", fewer if they hold {coverage:.4g} of the softmax"
        keys += "" if self.grid is None else f", in {self.grid.words()}"
        return f"each tile of {QUERY_TILE} queries reads {keys}{_choice(self.config)}"


@dataclass(frozen=True)
class PrefillReference(_Prefill):
    """A sparse prefill by the reference."""

    kernel: ClassVar[str] = prefill_site.REFERENCE_OPERATOR

    def emit(self, context: LoweringContext) -> Emitted:
        """Emit the reference's sparse attention."""
        return prefill_site.emit_prefill_reference(self.attention, self.grid, context), self


@dataclass(frozen=True)
class PrefillKernels(_Prefill, Generated):
    """A sparse prefill by generated kernels."""

    @property
    def _stem(self) -> str:
        return f"prefill_{self.config.policy}"

    def emit(self, context: LoweringContext) -> Emitted:
        """Generate the kernels, try them, and emit their operator."""
        emitted = prefill_site.emit_prefill_kernels(self.attention, self.grid, context)
        output, module, grid = emitted
        return output, replace(self, module=module, grid=grid)


Outcome = (
    KeepAsIs
    | OneSdpa
    | ReferenceSparse
    | SparseDecodeKernel
    | ExactDecodeKernel
    | PrefillReference
    | PrefillKernels
)
Emitted = tuple[torch.fx.Node, Outcome]
"""Node that replaces the output of an attention, and the outcome with its generated module."""


def how_much(config: IndexConfig, kv_len: int | str, kernels: bool = False) -> str:
    """Return how much sparse decoding reads of `kv_len` keys, in words.

    With `epsilon` kernels read all keys of a query that the reference would read more keys of.
    """
    words = f"budget {config.budget} of up to {kv_len} tokens"
    if config.coverage is not None and estimates_shares(config.policy):
        words += f", fewer if they hold {config.coverage:.4g} of the softmax"
    if config.budget is not None and config.draws(config.budget):
        words += ", those of small shares drawn by chance"
    return words + _choice(config, "all keys" if kernels else "more")


def _choice(config: IndexConfig, otherwise: str = "more") -> str:
    """Return the options that change what is read, in words; "" if all are the default."""
    words = "" if config.policy == IndexConfig.policy else f", policy {config.policy}"
    if config.epsilon is not None:
        words += f", {otherwise} where over {config.epsilon:.3g} of the softmax might be missed"
    return words
