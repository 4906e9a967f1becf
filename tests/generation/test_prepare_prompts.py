"""`prepare`: prompts through the backend, in chunks, densely and sparsely, with their tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from generating import (
    EVERYTHING,
    LAYERS,
    NEW,
    PROMPT,
    SPARSE,
    VOCABULARY,
    assert_everything_read,
    beside_dense,
    decoder,
    generate,
    greedy,
    padded,
    tokens,
)

import lychee_compile
from lychee_compile.boundaries import BoundaryTable
from lychee_compile.generation.caches import LEAST, capacity
from lychee_compile.generation.prompt import pieces

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def test_the_first_step_of_a_prompt_in_chunks_is_sparse_already() -> None:
    """The last token of the prompt is the first step: it finds the index, or makes it."""
    model = decoder()
    with lychee_compile.prepare(model, prefill_chunk=20, **SPARSE):
        got, dense, recorder = beside_dense(greedy, None, model, {})
    assert torch.equal(got, dense)
    assert len(recorder.calls) == LAYERS * NEW
    assert {call.kv_len for call in recorder.calls} == set(range(PROMPT, PROMPT + NEW))
    assert all(bool((call.tokens_read == 48).all()) for call in recorder.calls)


@pytest.mark.parametrize("way", [greedy, pytest.param(padded, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("share", [1.0, pytest.param(0.3, marks=pytest.mark.thorough)])
def test_a_sparse_prompt(way: Any, share: float) -> None:
    """With all keys in its budget it gives the dense tokens."""
    model = decoder()
    options = {"prefill": "sparse", "prefill_from": 1, "prefill_budget": share}
    with lychee_compile.prepare(model, prefill_chunk=24, **options, **EVERYTHING):
        got, dense, recorder = beside_dense(way, None, model, {})
    assert share < 1 or torch.equal(got, dense)
    assert [call.query_len for call in recorder.whole] == [24] * 2 * LAYERS
    assert_everything_read(recorder, NEW)


def test_the_index_is_told_the_tokens_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each layer, in their order, though the prompt is not cut."""
    seen: list[torch.Tensor] = []
    lookup = BoundaryTable.lookup

    def spied(table: BoundaryTable, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return lookup(table, ids)

    monkeypatch.setattr(BoundaryTable, "lookup", spied)
    strengths = torch.randint(5, (VOCABULARY,), dtype=torch.uint8)
    model = decoder()
    with lychee_compile.prepare(model, tokenizer=strengths, **EVERYTHING):
        got, dense, _ = beside_dense(greedy, None, model, {})
    assert torch.equal(got, dense)
    assert torch.equal(torch.cat(seen[::LAYERS], 1), got[:, :-1])


def test_a_prompt_that_must_stay_whole_is_dense_and_one_warning_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = decoder()
    embedded = model.get_input_embeddings()(tokens(2, PROMPT))
    with lychee_compile.prepare(model, prefill="sparse", **EVERYTHING):
        for _ in range(2):
            got = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    dense = decoder().generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, dense)
    told = [each.message for each in caplog.records if "densely" in each.message]
    assert told == [
        "a prompt is read densely, by generate(): the prompt is made of more than tokens"
    ]


def test_without_a_cache_a_warning_says_that_nothing_is_sparse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = decoder(), tokens(1, 20)
    with lychee_compile.prepare(model, **EVERYTHING), caplog.at_level(logging.WARNING):
        got = generate(model, None, ids, use_cache=False, max_new_tokens=2)
    assert torch.equal(got, generate(decoder(), None, ids, use_cache=False, max_new_tokens=2))
    assert "use_cache=False: without a cache no step can be sparse" in caplog.messages


@pytest.mark.parametrize(
    ("begin", "end", "chunk", "cuts"),
    [
        (0, 59, 20, [(0, 19), (19, 39), (39, 59)]),
        (0, 60, 20, [(0, 20), (20, 40), (40, 60)]),
        (0, 7, 20, [(0, 7)]),
        (30, 59, 20, [(30, 39), (39, 59)]),
        (0, 59, None, [(0, 59)]),
        (59, 59, 20, []),
        (60, 59, None, []),
    ],
)
def test_a_range_is_cut_with_the_odd_piece_first(
    begin: int, end: int, chunk: int | None, cuts: list[tuple[int, int]]
) -> None:
    assert pieces(begin, end, chunk) == cuts


@pytest.mark.parametrize(
    ("begin", "end", "cuts"),
    [
        (0, 90, [(0, 50), (50, 70), (70, 90)]),
        (0, 60, [(0, 60)]),
        (0, 40, [(0, 40)]),
        (45, 90, [(45, 50), (50, 70), (70, 90)]),
        (60, 90, [(60, 70), (70, 90)]),
    ],
)
def test_no_chunk_begins_where_attention_is_dense(
    begin: int, end: int, cuts: list[tuple[int, int]]
) -> None:
    assert pieces(begin, end, 20, plain_until=45) == cuts


@pytest.mark.parametrize("tokens", [1, 2047, 2048, 2049, 5000, 65_537, 131_072, 1_000_000])
def test_capacities_are_few_and_at_most_a_quarter_too_large(tokens: int) -> None:
    slots = capacity(tokens)
    assert slots >= tokens
    assert slots % 512 == 0
    assert slots == LEAST or slots <= 1.25 * tokens
    assert capacity(slots) == slots
