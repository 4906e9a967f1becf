"""`generate()` through generated kernels: tokens as without them, and when indexes are built."""

from __future__ import annotations

import logging
import re
from typing import Any

import generating
import pytest
import torch
import triton_interpreter
from generating import EVERYTHING, LAYERS, beams, conversation, decoder, entered, lookup

from lychee_compile.kernels import index_log
from lychee_compile.kernels.gpu.lifecycle import IndexLifecycle

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("uncompiled_graphs", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


class Seen:
    """Calls of each layer, those of them that were sparse, and the indexes built for caches."""

    def __init__(self) -> None:
        self.calls = self.sparse = self.built = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Count what happens to caches over generations of few steps."""
    monkeypatch.setattr(generating, "NEW", 6)
    counts, after_call, build = Seen(), IndexLifecycle.after_call, IndexLifecycle._build

    def called(upkeep: IndexLifecycle, *given: Any) -> None:
        counts.calls += 1
        counts.sparse += upkeep.trusted
        after_call(upkeep, *given)

    def built(upkeep: IndexLifecycle, *given: Any) -> None:
        counts.built += 1
        build(upkeep, *given)

    monkeypatch.setattr(IndexLifecycle, "after_call", called)
    monkeypatch.setattr(IndexLifecycle, "_build", built)
    return counts


@pytest.mark.thorough
def test_turns_of_a_conversation_are_indexed_in_one_pass_each(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first turn after one step, later ones after two and four: turns this short do not pay."""
    monkeypatch.setattr(generating, "NEW", 12)
    monkeypatch.setattr(index_log, "WORTH_LOGGING", 20)
    model = decoder()
    given = entered("compile_config", model, EVERYTHING)
    with caplog.at_level(logging.INFO, "lychee_compile"):
        got = conversation(model, "static", given)
    assert torch.equal(got, conversation(decoder(), "static", {"disable_compile": True}))
    logged = [re.fullmatch(INDEXED, record.message) for record in caplog.records]
    ends = [int(each[1]) for each in logged if each is not None]
    turns = [37, 37 + 13, 37 + 2 * 13]  # tokens of each prefill
    assert ends == [
        end + steps for end, steps in zip(turns, (1, 2, 4), strict=True) for _ in range(LAYERS)
    ]
    assert seen.built == len(ends)


INDEXED = r"indexed (\d+) tokens of 2 KV heads in \d+ ms"


@pytest.mark.thorough
def test_drafts_that_are_taken_back(seen: Seen) -> None:
    model = decoder()
    entered("model.forward", model, EVERYTHING)
    assert torch.equal(lookup(model, "dynamic", {}), lookup(decoder(), "dynamic", {}))
    assert seen.sparse > 0


@pytest.mark.thorough
def test_beams_are_not_indexed_as_each_step_copies_their_cache(seen: Seen) -> None:
    model = decoder()
    entered("model.forward", model, EVERYTHING)
    assert torch.equal(beams(model, "static", {}), beams(decoder(), "static", {}))
    assert (seen.calls, seen.sparse) == (5 * LAYERS, 0)
    assert seen.built == LAYERS
