"""transformers' `generate()` through the backend, by every entry: tokens as without it."""

from __future__ import annotations

import pytest
import torch
from generating import (
    EVERYTHING,
    LAYERS,
    NEW,
    PROMPT,
    SPARSE,
    Way,
    assert_everything_read,
    beams,
    beside_dense,
    conversation,
    decoder,
    entered,
    greedy,
    padded,
    sampled,
)
from torch._dynamo.utils import counters

import lychee_compile

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

STEPS = NEW - 1
"""Decoding steps of one generation: its first token comes from the prefill."""
ENTRIES: dict[tuple[str, str], list[Way]] = {
    # With beams transformers compiles nothing by itself.
    ("compile_config", "static"): [greedy, sampled, padded, conversation],
    ("model.forward", "static"): [greedy, sampled, padded, beams],
    ("model.forward", "dynamic"): [greedy, sampled, padded, beams],
    ("model.compile", "static"): [greedy, sampled, beams],
    ("model.compile", "dynamic"): [greedy, sampled, beams],
}


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        pytest.param(*each, marks=pytest.mark.thorough if number else ())
        for number, each in enumerate(ENTRIES)
    ],
)
def test_with_everything_read_tokens_are_dense(entry: str, kind: str) -> None:
    """One compiled model decodes in one way after another, each with a cache of its own."""
    model = decoder()
    given = entered(entry, model, EVERYTHING)
    for way in ENTRIES[entry, kind]:
        got, dense, recorder = beside_dense(way, kind, model, given)
        assert torch.equal(got, dense), way.__name__
        # The first step over a growing cache is compiled for that one length, within the budget.
        assert_everything_read(recorder, STEPS - 1)
    assert counters["lychee"]["sparse"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "entry", ["compile_config", pytest.param("model.forward", marks=pytest.mark.thorough)]
)
def test_below_the_length_the_keys_that_matter_are_read(entry: str) -> None:
    """48 of 61 to 73 keys hold nearly all of the softmax here, and give the dense tokens."""
    model = decoder()
    given = entered(entry, model, SPARSE)
    for way in (greedy, sampled):
        got, dense, recorder = beside_dense(way, "static", model, given)
        assert torch.equal(got, dense)
        assert len(recorder.calls) == LAYERS * STEPS
        assert {call.kv_len for call in recorder.calls} == set(range(PROMPT + 1, PROMPT + NEW))
        assert all(bool((call.tokens_read == 48).all()) for call in recorder.calls)
        assert mass_read(recorder) > 0.99


def test_as_many_keys_that_do_not_matter_give_other_tokens() -> None:
    """So the tests above can tell."""
    model = decoder()
    given = entered("compile_config", model, {**SPARSE, "policy": "streaming"})
    got, dense, recorder = beside_dense(greedy, "static", model, given)
    assert all(bool((call.tokens_read == 48).all()) for call in recorder.calls)
    assert mass_read(recorder) < 0.9
    assert not torch.equal(got, dense)


def mass_read(recorder: lychee_compile.recorder.Recorder) -> float:
    """Return the mean share of the softmax that was read."""
    shares = [call.mass for call in recorder.calls if call.mass is not None]
    return float(torch.stack(shares).mean())


def test_what_one_model_has_compiled_serves_every_cache_and_every_call() -> None:
    model = decoder()
    given = entered("compile_config", model, SPARSE)
    first = greedy(model, "static", given)
    graphs = counters["stats"]["unique_graphs"]
    for way in (sampled, padded, conversation):
        way(model, "static", given)
    assert torch.equal(greedy(model, "static", given), first)
    assert counters["stats"]["unique_graphs"] == graphs == 1
    (report,) = lychee_compile.reports()
    assert [site.decision for site in report.sites] == ["sparse"] * LAYERS
