"""Triton's interpreter: kernels run on the CPU, slowly, with a GPU's rounding of bfloat16.

`tests/conftest.py` switches it on, for it has to be on before Triton is first imported.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import interpreter_types
import pytest
import torch


def use() -> None:
    """Skip the test module that calls this, unless Triton's kernels are interpreted here."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 interprets kernels here", allow_module_level=True)
    _repair_bfloat16()
    hasten()


def hasten() -> None:
    """Patch the language once in a launch, and not anew for every function that a kernel calls.

    A launch has a thread of its own: where calls are deep already, CPython may map and unmap a
    piece of stack in every call that a kernel makes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter.GridExecutor, "hastened", False):
        return
    launch = interpreter.GridExecutor.__call__
    patched: set[tuple[bool, ...]] = set()
    shown: dict[Any, tuple[bool, ...]] = {}

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def run() -> None:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                launch(self, *args, **kwargs)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(run).result()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in shown:
            shown[self] = tuple(
                any(each is lang for each in self.fn.__globals__.values()) for lang in (tl, tl.core)
            )
        seen = shown[self]
        if seen not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(seen)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.hastened = True
    interpreter_types.remember()
    _skip_overflow_checks()


def _skip_overflow_checks() -> None:
    """Leave out checks of integer overflow: their result is used on request alone (`debug`)."""
    from triton.language.semantic import TritonSemantic

    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


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
