"""Triton's interpreter: kernels run on the CPU, slowly, with a GPU's rounding of bfloat16.

`tests/conftest.py` switches it on, for it has to be on before Triton is first imported.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def use() -> None:
    """Skip the test module that calls this, unless Triton's kernels are interpreted here."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 interprets kernels here", allow_module_level=True)
    _repair_bfloat16()


def _repair_bfloat16() -> None:
    """Multiply numbers and not their bits, and round to the nearest, as a GPU does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "repaired", False):
        return
    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.tensor(source.data).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.repaired = True
