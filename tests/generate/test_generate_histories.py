"""Caches under `generate()` with more than appending: chunks, turns, drafts that are taken back."""

from __future__ import annotations

import logging
import re

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
    beside_dense,
    chunked,
    conversation,
    decoder,
    drafted,
    entered,
    greedy,
    lookup,
    transformers,
)

from lychee_compile.kernels import index_log
from lychee_compile.kernels.operators import cache_index
from lychee_compile.kernels.policies.decode.lychee import LycheeIndex

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def test_a_prompt_in_chunks() -> None:
    """A prompt in chunks gives the dense tokens, though transformers compiles the chunks too."""
    model = decoder()
    given = entered("compile_config", model, EVERYTHING)
    got, dense, recorder = beside_dense(chunked, "static", model, given)
    assert torch.equal(got, dense)
    assert_everything_read(recorder, NEW - 1)


@pytest.mark.thorough
def test_turns_of_a_conversation_keep_their_prefix() -> None:
    """Also the prefills go through the backend, each of them dense."""
    model = decoder()
    given = entered("model.forward", model, EVERYTHING)
    got, dense, recorder = beside_dense(conversation, "dynamic", model, given)
    assert torch.equal(got, dense)
    assert_everything_read(recorder, 3 * (NEW // 2 - 1) - 1)


def test_a_prefix_that_was_kept_is_not_indexed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn adds what it brought: nothing before it was found changed."""
    kept, forget = [], cache_index.CacheIndex._forget

    def spied(index: cache_index.CacheIndex, keep: torch.Tensor) -> None:
        kept.append((index.known.clone(), keep))
        forget(index, keep)

    monkeypatch.setattr(cache_index.CacheIndex, "_forget", spied)
    model = decoder()
    conversation(model, "static", entered("compile_config", model, SPARSE))
    assert len(kept) > LAYERS * 3 * (NEW // 2 - 1)
    assert all(bool((keep >= known).all()) for known, keep in kept)


@pytest.mark.thorough
@pytest.mark.parametrize("way", [lookup, drafted])
def test_drafts_that_are_taken_back(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts from the prompt, or from another model, may be taken back."""
    taken_back, crop = [], transformers.DynamicCache.crop

    def spied(cache: object, count: int) -> None:
        taken_back.append(count)
        crop(cache, count)

    monkeypatch.setattr(transformers.DynamicCache, "crop", spied)
    model = decoder()
    entered("model.forward", model, EVERYTHING)
    got, dense, recorder = beside_dense(way, "dynamic", model, {})
    assert torch.equal(got, dense)
    assert min(taken_back) < 0
    assert_everything_read(recorder, 2)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ("compile_config", "static"),
        pytest.param("model.forward", "dynamic", marks=pytest.mark.thorough),
    ],
)
def test_a_prompt_is_indexed_in_one_pass_and_the_log_says_how_long_it_took(
    entry: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its keys are there before the backend sees the cache; the first sparse step finds them."""
    monkeypatch.setattr(index_log, "WORTH_LOGGING", PROMPT // 2)
    added, extend = [], LycheeIndex.extend

    def spied(index: LycheeIndex, key: torch.Tensor, end: torch.Tensor) -> None:
        added.append(int((end - index.end).max()))
        extend(index, key, end)

    monkeypatch.setattr(LycheeIndex, "extend", spied)
    model = decoder()
    given = entered(entry, model, SPARSE)
    with caplog.at_level(logging.INFO, "lychee_compile"):
        for _ in range(2):  # two prompts
            caplog.clear()
            added.clear()
            greedy(model, kind, given)
            found = [re.fullmatch(INDEXED, record.message) for record in caplog.records]
            counts = [int(each[1]) for each in found if each is not None]
            prompts = [count for count in added if count > 1]
            assert counts == prompts
            assert len(prompts) == LAYERS
            assert set(prompts) <= {PROMPT + 1, PROMPT + 2}
            assert set(added) - set(prompts) == {1}


INDEXED = r"indexed (\d+) tokens of 2 KV heads in \d+ ms"
