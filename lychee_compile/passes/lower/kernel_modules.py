"""Generate the kernels of a specification, store their module, and run it once as a trial."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
import torch.fx

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import AttentionSpec, LoadSpec
from lychee_compile.kernels.gpu.common.module_cache import store
from lychee_compile.kernels.gpu.trial_run import TensorForm, TrialCall, try_kernels
from lychee_compile.passes import reasons
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.lower.kernel_operands import KernelOperands
from lychee_compile.passes.lower.kernel_support import NoKernel
from lychee_compile.passes.lower.rearrange import Size
from lychee_compile.torch_private import size_hint

logger = logging.getLogger(__name__)


def compile_kernels(spec: AttentionSpec, operands: KernelOperands, written: int = 0) -> str:
    """Return the name of the module of `spec`, once its kernels have run on such operands.

    A module that is stored already is not generated again. `written` is the number of tokens that
    a call writes to the cache. Raises `NoKernel`.
    """
    try:
        kernel = _stored(spec)
        try_kernels(_trial_call(kernel, spec, operands, written))
    except Exception as error:  # whatever it is, the model must run
        logger.debug("no kernel for %s", spec, exc_info=True)
        kind = "exact" if spec.sparse is None and spec.tiles is None else "sparse"
        failed = reasons.KERNEL_FAILED(kind=kind, error=reasons.brief(error))
        raise NoKernel(failed) from error
    return kernel


@lru_cache(maxsize=256)
def _stored(spec: AttentionSpec) -> str:
    return store(emit_module(spec), spec.name).stem


def _trial_call(
    kernel: str, spec: AttentionSpec, operands: KernelOperands, written: int
) -> TrialCall:
    tensors = operands.tensors
    plain: dict[str, Any] = {"key": _form(tensors.key), "value": _form(tensors.value)}
    return TrialCall(
        kernel=kernel,
        query=_form(tensors.query),
        captured=tuple(map(_form, operands.expressions.nodes)),
        extra=None if tensors.extra is None else _form(tensors.extra),
        extra_value=None if tensors.extra_value is None else _form(tensors.extra_value),
        sparse=spec.sparse is not None,
        written=written,
        tiles=spec.tiles is not None,
        **(plain | _parts(operands)),
    )


def _parts(operands: KernelOperands) -> dict[str, Any]:
    """Return what a trial has to know of keys and values that kernels compute."""
    loads, query = operands.loads, value_of(operands.tensors.query)
    if loads is None:
        return {}

    def forms(nodes: list[torch.fx.Node], load: LoadSpec | None) -> tuple[TensorForm, ...]:
        return () if load is None else tuple(map(_form, nodes))

    def shown(*, values: bool) -> TensorForm:
        *sizes, head_dim, value_dim = (size_hint(_number(each)) for each in loads.sizes)
        shape = *sizes, value_dim if values else head_dim
        return TensorForm(shape, (0, 0, 0, 0), query.dtype, query.device)

    found: dict[str, Any] = {"key_load": loads.key_text}
    found["numbers"] = tuple(size_hint(_number(each)) for each in loads.numbers)
    if loads.keys is not None:
        found |= {"key": shown(values=False), "key_parts": forms(loads.key_nodes, loads.keys)}
    if loads.values is not None:
        found |= {
            "value": shown(values=True),
            "value_parts": forms(loads.value_nodes, loads.values),
        }
    return found


def _number(size: Size) -> int | torch.SymInt:
    return value_of(size) if isinstance(size, torch.fx.Node) else size


def _form(node: torch.fx.Node) -> TensorForm:
    """Return shape, strides, dtype and device of a tensor; symbolic sizes are those traced with."""
    value = value_of(node)
    return TensorForm(
        tuple(map(size_hint, value.shape)),
        tuple(map(size_hint, value.stride())),
        value.dtype,
        value.device,
    )
