"""Whatever happens to rows and pages between steps, no row is read by an index of other keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_interpreter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paged_rows import EVENTS, OPTIONS, ROWS, PagedRows, attend
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.page_index import PageDeviceIndex
from lychee_compile.kernels.gpu.owners import StaticCacheIndex
from lychee_compile.kernels.operators.cache_index import CacheIndex
from lychee_compile.runtime.cache_registry import registry
from lychee_compile.runtime.new_caches import NewCaches

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("uncompiled_graphs", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

GROUP_SIZE = 16
"""Tokens of a group of the policy."""
HISTORIES = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.integers(0, ROWS - 1), st.integers(0, 99)),
    min_size=6,
    max_size=12,
)
USUAL = [
    ("admit sharing", 1, 40), ("step", 0, 0), ("leave", 0, 0), ("admit sharing", 0, 9),
    ("pause", 1, 0), ("move a page", 1, 1), ("swap rows", 0, 2), ("pause", 1, 0), ("admit", 2, 33),
]  # fmt: skip
"""A history with each kind of event."""


def served(run: Any, history: list[tuple[str, int, int]], check: Any, steps: int = 2) -> None:
    """Take steps between events; `check` gets the rows, the arguments and the output of each."""
    registry.clear()
    torch.manual_seed(len(history))
    rows = PagedRows()
    for row in range(ROWS):
        rows.happen("admit", row, 20 * row)
    for event in [("step", 0, 0), *history]:
        rows.happen(*event)
        for _ in range(steps):
            arguments = rows.given()
            copies = [each.clone() for each in arguments]
            check(rows, copies, run(*arguments))
            rows.go_on()


def test_steps_choose_as_with_an_index_that_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NewCaches, "meet", lambda *_: None)  # copies do not come again
    run = torch.compile(attend, backend="lychee", options=OPTIONS)

    def check(rows: PagedRows, copies: list[Tensor], got: Tensor) -> None:
        assert torch.equal(got, run(*copies))

    @settings(max_examples=max(settings().max_examples // 2, 2))
    @given(HISTORIES)
    @example(USUAL)
    def histories(history: list[tuple[str, int, int]]) -> None:
        served(run, history, check)

    histories()
    assert [each.decision for each in lychee_compile.reports()[-1].sites] == ["sparse"]


def test_only_keys_of_moved_pages_are_indexed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that changes does not tell that all rows must be compared."""
    compared, forgot = [], []
    compare, forget = CacheIndex._compare, CacheIndex._forget
    monkeypatch.setattr(
        CacheIndex, "_compare", lambda own, key: (compared.append(1), compare(own, key))
    )
    monkeypatch.setattr(
        CacheIndex, "_forget", lambda own, keep: (forgot.append(keep.tolist()), forget(own, keep))
    )
    run, rows = torch.compile(attend, backend="lychee", options=OPTIONS), PagedRows()
    for row in range(ROWS):
        rows.happen("admit sharing", row, 20 * row)
    for event in ["step", "step", "leave"]:
        rows.happen(event, 1, 0)
        run(*rows.given())
        rows.go_on()
    assert not compared
    # The other rows have 32 and 72 tokens, and a new page behind these.
    assert forgot[-2] == [32, 0, 72]


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_kernels_trust_no_row_whose_keys_have_changed(kernels_on_cpu: None, many: bool) -> None:
    run = torch.compile(attend, backend="lychee", options=OPTIONS)
    trusted: list[int] = []

    def check(rows: PagedRows, copies: list[Tensor], got: Tensor) -> None:
        (entry,) = registry._entries.values()
        assert isinstance(entry.owner, StaticCacheIndex)
        index, ends = entry.owner.index, (copies[3][:, 0] + 1).tolist()
        trust, *held = index.parts.header.tolist()
        sure = [row for row in range(ROWS) if trust == 1 and held[row] >= 0]
        assert [held[row] for row in sure] == [ends[row] for row in sure]
        trusted.append(len(sure))
        fresh = built_anew(index.layout, rows.keys(), ends)
        for name in fresh.named:
            mine, anew = index.parts._asdict()[name], fresh.named[name]
            for row in sure if name.startswith("summary_") else []:
                full = slice(None, ends[row] // GROUP_SIZE)
                assert torch.equal(mine[row, :, full], anew[row, :, full])

    @settings(max_examples=max(settings().max_examples // 100, 1))
    @given(HISTORIES)
    def histories(history: list[tuple[str, int, int]]) -> None:
        served(run, history, check)

    if many:
        histories()
    else:
        served(run, USUAL, check, steps=1)
    assert [each.decision for each in lychee_compile.reports()[-1].sites] == ["sparse"]
    assert sum(trusted) > 1.5 * len(trusted)  # most rows keep their index


def built_anew(layout: LevelLayout, keys: Tensor, ends: list[int]) -> PageDeviceIndex:
    """Return an index of the keys as they are now."""
    fresh = PageDeviceIndex(layout, torch.device("cpu"))
    fresh.record = lambda *_: None  # type: ignore[method-assign]  fingerprints are of a kernel
    fresh.build(None, keys, ends)  # type: ignore[arg-type]
    return fresh
