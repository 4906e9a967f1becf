"""`prepare` with generated kernels: the index is there before the first step."""

from __future__ import annotations

from typing import Any

import generating
import pytest
import torch
import triton_interpreter
from generating import EVERYTHING, LAYERS, decoder, greedy

import lychee_compile
from lychee_compile.kernels.gpu.lifecycle import IndexLifecycle

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("uncompiled_graphs", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


@pytest.mark.thorough
def test_the_first_step_behind_a_prompt_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of the prompt reads all keys; the index is built after it."""
    monkeypatch.setattr(generating, "NEW", 4)
    trusted: list[bool] = []
    after_call = IndexLifecycle.after_call

    def called(upkeep: IndexLifecycle, *given: Any) -> None:
        trusted.append(upkeep.trusted)
        after_call(upkeep, *given)

    monkeypatch.setattr(IndexLifecycle, "after_call", called)
    model = decoder()
    with lychee_compile.prepare(model, prefill_chunk=20, **EVERYTHING):
        got = greedy(model, None, {})
    assert torch.equal(got, greedy(decoder(), None, {}))
    assert trusted == [False] * LAYERS + [True] * LAYERS * 3
