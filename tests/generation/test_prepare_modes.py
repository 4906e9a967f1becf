"""`prepare`: every mode of `generate()` gives the plain model's tokens, decoded by the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_names import CACHE
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
    chunked,
    decoder,
    drafted,
    generate,
    greedy,
    lookup,
    padded,
    sampled,
    tokens,
    transformers,
)
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")
STEPS = NEW - 1
Given = dict[str, Any]


def several(model: Any, kind: str | None, given: Given) -> Tensor:
    """Generate two samples of each row."""
    return generate(model, kind, tokens(2, PROMPT, 8), do_sample=True, num_return_sequences=2)


def turns(model: Any, kind: str | None, given: Given) -> Tensor:
    """Generate in three turns over the cache that the first turn returned."""
    ids, kept = tokens(2, PROMPT - 30, 5), {}
    for turn in range(3):
        ids = torch.cat((ids, tokens(2, 7, turn)), 1)
        given = {"return_dict_in_generate": True, "max_new_tokens": NEW // 2, **kept}
        output = generate(model, None, ids, **given)
        name = "cache" if "cache" in output else "past_key_values"
        ids, kept = output.sequences, {name: output[name]}
    return ids


def inferring(model: Any, kind: str | None, given: Given) -> Tensor:
    with torch.inference_mode():
        return greedy(model, None, {}).clone()


def configured(model: Any, kind: str | None, given: Given) -> Tensor:
    """Generate with a configuration and arguments by position."""
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return model.generate(tokens(2, PROMPT), config)


def scored(model: Any, kind: str | None, given: Given) -> Tensor:
    """Return hidden states: those of the whole prompt are asked for too."""
    wanted = {"output_hidden_states": True, "return_dict_in_generate": True}
    output = generate(model, None, tokens(2, PROMPT), **wanted)
    assert output.hidden_states[0][0].shape[1] == PROMPT
    return output.sequences


def longer(model: Any, kind: str | None, given: Given) -> Tensor:
    """Generate more tokens than before, to another length."""
    return generate(model, None, tokens(2, PROMPT), max_new_tokens=NEW + 5)


class Listener(transformers.generation.BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def streamed(model: Any, kind: str | None, given: Given) -> Tensor:
    """Hear every token, the prompt first."""
    listener = Listener()
    got = generate(model, None, tokens(1, PROMPT), streamer=listener)
    assert listener.heard == got[0].tolist()
    assert listener.ended
    return got


QUICK: list[Way] = [
    greedy, longer, sampled, configured, several, beams, padded, turns, streamed,
]  # fmt: skip


def test_one_prepared_model_decodes_in_one_mode_after_another() -> None:
    """A mode compiles nothing of its own, whatever the number of tokens: two graphs serve all.

    The first is for the rows of the first call, the second for any number of rows.
    """
    model = decoder()
    with lychee_compile.prepare(model, **EVERYTHING):
        for way in QUICK:
            got, dense, recorder = beside_dense(way, None, model, {})
            assert torch.equal(got, dense), way.__name__
            assert_everything_read(recorder, STEPS)
    assert counters["stats"]["unique_graphs"] <= 3  # of one row, Dynamo makes one more
    assert not counters["graph_break"]


@pytest.mark.thorough
@pytest.mark.parametrize("way", [inferring, scored])
def test_what_needs_a_graph_of_its_own(way: Way) -> None:
    """Inference tensors and other outputs do: Dynamo sees to it."""
    model = decoder()
    with lychee_compile.prepare(model, **EVERYTHING):
        got, dense, recorder = beside_dense(way, None, model, {})
    assert torch.equal(got, dense)
    assert_everything_read(recorder, STEPS)


@pytest.mark.parametrize("way", [lookup, pytest.param(drafted, marks=pytest.mark.thorough)])
def test_drafts_that_are_taken_back(way: Way) -> None:
    model = decoder()
    with lychee_compile.prepare(model, **EVERYTHING):
        got, dense, recorder = beside_dense(way, None, model, {})
    assert torch.equal(got, dense)
    assert_everything_read(recorder, 2)


@pytest.mark.thorough
def test_both_models_of_assisted_decoding_may_be_prepared() -> None:
    """The assistant's cache is kept from draft to draft, and takes back what was refused."""
    model, assistant = decoder(), decoder()
    assistant.lm_head.weight.add_(0.15 * torch.randn_like(assistant.lm_head.weight))
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    dense = generate(model, None, tokens(1, PROMPT, 7))
    with lychee_compile.prepare(model, **EVERYTHING), lychee_compile.prepare(assistant, budget=127):
        got = generate(model, None, tokens(1, PROMPT, 7), assistant_model=assistant)
    assert torch.equal(got, dense)


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.thorough)])
def test_other_caches(cache: str) -> None:
    model = decoder()
    with lychee_compile.prepare(model, cache=cache, **EVERYTHING):
        for way in QUICK if cache == "dynamic" else (greedy,):
            got, dense, recorder = beside_dense(way, None, model, {})
            assert torch.equal(got, dense), way.__name__
            # The first step over a dynamic cache is compiled for one length, within the budget.
            assert_everything_read(recorder, STEPS - 1)


@pytest.mark.thorough
@pytest.mark.parametrize("cache", ["growing", "static", "dynamic"])
@pytest.mark.parametrize(
    "way", [*QUICK, inferring, scored, lookup, drafted, chunked], ids=lambda way: way.__name__
)
def test_prompts_in_chunks(cache: str, way: Way) -> None:
    model = decoder()
    with lychee_compile.prepare(model, cache=cache, prefill_chunk=20, **EVERYTHING):
        got, dense, recorder = beside_dense(way, None, model, {})
    assert torch.equal(got, dense)
    assert_everything_read(recorder, 2)


def test_below_the_length_steps_are_sparse_in_every_mode() -> None:
    """48 of 60 to 73 keys hold nearly all of the softmax here, and give the dense tokens."""
    model = decoder()
    lychee_compile.prepare(model, **SPARSE)
    got, dense, recorder = beside_dense(greedy, None, model, {})
    assert torch.equal(got, dense)
    assert len(recorder.calls) == LAYERS * STEPS
    assert {call.kv_len for call in recorder.calls} == set(range(PROMPT + 1, PROMPT + NEW))
    assert all(bool((call.tokens_read == 48).all()) for call in recorder.calls)
    (report,) = lychee_compile.reports()
    assert [site.decision for site in report.sites] == ["sparse"] * LAYERS
    for way in (sampled, configured, streamed, padded, turns):
        with lychee_compile.record() as recorder:
            way(model, None, {})
        assert max(call.kv_len for call in recorder.calls) > 48, way.__name__
        assert max(int(call.tokens_read.max()) for call in recorder.calls) == 48, way.__name__
    with lychee_compile.record() as recorder:
        beams(model, None, {})  # their prompt is held once, and read whole for all of them
    assert max(call.kv_len for call in recorder.calls) < PROMPT


def test_two_prepared_models_know_nothing_of_each_other() -> None:
    """Each has its weights, its options and its graphs."""
    one, other = decoder(0), decoder(1)
    lychee_compile.prepare(one, **EVERYTHING)
    lychee_compile.prepare(other, **SPARSE)
    for model, seed, most in ((one, 0, PROMPT + STEPS), (other, 1, 48), (one, 0, PROMPT + STEPS)):
        with lychee_compile.record() as recorder:
            got = greedy(model, None, {})
        assert max(int(call.tokens_read.max()) for call in recorder.calls) == most
        if most > 48:
            assert torch.equal(got, greedy(decoder(seed), None, {}))


@pytest.mark.parametrize(
    ("cache", "own", "use"),
    [
        ("growing", False, "step"),
        ("static", False, "step"),
        ("dynamic", False, "rest"),
        ("static", True, "rest"),
    ],
)
def test_cuda_graphs_are_for_caches_written_in_place(cache: str, own: bool, use: str) -> None:
    """The next replay of a graph would overwrite what a step leaves in a `DynamicCache`."""
    model, called = decoder(), []
    lychee_compile.prepare(model, cache=cache, **EVERYTHING)
    compiled = model.generate.lychee_hook._compiled

    def noting(use: str) -> Callable[..., Any]:
        return lambda model, forward, **given: called.append(use) or forward(model, **given)

    compiled.step, compiled.rest = noting("step"), noting("rest")
    given = {CACHE: transformers.DynamicCache(config=model.config)} if own else {}
    generate(model, None, tokens(1, PROMPT), max_new_tokens=3, **given)
    assert called == [use] * 2
