"""Run a kernel once while its graph is compiled, so that no call ever finds out that it cannot run.

It compiles what the first call would compile, and shows what only a device knows: that shared
memory is too small, say.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.compile_together import compile_together
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.tuning import tuning_for
from lychee_compile.kernels.gpu.lychee.launch import run_exact
from lychee_compile.kernels.gpu.methods import new_index, policy_of
from lychee_compile.kernels.gpu.prefill.launch import run_tiles

ENOUGH = 4096
"""Keys, and queries, of a whole sequence that show what all would: kernels know no lengths."""


@dataclass(frozen=True)
class TensorForm:
    """What a kernel is compiled for of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> Tensor:
        """A tensor of zeros that takes hardly any memory: strides other than one are zero."""
        held = [
            size if stride == 1 else 1 for size, stride in zip(self.shape, self.stride, strict=True)
        ]
        return torch.zeros(held, dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(frozen=True)
class TrialCall:
    """The operands of an attention, by their form."""

    kernel: str
    query: TensorForm
    key: TensorForm
    value: TensorForm
    captured: tuple[TensorForm, ...]
    extra: TensorForm | None
    sparse: bool
    written: int
    """Tokens written by the call; 0: none."""
    tiles: bool = False
    """Whether it is a whole sequence."""


def try_kernels(call: TrialCall) -> None:
    """Run the kernels of `call` on zeros. Raises what a real call would."""
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
    query, key, value = (each.stand_in() for each in (call.query, call.key, call.value))
    captured = [each.stand_in() for each in call.captured]
    extra = None if call.extra is None else call.extra.stand_in()
    if call.tiles:
        few = ENOUGH if query.shape[2] == key.shape[2] else ENOUGH // 2
        query, key, value = query[:, :, :few], key[:, :, :ENOUGH], value[:, :, :ENOUGH]
        extra = extra if extra is None or extra.shape[-1] == 1 else extra[..., :few]
        run_tiles(module, query, key, value, captured, extra, budget=0.5)
        return
    if not call.sparse:
        tuning = tuning_for(module, "exact", query, key, value)
        run_exact(module, query, key, value, captured, extra, tuning)
        return
    policy = policy_of(call.kernel)
    index = new_index(policy.layout_of(key), key.device)
    index.build(module, key, [1] * key.shape[0])
    last = torch.arange(key.shape[2] - call.written, key.shape[2], device=key.device)
    positions = last if call.written else None
    tuning = tuning_for(module, "sparse", query, key, value)
    state = index.layout, index.parts
    policy.run(module, query, key, value, captured, extra, positions, *state, tuning)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_tried: set[TrialCall] = set()
