"""Copies of compiled models: each has weights and caches of its own."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cache_names import CACHE
from generating import EVERYTHING, PROMPT, decoder, empty, entered, greedy, tokens
from torch._dynamo.utils import counters

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def saved_and_loaded(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        pytest.param(pickled, marks=pytest.mark.thorough),
        pytest.param(saved_and_loaded, marks=pytest.mark.thorough),
    ],
)
def test_a_copy_of_a_compiled_model_has_weights_and_caches_of_its_own(again: Any) -> None:
    model = decoder()
    compiled = torch.compile(model, backend="lychee", options=EVERYTHING)
    cache, ids = empty(model, "static"), tokens(1, PROMPT)
    model(ids, **{CACHE: cache})
    compiled(ids[:, -1:], **{CACHE: cache})
    copied, other = again(compiled), decoder(seed=1)
    copied.load_state_dict({f"_orig_mod.{k}": v for k, v in other.state_dict().items()})
    sparse = counters["lychee"]["sparse"]
    for step, plain in ((compiled, model), (copied, other)):
        caches = [empty(plain, "static") for _ in range(2)]
        for each in caches:
            plain(ids, **{CACHE: each})
        for token in range(1, 4):
            fresh = torch.full((1, 1), token)
            got = step(fresh, **{CACHE: caches[0]}).logits
            expected = plain(fresh, **{CACHE: caches[1]}).logits
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert counters["lychee"]["sparse"] > sparse


@pytest.mark.parametrize(
    "again", [copy.deepcopy, pytest.param(pickled, marks=pytest.mark.thorough)]
)
def test_a_copy_of_a_model_compiled_in_place_is_not_compiled(again: Any) -> None:
    """A copy of a model compiled by `nn.Module.compile` is eager, and can be compiled anew."""
    model = decoder()
    entered("model.compile", model, EVERYTHING)
    expected, copied = greedy(model, "static", {}), again(model)
    sparse = counters["lychee"]["sparse"]
    assert torch.equal(greedy(copied, "static", {}), expected)
    assert counters["lychee"]["sparse"] == sparse > 0
