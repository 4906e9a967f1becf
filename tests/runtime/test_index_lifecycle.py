"""When indexes by slot are built, refitted, distrusted, moved and given up."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lychee_compile.kernels.gpu import lifecycle, owners
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.common.index import REFIT
from lychee_compile.kernels.gpu.lifecycle import MOST_CALLS_TO_WAIT, WORTHWHILE
from lychee_compile.kernels.gpu.lychee import layout as sketch_layout
from lychee_compile.kernels.gpu.lychee import method
from lychee_compile.kernels.gpu.lychee.index import LEAST_REFIT, SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import BLOCK, SketchLayout
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex, StaticCacheIndex
from lychee_compile.passes.lower.index_inputs import CacheArgument
from lychee_compile.runtime.cache_registry import registry
from lychee_compile.runtime.stateful_graph import StatefulGraph

KEY = torch.randn(2, 3, 2000, 16)
LAYOUT = SketchLayout.over(KEY)


def use(written: int = 1, layout: SketchLayout | None = LAYOUT) -> CacheUse:
    return CacheUse("decode_lychee_f32", lambda cache: cache, written, layout, "lychee")


class Calls(list[tuple[str, int]]):
    """Work done on indexes: ("build" or "refit", end of the longest row)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[list[int]]] = {"build": [], "refit": []}
        """The ends of all rows."""

    def note(self, name: str, ends: Sequence[int]) -> None:
        self.append((name, max(ends)))
        self.rows[name].append(list(ends))

    def ends(self, name: str) -> list[int]:
        return [end for each, end in self if each == name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Indexes are built and refitted in name only."""
    done = Calls()

    def build(index: SketchIndex, module: Any, key: Tensor, ends: Sequence[int]) -> None:
        done.note("build", ends)
        index.parts.header[:] = torch.tensor([1, *ends])

    def refit(index: SketchIndex, module: Any, key: Tensor, ends: Sequence[int]) -> None:
        assert max(ends) <= key.shape[2]
        done.note("refit", ends)

    monkeypatch.setattr(lifecycle, "_turns", count())  # refits depend on what was made before
    monkeypatch.setattr(lifecycle, "load", lambda kernel: kernel)
    module = SimpleNamespace(POLICY="lychee", FLAT_TOKENS=65536)
    monkeypatch.setattr("lychee_compile.kernels.gpu.methods.load", lambda kernel: module)
    monkeypatch.setattr(SketchIndex, "build", build)
    monkeypatch.setattr(SketchIndex, "refit", refit)
    lifecycle.warn_of_memory.cache_clear()
    yield done
    lifecycle.warn_of_memory.cache_clear()


def stepped(upkeep: StaticCacheIndex, end: int | Tensor, written: int = 1) -> None:
    """Tell the index that a graph has written up to slot `end`, one for all rows or one each."""
    upkeep.index.parts.header[1:] = end
    upkeep.after_call(KEY, use(written))


def test_an_index_is_built_up_to_what_the_first_step_has_written(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    assert not upkeep.trusted
    stepped(upkeep, 70)
    assert upkeep.trusted
    for end in range(71, 90):
        stepped(upkeep, end)
    assert calls == [("build", 70)]
    assert upkeep.tensor is upkeep.index.state
    assert upkeep.tensor.shape == (LAYOUT.size,)


def test_an_index_is_built_before_the_first_step_if_the_cache_tells_its_end(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([70, None, None])
    monkeypatch.setattr(lifecycle, "filled_slots", lambda cache: next(told))
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    upkeep.before_call(KEY, use(), ())
    assert upkeep.trusted
    stepped(upkeep, 71)
    upkeep.distrust()
    upkeep.before_call(KEY, use(), ())
    assert calls.rows["build"] == [[70, 70]]


def rows_lost(upkeep: StaticCacheIndex, row: int) -> None:
    upkeep.forget(torch.tensor([2000 if each != row else 5 for each in range(2)]))


def test_a_lost_row_is_indexed_alone_and_waits_if_it_is_lost_again(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    stepped(upkeep, 70)
    header = upkeep.index.parts.header
    for wait in (1, 3, 7):
        rows_lost(upkeep, 1)
        assert header.tolist()[1] >= 0 > header.tolist()[2]
        waited = 0
        while int(header[2]) < 0:
            upkeep.after_call(KEY, use())
            upkeep.before_call(KEY, use(), ())
            waited += 1
        assert waited == wait + 1
        assert calls[-1][0] == "build"
    assert upkeep.trusted
    assert [len(ends) for ends in calls.rows["build"]] == [2, 1, 1, 1]


def test_an_index_whose_rows_are_all_lost_is_lost(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    stepped(upkeep, 70)
    upkeep.forget(torch.tensor([5, 5]))
    upkeep.after_call(KEY, use())
    upkeep.before_call(KEY, use(), ())
    assert not upkeep.trusted
    stepped(upkeep, 72)
    stepped(upkeep, 73)
    assert upkeep.trusted
    assert calls.rows["build"] == [[70, 70], [73, 73]]


def test_what_only_reads_is_indexed_as_a_whole(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    upkeep.after_call(KEY, use(written=0))
    assert calls == [("build", 2000)]


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_newest_block_is_refitted_now_and_then(calls: Calls, drafts: int) -> None:
    """Up to the newest token, however often others were taken back."""
    upkeep, end, ends = StaticCacheIndex(LAYOUT, KEY.device), 100, []
    for _ in range(5 * REFIT):
        end += 1
        stepped(upkeep, end + drafts, written=1 + drafts)
        ends.append(end + drafts)
    refits = [end for end in calls.ends("refit") if end <= ends[-1]]
    places = [ends.index(end) for end in refits]
    assert 100 // (1 + drafts) <= places[0] <= 160
    for end, (left, right) in zip(refits, pairwise(places), strict=False):
        least = REFIT if end >= REFIT else LEAST_REFIT
        assert right - left == 1 + -(-max(end, least) // (1 + drafts))
    assert len(places) >= 2


@given(st.integers(1, 3 * BLOCK))
def test_a_block_is_refitted_whenever_its_keys_double(end: int) -> None:
    index, blocks = SketchIndex(LAYOUT, KEY.device), []
    while end <= 5 * BLOCK:
        count = (end - 1) % BLOCK + 1
        blocks.append((end - 1) // BLOCK)
        after = index.refit_after(end)
        assert min(REFIT, max(end, LEAST_REFIT)) <= after <= max(count, REFIT) + REFIT
        end += after
    for block in range(blocks[0] + 1, 5):
        assert 1 <= blocks.count(block) <= 1 + math.log2(BLOCK / REFIT)


def test_layers_are_not_refitted_in_the_same_step(calls: Calls) -> None:
    layers = [StaticCacheIndex(LAYOUT, KEY.device) for _ in range(32)]
    busiest = 0
    for end in range(100, 100 + 2 * REFIT + 2):
        before = len(calls.ends("refit"))
        for layer in layers:
            stepped(layer, end)
        busiest = max(busiest, len(calls.ends("refit")) - before)
    assert busiest == 1
    assert len(calls.ends("refit")) >= 32


def test_refits_stay_within_the_cache(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    for _ in range(2 * KEY.shape[2]):
        stepped(upkeep, KEY.shape[2])
    assert set(calls.ends("refit")) == {KEY.shape[2]}


def test_distrust_makes_it_wait_the_longer_the_sooner_it_comes(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)

    def waits() -> int:
        """Return the number of calls until it is trusted, counting the one that builds it."""
        for number in range(1, MOST_CALLS_TO_WAIT + 3):
            stepped(upkeep, 50)
            if upkeep.trusted:
                return number
        raise AssertionError("never trusted")

    def lose_after(count: int) -> None:
        for _ in range(count):
            stepped(upkeep, 50)
        upkeep.distrust()
        assert not upkeep.trusted
        assert int(upkeep.index.parts.header[0]) == 0

    assert waits() == 1
    for expected in (2, 4, 8):
        lose_after(1)
        assert waits() == expected
    for _ in range(9):
        lose_after(1)
        waited = waits()
    assert waited == MOST_CALLS_TO_WAIT + 1
    lose_after(WORTHWHILE)
    assert waits() == 1


def test_distrust_again_starts_the_waiting_anew(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    stepped(upkeep, 50)
    for _ in range(5):  # lost at every call
        upkeep.distrust()
        stepped(upkeep, 51)
    assert len(calls) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_the_host_learns_that_kernels_took_trust_away(calls: Calls, inference: bool) -> None:
    with torch.inference_mode(inference):
        key = torch.zeros(KEY.shape)
    upkeep = StaticCacheIndex(LAYOUT, key.device)

    def calls_until(trusted: bool) -> int:
        for number in range(1, 200):
            upkeep.after_call(key, use(written=0))
            if upkeep.trusted is trusted:
                return number
        raise AssertionError

    assert calls_until(True) == 1
    every = lifecycle.LOOK_INFERENCE if inference else lifecycle.LOOK
    for wait in (2, 4):
        upkeep.index.parts.header[0] = 2
        assert calls_until(False) <= every + 1
        assert int(upkeep.index.parts.header[0]) == 0
        assert calls_until(True) == wait  # it was lost before it was of use
    assert len(calls) == 3
    for _ in range(2 * every):
        upkeep.after_call(key, use(written=0))
    assert upkeep.trusted


def test_every_row_of_a_batch_has_an_end_of_its_own(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    for step in range(140):
        stepped(upkeep, torch.tensor([70, 1500]) + step)
    assert calls.rows["build"] == [[70, 1500]]
    (ends,) = calls.rows[
        "refit"
    ]  # when the keys of the shorter row had doubled, or half as many again came
    assert 140 <= ends[0] <= 180
    assert ends[1] == ends[0] + 1430


def test_ends_of_rows_come_from_the_positions_written_to_a_cache_that_grows(calls: Calls) -> None:
    growing = GrowingCacheIndex()
    growing.index_for(KEY, torch.tensor([[69], [-500]]))
    growing.after_call(KEY, use(layout=None))
    assert calls.rows["build"] == [[70, 1501]]


def test_a_row_that_stands_still_calls_for_no_refits(calls: Calls) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)
    for end in range(400, 1900):
        stepped(upkeep, torch.tensor([5, end]))
    refits = calls.ends("refit")
    # Soon after the build, for the short row; then each time the keys of the other double.
    assert len(refits) <= 3
    assert refits[-1] > 800


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_index_half_built_is_not_trusted(
    calls: Calls, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep = StaticCacheIndex(LAYOUT, KEY.device)

    def half(index: SketchIndex, *given: Any) -> None:
        index.parts.header[0] = 1
        raise error("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(SketchIndex, "build", half)
        with pytest.raises(error):
            stepped(upkeep, 50)
    assert int(upkeep.index.parts.header[0]) == 0
    stepped(upkeep, 51)
    assert upkeep.trusted


def full(*given: Any) -> Any:
    raise torch.OutOfMemoryError


def test_where_the_index_finds_no_memory_attention_stays_exact(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Caches that there is no memory for share one index that nobody trusts."""
    tries = iter([full, SketchIndex, full, full])

    def sometimes(*given: Any) -> SketchIndex:
        return next(tries)(*given)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "lychee_compile"):
        patched.setattr(method, "SketchIndex", sometimes)
        layers = [StaticCacheIndex(LAYOUT, KEY.device) for _ in range(3)]
    assert len({id(each.tensor) for each in layers}) == 1
    for layer in layers:
        for _ in range(3):
            stepped(layer, 50)
            layer.distrust()
        assert not layer.trusted
    assert not calls
    (record,) = caplog.records
    assert "reads all keys" in record.message
    del layers, layer
    assert not owners._spares


def test_where_building_finds_no_memory_it_is_not_tried_again(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upkeeps = StaticCacheIndex(LAYOUT, KEY.device), GrowingCacheIndex()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "lychee_compile"):
        patched.setattr(SketchIndex, "build", full)
        for upkeep in upkeeps:
            upkeep.after_call(KEY, use())
    for upkeep in upkeeps:
        upkeep.after_call(KEY, use())
        assert not upkeep.trusted
    assert not calls
    assert len(caplog.records) == 1


def grown() -> GrowingCacheIndex:
    """One that is trusted, over the 2000 slots of `KEY`."""
    upkeep = GrowingCacheIndex()
    assert upkeep.index_for(KEY, torch.tensor([1998, 1999])) is None
    upkeep.after_call(KEY, use(2, None))
    assert upkeep.trusted
    return upkeep


def test_a_growing_index_takes_what_it_knows_along(calls: Calls) -> None:
    upkeep = grown()
    assert calls == [("build", 2000)]
    before = upkeep.index_for(KEY, torch.tensor([0]))
    assert before is not None
    assert before.layout.slots == 3072
    before.state.random_(256)
    longer = torch.empty(2, 3, 9000, 16)
    after = upkeep.index_for(longer, torch.tensor([8999]))
    assert after is not None
    assert after.layout.slots >= 9000
    assert torch.equal(after.parts.header, before.parts.header)
    for old, new in zip(before.parts[1:], after.parts[1:], strict=True):
        assert torch.equal(new[:, :, : old.shape[2]].view(torch.uint8), old.view(torch.uint8))
    assert upkeep.index_for(KEY, None) is after


def test_a_growing_index_whose_blocks_become_larger_is_built_anew(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch_layout, "BLOCK", 128)
    upkeep, longer = grown(), torch.empty(2, 3, 9000, 16)
    assert upkeep.index is not None
    assert upkeep.index.layout.block == 128
    assert upkeep.index_for(longer, torch.tensor([8999])) is None
    upkeep.after_call(longer, use(1, None))
    assert calls == [("build", 2000), ("build", 9000)]
    assert upkeep.trusted
    assert upkeep.index.layout.block == 512


@pytest.mark.parametrize(
    ("slots", "size"),
    [(1, 8192), (2**18, 8192), (2**18 + 1, 16384), (2**19, 16384), (2**20, 32768), (2**22, 32768)],
)
def test_there_are_few_blocks_and_none_is_huge(slots: int, size: int) -> None:
    assert sketch_layout.block_size(slots) == size


def test_the_end_of_a_cache_of_unknown_size_is_where_the_graph_wrote(calls: Calls) -> None:
    upkeep = GrowingCacheIndex()
    upkeep.index_for(KEY, torch.tensor([[5, 6], [9, -1900]]))
    upkeep.index_for(KEY, None)  # another site of the graph
    upkeep.after_call(KEY, use(2, None))
    assert calls == [("build", 101)]


@pytest.mark.parametrize("shape", [(3, 3, 2000, 16), (2, 1, 2000, 16), (2, 3, 2000, 8)])
def test_a_growing_index_of_other_keys_is_none(calls: Calls, shape: tuple[int, ...]) -> None:
    upkeep = grown()
    assert upkeep.index_for(torch.empty(shape), None) is None
    assert not upkeep.trusted


def test_the_first_rows_of_a_cache_have_its_index(calls: Calls) -> None:
    assert grown().index_for(KEY[:1], None) is not None


def test_where_a_growing_index_finds_no_memory_it_is_given_up(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep, longer = grown(), torch.empty(2, 3, 9000, 16)
    monkeypatch.setattr(method, "SketchIndex", full)
    assert upkeep.index_for(longer, None) is None
    upkeep.after_call(longer, use(1, None))
    assert not upkeep.trusted


def test_in_steady_decoding_nothing_is_looked_up(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same caches as at the last call are known at sight; others, and lost entries, are not."""
    registry.clear()
    given: list[Tensor] = []
    graph = StatefulGraph(
        lambda cache, state: given.append(state), [CacheArgument(0, None, 2, use())], None, None
    )
    caches = [torch.zeros(2, 3, 2000, 16) for _ in range(2)]
    graph(caches[0])
    with monkeypatch.context() as patched:
        patched.setattr(registry, "acquire", full)
        graph(caches[0])
    graph(caches[1])
    graph(caches[0])
    assert [id(state) == id(given[0]) for state in given] == [True, True, False, True]
    registry.clear()
    graph(caches[0])
    assert given[4] is not given[0]
    assert len(calls) == 3
    caches[0].add_(1)
    graph(caches[0])
    assert int(given[4].view(torch.int32)[0]) == 0
