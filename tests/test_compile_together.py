"""Kernels that are compiled at the same time before any of them runs."""

from __future__ import annotations

from typing import Any

from decode_problems import Problem, Sizes, make_problem

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.compile_together import compile_together
from lychee_compile.kernels.slot_index import SlotIndex
from lychee_compile.kernels.slot_layout import SlotLayout


def sparse_problem() -> Problem:
    return make_problem(sizes=Sizes(kv_len=200), sparse=SparseSpec("lychee", 64, 4, 16, 2, 65536))


def test_nothing_runs_while_kernels_are_compiled() -> None:
    problem = sparse_problem()
    module = problem.module()
    index = SlotIndex(SlotLayout.of(problem.key), problem.key.device)
    index.parts.fine.fill_(0)
    compile_together(module, lambda given: index.build(given, problem.key, [200]))
    assert not index.parts.fine.any()
    index.build(module, problem.key, [200])
    assert index.parts.fine.any()


def test_a_module_shows_all_but_its_kernels_as_it_is() -> None:
    problem = sparse_problem()
    module = problem.module()
    shown: list[Any] = []
    compile_together(module, shown.append)
    assert shown[0].BUDGET.value == module.BUDGET.value
    assert shown[0].__name__ == module.__name__
