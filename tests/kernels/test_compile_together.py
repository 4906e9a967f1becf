"""Kernels that are compiled at the same time before any of them runs."""

from __future__ import annotations

from typing import Any

import pytest
import triton_interpreter
from decode_problems import Problem, Sizes, make_problem

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.compile_together import compile_together
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout

triton_interpreter.use()
pytestmark = pytest.mark.usefixtures("kernel_folder")


def sparse_problem() -> Problem:
    return make_problem(sizes=Sizes(kv_len=200), sparse=SparseSpec("lychee", 64, 4, 16, 2, 65536))


def test_nothing_runs_while_kernels_are_compiled() -> None:
    problem = sparse_problem()
    module = problem.module()
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    index.parts.fine.fill_(0)
    compile_together(module, lambda given: index.build(given, problem.key, [200]))
    assert not index.parts.fine.any()
    index.build(module, problem.key, [200])
    assert index.parts.fine.any()


def test_what_fails_is_left_to_the_launch_and_leaves_nothing_behind() -> None:
    import triton
    from triton.runtime import _async_compile

    module, seen = sparse_problem().module(), []

    def interrupted(_: Any) -> None:
        seen.append(_async_compile.active_mode.get())
        raise KeyboardInterrupt

    def broken(_: Any) -> None:
        raise RuntimeError("no such kernel")

    compile_together(module, broken)
    with pytest.raises(KeyboardInterrupt):
        compile_together(module, interrupted)
    assert isinstance(seen[0], triton.AsyncCompileMode)
    assert _async_compile.active_mode.get() is None


def test_a_module_shows_all_but_its_kernels_as_it_is() -> None:
    problem = sparse_problem()
    module = problem.module()
    shown: list[Any] = []
    compile_together(module, shown.append)
    assert shown[0].BUDGET.value == module.BUDGET.value
    assert shown[0].__name__ == module.__name__
