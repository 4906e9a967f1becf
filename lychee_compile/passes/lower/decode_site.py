"""The generated kernel of one attention: its specification, its operands, and its cache.

Everything that a launch needs is checked here, while the graph is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.fx
from torch import Tensor

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import AttentionSpec, SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.module_cache import store
from lychee_compile.kernels.gpu.lifecycle import CacheUse
from lychee_compile.kernels.gpu.methods import GPU_METHODS
from lychee_compile.kernels.gpu.trial_run import TensorForm, TrialCall, try_kernels
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caches import CacheBinding
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import shape_of, static_size, value_of
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser
from lychee_compile.passes.lower.kernel_expressions import KernelExpressions, kernel_expressions
from lychee_compile.passes.lower.kernel_support import NoKernel, check_supported, static
from lychee_compile.passes.lower.rearrange import Emitter, Rearranger
from lychee_compile.passes.reasons import Reason
from lychee_compile.torch_private import size_hint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelSite:
    """What takes the place of one attention."""

    kernel: str
    """The generated module."""
    given: Canonical
    captured: tuple[torch.fx.Node, ...]
    cache: CacheUse | None
    """The cache that it reads sparsely; None: all visible keys are read."""
    refused: Reason | None = None
    """Why no sparse kernel could be generated, if one was wanted."""


def kernel_site(
    attention: Attention,
    binding: CacheBinding | None,
    config: IndexConfig,
    emit: Emitter,
    autotune: bool = False,
) -> KernelSite:
    """The kernel for `attention`: a sparse one where its cache is given, if one can be made.

    Emits its operands, before the attention. With `autotune` its tile sizes are measured at its
    first call. Raises `NoKernel`.
    """
    terms, given = emit_operands(attention, emit)
    _check_not_copied(attention, given)
    exact = replace(specification(attention, terms, given), autotune=autotune)
    refused = None
    if binding is not None:
        try:
            return _sparse(attention, binding, config, exact, terms, given, emit)
        except NoKernel as error:
            refused = error.reason
    kernel = made(exact, terms, given)
    return KernelSite(kernel, given, terms.nodes, None, refused)


def emit_operands(attention: Attention, emit: Emitter) -> tuple[KernelExpressions, Canonical]:
    """What a kernel for `attention` reads, emitted before it. Raises `NoKernel`."""
    check_supported(attention)
    canonical = Canonicaliser(attention, emit)
    try:
        with emit.graph.inserting_before(attention.node):
            return kernel_expressions(attention, canonical), canonical.operands(masked=False)
    except RewriteError as error:
        raise NoKernel(error.reason) from error


def specification(
    attention: Attention, terms: KernelExpressions, given: Canonical
) -> AttentionSpec:
    """What an exact kernel for `attention` is generated from."""
    return AttentionSpec(
        dtype=str(value_of(given.query).dtype).removeprefix("torch."),
        group=static(attention.size(attention.roles.group), "the number of query heads"),
        head_dim=static(attention.size(attention.roles.head_dim), "the size of a key"),
        value_dim=static(attention.size(attention.roles.value_dim), "the size of a value"),
        score=terms.score,
        visible=terms.visible,
        captured=terms.captured,
        extra=given.extra is not None,
    )


def _check_not_copied(attention: Attention, given: Canonical) -> None:
    """To bring a cache into another layout at every step would cost more than a kernel wins."""
    for name, operand, node in (
        ("keys", attention.key, given.key),
        ("values", attention.value, given.value),
    ):
        before, after = value_of(operand.node), value_of(node)
        if before.untyped_storage()._cdata != after.untyped_storage()._cdata:
            raise NoKernel(reasons.COPIED_OPERAND(name=name))


def _sparse(
    attention: Attention,
    binding: CacheBinding,
    config: IndexConfig,
    exact: AttentionSpec,
    terms: KernelExpressions,
    given: Canonical,
    emit: Emitter,
) -> KernelSite:
    policy = GPU_METHODS[config.policy]
    if exact.head_dim % policy.multiple:
        raise NoKernel(reasons.HEAD_NOT_A_MULTIPLE(size=exact.head_dim, multiple=policy.multiple))
    written = _tokens_written(binding, value_of(given.key).device)
    assert config.budget is not None
    chosen = SparseSpec(
        policy=config.policy,
        budget=config.budget,
        sinks=config.sinks,
        recent=config.recent,
        overfetch=config.overfetch,
        flat_tokens=config.flat_tokens,
    )
    shows, cache = _shown_keys(attention, binding, emit)
    kernel = made(replace(exact, sparse=chosen), terms, given, written)
    fixed = binding.kind == "static" and _is_whole(value_of(given.key), cache)
    layout = policy.layout_of(cache) if fixed else None
    return KernelSite(kernel, given, terms.nodes, CacheUse(kernel, shows, written, layout))


def _tokens_written(binding: CacheBinding, device: torch.device) -> int:
    """Tokens that a call writes to the cache; 0 where it only reads."""
    if binding.written is None:
        return 0
    node, dim = binding.written
    count = static_size(shape_of(node)[dim])
    if count is None or count > LONGEST_QUERY:
        tokens = shape_of(node)[dim]
        raise NoKernel(reasons.MANY_TOKENS_WRITTEN(count=tokens, limit=LONGEST_QUERY))
    if binding.positions is not None and value_of(binding.positions).device != device:
        raise NoKernel(reasons.POSITIONS_DEVICE())
    return count


def _shown_keys(
    attention: Attention, binding: CacheBinding, emit: Emitter
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What shows a cache as [B, Hkv, L, D], and what it makes of the fake cache of this graph."""
    (form,) = [each for each in attention.key_forms if each.node is binding.key][:1]
    graph = torch.fx.Graph()
    cache = graph.placeholder("cache")
    cache.meta["val"] = value_of(binding.key if binding.source is None else binding.source)
    if binding.kind == "dynamic":
        cache.meta["val"] = value_of(binding.key)
    show = Rearranger(Emitter(graph, emit.mode), attention.axes, lambda _: None)
    try:
        shown = show(Operand(cache, form.layout), attention.roles.key_layout(), whole=True)
    except RewriteError as error:
        raise NoKernel(reasons.CACHE_LAYOUT(error=error.reason.words)) from error
    graph.output(shown)
    return torch.fx.GraphModule({}, graph), value_of(shown)


def _is_whole(key: Tensor, cache: Tensor) -> bool:
    """Whether the graph reads all of a cache, whose size is known when compiling."""
    return all(
        static_size(size) is not None and size == other
        for size, other in zip(cache.shape, key.shape, strict=True)
    )


def made(spec: AttentionSpec, terms: KernelExpressions, given: Canonical, written: int = 0) -> str:
    """Generate the kernels of `spec`, or find them, and run them once. Raises `NoKernel`.

    `written` are the tokens that a call writes to the cache.
    """
    try:
        kernel = _stored(spec)
        call = TrialCall(
            kernel=kernel,
            query=_form(given.query),
            key=_form(given.key),
            value=_form(given.value),
            captured=tuple(map(_form, terms.nodes)),
            extra=None if given.extra is None else _form(given.extra),
            sparse=spec.sparse is not None,
            written=written,
            tiles=spec.tiles is not None,
        )
        try_kernels(call)
    except Exception as error:  # whatever it is, the model must run
        logger.debug("no kernel for %s", spec, exc_info=True)
        kind = "exact" if spec.sparse is None and spec.tiles is None else "sparse"
        brief = reasons.brief(error)
        raise NoKernel(reasons.KERNEL_FAILED(kind=kind, error=brief)) from error
    return kernel


@lru_cache(maxsize=256)
def _stored(spec: AttentionSpec) -> str:
    return store(emit_module(spec), spec.name).stem


def _form(node: torch.fx.Node) -> TensorForm:
    value = value_of(node)
    return TensorForm(
        tuple(map(size_hint, value.shape)),
        tuple(map(size_hint, value.stride())),
        value.dtype,
        value.device,
    )
