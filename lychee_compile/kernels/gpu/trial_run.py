"""Run a kernel once while its graph is compiled, so that no later call finds that it cannot run.

The trial compiles what the first call would compile. It also shows what only a device knows: that
shared memory is too small, for example.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.compile_together import compile_together
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.record import compare_keys
from lychee_compile.kernels.gpu.methods import layout_for, method_of_kernel, new_index
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget
from lychee_compile.kernels.gpu.prefill.listed import (
    ListedPrefill,
    chooses_in_pytorch,
    listed_config,
)
from lychee_compile.kernels.gpu.prefill.ranked import run_by_kernels
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.loads import Load

ENOUGH = 4096
"""Most keys, and most queries, of a trial prefill: kernels are compiled for any length."""


@dataclass(frozen=True)
class TensorForm:
    """The facts of a tensor that a kernel is compiled for."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> Tensor:
        """Return a tensor of zeros that takes hardly any memory: strides but 1 become 0."""
        stored = [
            size if stride == 1 else 1 for size, stride in zip(self.shape, self.stride, strict=True)
        ]
        return torch.zeros(stored, dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(frozen=True)
class TrialCall:
    """The operands of an attention, by their form."""

    kernel: str
    """Name of the generated module."""
    query: TensorForm
    key: TensorForm
    value: TensorForm
    captured: tuple[TensorForm, ...]
    extra: TensorForm | None
    extra_value: TensorForm | None
    sparse: bool
    """True if a step of decoding selects keys."""
    written: int
    """Number of tokens that the call writes."""
    tiles: bool = False
    """True if it is a prefill whose tiles select keys."""
    key_parts: tuple[TensorForm, ...] = ()
    """Tensors that keys are computed from, if kernels do that."""
    value_parts: tuple[TensorForm, ...] = ()
    """Tensors that values are computed from, likewise."""
    key_load: str = ""
    """Expression of keys of `key_parts`, as `kernels.reference.loads` evaluates it."""
    numbers: tuple[int, ...] = ()
    """Sizes that the expressions of keys and values take besides."""

    def operands(self) -> AttentionOperands:
        """Return operands of this form, full of zeros."""
        return AttentionOperands(
            self.query.stand_in(),
            self.key.stand_in(),
            self.value.stand_in(),
            [each.stand_in() for each in self.captured],
            None if self.extra is None else self.extra.stand_in(),
            None if self.extra_value is None else self.extra_value.stand_in(),
            [each.stand_in() for each in self.key_parts],
            [each.stand_in() for each in self.value_parts],
            self.numbers,
        )

    def shown_key(self, operands: AttentionOperands) -> Tensor:
        """Return the keys of operands as an index is built from them."""
        if not self.key_parts:
            return operands.key
        batch, heads, length, head_dim = self.key.shape
        shape, parts = (batch, heads, length, head_dim), tuple(operands.key_parts)
        return LoadedTensor.of(Load(self.key_load, self.key.dtype, parts, shape, self.numbers))


def try_kernels(call: TrialCall) -> None:
    """Run the kernels of `call` on zeros. Raises what a real call would raise.

    A trial that finds no memory proves nothing, and raises nothing.
    """
    if call in _tried:
        return
    try:
        with torch.no_grad(), _on(call.key.device):
            module = load(call.kernel)
            if call.key.device.type == "cuda":
                compile_together(module, partial(_run, call))
            _run(call, module)
    except torch.OutOfMemoryError:
        return  # that says nothing about the kernels
    _tried.add(call)


def _run(call: TrialCall, module: ModuleType) -> None:
    operands = call.operands()
    if call.tiles and chooses_in_pytorch(module):
        ListedPrefill(module, _shortened(operands), listed_config(module, 0.5)).run()
    elif call.tiles:
        run_by_kernels(module, _shortened(operands), PrefillBudget(0.5))
    elif call.sparse:
        _run_sparse(call, module, operands)
    else:
        run_exact(module, operands)


def _shortened(operands: AttentionOperands) -> AttentionOperands:
    """Return the first `ENOUGH` keys, and as many queries or half as many if they are not those."""
    count = ENOUGH if operands.query_len == operands.kv_len else ENOUGH // 2
    extra = operands.extra
    return replace(
        operands,
        query=operands.query[:, :, :count],
        key=operands.key[:, :, :ENOUGH],
        value=operands.value[:, :, :ENOUGH],
        extra=extra if extra is None or extra.shape[-1] == 1 else extra[..., :count],
    )


def _run_sparse(call: TrialCall, module: ModuleType, operands: AttentionOperands) -> None:
    """Run one step of decoding over an index of the first key of each row."""
    method, key = method_of_kernel(call.kernel), call.shown_key(operands)
    index = new_index(layout_for(call.kernel, key), key.device)
    index.build(module, key, [1] * key.shape[0])
    written = torch.arange(key.shape[2] - call.written, key.shape[2], device=key.device)
    positions = written if call.written else None
    method.run(module, operands, IndexOperands(index.layout, index.parts, positions))
    if call.key_parts:
        parts = index.parts._asdict()
        compare_keys(module, key, parts["header"], parts["fingerprints"])


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_tried: set[TrialCall] = set()
