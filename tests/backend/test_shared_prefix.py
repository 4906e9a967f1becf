"""Steps of rows that share a prefix: dense if all is read, each row's own choice otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import shared_prefixes
import torch
import torch.nn.functional as F
from memory_keys import one_operator
from shared_prefixes import DV, PREFIX, SLOTS, B, D, G, Growing, H, Static, caches, new, prefix
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.kernels.operators.observe import SparseCall, observers

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")

SHAPE = {"sinks": 2, "recent": 8, "chunk": (2, 4)}
SMALL = {"budget": 24, **SHAPE}
WHOLE = {"budget": 36, **SHAPE}  # three rows: the prefix is read whole
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture
def calls() -> Iterator[list[SparseCall]]:
    """Return the sparse calls of a test, each with what it has read."""
    seen: list[SparseCall] = []
    observers.append(seen.append)
    yield seen
    observers.remove(seen.append)


def compiled(made: Any, options: dict[str, Any]) -> Any:
    return torch.compile(made, backend="lychee", options=options)


def in_place(made: Any, step: Any, held: Any, pos: list[int], **given: Any) -> None:
    """Check that a step through the backend gives and leaves what the model does."""
    query, *fresh = new(len(pos), **given)
    copies = [each.clone() for each in held]
    position = torch.tensor(pos)
    expected = made(query, *copies, position, *fresh)
    got = step(query, *held, position, *fresh)
    close = CLOSE if got.dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(list(held), copies, atol=0, rtol=0)


@pytest.mark.parametrize("model", shared_prefixes.STATIC)
def test_what_is_read_whole_is_dense(model: Any) -> None:
    made, held = model(), [*prefix(), *caches(SLOTS)]
    step = compiled(made, WHOLE)
    for pos in range(20, 22):
        in_place(made, step, held, [pos])
    assert counters["lychee"]["sparse"] == 1
    (site,) = lychee_compile.reports()[-1].sites
    assert site.reads.endswith("a prefix of 150 tokens that all rows share, whole and once")


def test_drafts_in_half_precision_and_other_layouts_are_dense() -> None:
    half = torch.bfloat16
    made, held = Static(), [*prefix(half), *caches(SLOTS, half)]
    step = compiled(made, WHOLE)
    for pos in (10, 12):
        in_place(made, step, held, [pos, pos + 1], dtype=half)
    made = shared_prefixes.TokensFirst()
    step = compiled(made, WHOLE)
    held = shared_prefixes.tokens_first(*prefix(), *caches(SLOTS))
    in_place(made, step, held, [7])
    assert counters["lychee"]["sparse"] == 2


@pytest.mark.parametrize(
    "model", [shared_prefixes.Biased, pytest.param(Growing, marks=pytest.mark.thorough)]
)
def test_own_keys_that_grow_are_dense(model: Any) -> None:
    made, shared, held = model(), prefix(), caches(20)
    step = compiled(made, {**WHOLE, "budget": 30})
    for _ in range(3):
        query, *fresh = new()
        expected, *left = made(query, *shared, *held, *fresh)
        got, *held = step(query, *shared, *held, *fresh)
        torch.testing.assert_close(got, expected, **CLOSE)
        torch.testing.assert_close(held, left, atol=0, rtol=0)


def test_rows_of_an_input_that_share_their_memory() -> None:
    made = Static()
    held = [each.expand(B, -1, -1, -1) for each in prefix()] + list(caches(SLOTS))
    step = compiled(made, WHOLE)
    for pos in range(3):
        in_place(made, step, held, [pos])
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "coverage": 0.8}, {**SMALL, "epsilon": 0.5}])
@pytest.mark.parametrize("count", [1, 2])
def test_each_row_reads_its_own_choice(options: Any, count: int, calls: list[SparseCall]) -> None:
    made, held = Static(), [*prefix(), *caches(SLOTS)]
    step = compiled(made, {**options, "budget": 24 if count == 1 else 12})
    differs = False
    for pos in range(20, 22):
        calls.clear()
        query, *fresh = new(count)
        positions = torch.arange(pos, pos + count)
        got = step(query, *held, positions, *fresh)
        if pos == 20:
            continue  # a prefix is indexed when it comes again
        of_prefix, of_own = calls
        assert of_prefix.index.batch == 1
        read = of_prefix.selection.token_mask()[0].unflatten(1, (B, count)).transpose(0, 1)
        own = of_own.selection.token_mask()
        mask = torch.cat((read, own), -1).repeat_interleave(G, 1)
        keys, values = (shared_prefixes.both(*held[n::2]) for n in range(2))
        torch.testing.assert_close(got, one_operator(query, keys, values, mask), **CLOSE)
        differs |= bool((read[0] != read[1]).any())
        if "epsilon" not in options:
            assert int(read.sum(-1).max()) <= 24
    assert differs


def test_no_row_reads_a_prefix_that_was_replaced_or_written() -> None:
    """One key is that of the query, and its value is one; all other values are zeros."""
    own = torch.randn(B, H, SLOTS, D), torch.zeros(B, H, SLOTS, DV)
    step, direction = compiled(Static(), SMALL), torch.randn(D)

    def filled(slot: int) -> tuple[Tensor, Tensor]:
        keys, _ = prefix()
        keys[:, :, slot] = 9 * direction
        return keys, F.one_hot(torch.full((1, H, DV), slot), PREFIX).mT.float().contiguous()

    def is_found(shared: tuple[Tensor, Tensor], begin: int) -> None:
        for pos in range(begin, begin + 3):
            query, key, value = direction.expand(B, H * G, 1, -1), *new()[1:]
            got = step(query, *shared, *own, torch.tensor([pos]), key, value * 0)
            torch.testing.assert_close(got, torch.ones_like(got), atol=1e-3, rtol=0)

    first = filled(70)
    is_found(first, 0)
    is_found(filled(40), 3)
    for held, other in zip(first, filled(100), strict=True):
        held.copy_(other)
    is_found(first, 6)


def test_a_prefix_of_some_rows_alone_is_read_for_each_row() -> None:
    """Two prompts of two samples each: rows share memory in pairs."""

    class Pairs(Static):
        def forward(self, q: Tensor, pk: Tensor, pv: Tensor, *rest: Any) -> Tensor:  # type: ignore[override]
            pk, pv = (each[:, None].expand(-1, 2, -1, -1, -1).flatten(0, 1) for each in (pk, pv))
            return super().forward(q, pk, pv, *rest)

    made = Pairs()
    pairs = torch.randn(2, H, PREFIX, 16), torch.randn(2, H, PREFIX, 8)
    held = [*pairs, *caches(SLOTS, rows=4)]
    step = compiled(made, {**SMALL, "budget": PREFIX + SLOTS - 1})
    in_place(made, step, held, [3], rows=4)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"
    assert "share" not in site.reads
