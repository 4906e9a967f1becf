"""`LycheeCache.share_prefix`: rows hold their first tokens once; logits of a dynamic cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cache_names import CACHE
from generating import decoder, generate, tokens
from small_decoders import model_of, transformers
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import LycheeCache

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")

SHARED = 300
CERTAIN = {"budget": 40, "epsilon": 1e-6, "sinks": 2, "recent": 16, "chunk": (4, 8)}
"""Options of steps that read as many keys as it takes to leave nothing out."""


class Beside:
    """A cache whose rows share a prefix, and a dynamic one that holds the same tokens."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.cache = model, LycheeCache(model.config, **options)
        self.dense = transformers.DynamicCache(config=model.config)
        self.step = torch.compile(model.forward, backend="lychee", options=CERTAIN)
        self.seed = 0

    def some_ids(self, rows: int, count: int) -> Tensor:
        self.seed += 1
        return tokens(rows, count, self.seed)

    def prompt(self, count: int, rows: int) -> None:
        """Read a prompt into one row, and share it among some."""
        ids = self.some_ids(1, count)
        self.model(ids, **{CACHE: self.cache})
        self.cache.share_prefix(count)
        self.cache.batch_repeat_interleave(rows)
        self.dense = transformers.DynamicCache(config=self.model.config)
        self.model(ids.expand(rows, -1), **{CACHE: self.dense})

    def forward(self, rows: int, count: int, close: float = 1e-4) -> None:
        """Compare an uncompiled forward over tokens of each row's own."""
        ids = self.some_ids(rows, count)
        got, expected = (
            self.model(ids, **{CACHE: each}).logits for each in (self.cache, self.dense)
        )
        torch.testing.assert_close(got, expected, atol=close, rtol=close)

    def steps(self, rows: int, count: int = 2) -> None:
        """Compare compiled steps."""
        self.cache.reserve(count)
        for _ in range(count):
            ids = self.some_ids(rows, 1)
            got = self.step(ids, **{CACHE: self.cache}).logits
            expected = self.model(ids, **{CACHE: self.dense}).logits
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.dense.crop(-count)

    def both(self, name: str, *given: Any) -> None:
        for each in (self.cache, self.dense):
            getattr(each, name)(*given)


def test_steps_of_rows_that_share_a_prefix_follow_reordered_and_cropped_rows() -> None:
    beside = Beside(decoder())
    beside.prompt(SHARED, rows=3)
    beside.steps(3)
    beside.both("reorder_cache", torch.tensor([2, 0, 0]))
    beside.crop(1)
    beside.steps(3)
    assert beside.cache.layers[0].prefix_keys.shape[:3] == (1, 2, SHARED)
    assert counters["lychee"]["sparse"] > 0
    assert counters["lychee"]["kept"] == 0


@pytest.mark.thorough
def test_steps_after_a_crop_into_the_prefix_and_over_another_one() -> None:
    """They are compiled for any length of a prefix."""
    beside = Beside(decoder())
    beside.prompt(SHARED, rows=3)
    beside.forward(3, 5)
    beside.steps(3)
    beside.crop(beside.cache.get_seq_length() - SHARED + 20)
    assert beside.cache.get_seq_length() == SHARED - 20
    beside.steps(3)
    twin = copy.deepcopy(beside.cache)
    for rows in (3, 2):
        beside.cache.reset()
        assert beside.cache.get_seq_length() == 0
        beside.prompt(SHARED - 20, rows)
        beside.steps(rows)
        assert not torch.equal(twin.layers[0].prefix_keys, beside.cache.layers[0].prefix_keys)
    assert counters["lychee"]["kept"] == 0


def test_rows_grow_and_follow_one_another_without_compilation() -> None:
    beside = Beside(model_of("gemma3"))
    beside.prompt(100, rows=2)  # layers with a window share nothing
    for count in (3, 1, 1, 40):
        beside.forward(2, count)
    beside = Beside(model_of("llama"))
    beside.prompt(100, rows=3)
    beside.forward(3, 7)
    beside.both("batch_select_indices", torch.tensor([0, 2]))
    beside.forward(2, 1)
    beside.both("batch_repeat_interleave", 2)
    beside.forward(4, 1)
    beside.crop(9)
    beside.dense.batch_select_indices(torch.tensor([0, 1]))
    beside.forward(2, 4)
    beside.cache.reset()
    beside.prompt(50, rows=2)
    beside.forward(2, 3)


def of_few_bits(dtype: str) -> Beside:
    beside = Beside(model_of("llama"), dtype=dtype)
    beside.prompt(SHARED, rows=3)
    beside.forward(3, 4, close=2e-2)
    assert beside.cache.layers[0].prefix_keys.dtype.itemsize == 1
    return beside


def test_a_prefix_of_few_bits_is_held_once() -> None:
    beside = of_few_bits("int8")
    assert beside.cache.layers[0].prefix_keys.shape[0] == 1
    beside.cache.crop(-20)
    beside.dense.crop(-20)
    beside.forward(3, 4, close=2e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_each_row_has_an_index_of_a_prefix_of_few_bits(dtype: str) -> None:
    beside = of_few_bits(dtype)
    beside.cache.reserve(1)
    ids = beside.some_ids(3, 1)
    got = beside.step(ids, **{CACHE: beside.cache}).logits
    expected = beside.model(ids, **{CACHE: beside.dense}).logits
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    site = lychee_compile.reports()[-1].sites[0]
    assert site.decision == "sparse"
    assert "share" not in site.reads


def test_the_prefix_is_held_once() -> None:
    model = model_of("llama")
    cache, ids = LycheeCache(model.config, capacity=4096), tokens(1, 2000)
    model.config.max_position_embeddings = 4096
    model(ids, **{CACHE: cache})
    token = cache.layers[0].keys[:, :, :1].nbytes
    cache.share_prefix(1990, capacity=512)
    cache.batch_repeat_interleave(16)
    layer = cache.layers[0]
    held = {each.untyped_storage().data_ptr(): each for each in vars(layer).values()
            if isinstance(each, Tensor)}  # fmt: skip
    total = sum(each.untyped_storage().nbytes() for each in held.values())
    assert total == 2 * token * (1990 + 16 * 512) + layer.cumulative_length.nbytes
    assert (cache.get_seq_length(), cache.capacity) == (2000, 512)


def test_what_cannot_be_shared_is_an_error() -> None:
    model = model_of("llama")
    cache = LycheeCache(model.config)
    with pytest.raises(ValueError, match="holds 0"):
        cache.share_prefix(3)
    model(tokens(2, 8), **{CACHE: cache})
    with pytest.raises(ValueError, match="one row, not of 2"):
        cache.share_prefix(3)
    cache.batch_select_indices(torch.tensor([0]))
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match="holds 8"):
            cache.share_prefix(wrong)
    cache.share_prefix(3)
    cache.share_prefix(5)
    cache.share_prefix(2)
    assert (cache.layers[0].prefix, cache.get_seq_length()) == (2, 8)
    cache.share_prefix(0)
    assert cache.layers[0].keys.shape[2] == cache.capacity


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 3},
        pytest.param({"num_return_sequences": 3, "do_sample": True}, marks=pytest.mark.thorough),
    ],
)
def test_samples_and_beams_of_a_prepared_model_share_their_prompt(given: Any) -> None:
    """Three rows with a budget of 100 read all of 288 tokens, once."""
    model, ids = decoder(), tokens(1, SHARED)
    dense = generate(model, None, ids, **given)
    with lychee_compile.prepare(model, **{**CERTAIN, "budget": 100, "epsilon": None}):
        got = generate(model, None, ids, return_dict_in_generate=True, **given)
    assert torch.equal(got.sequences, dense)
    cache = getattr(got, "cache", None) or got.past_key_values
    assert cache.layers[0].prefix_keys.shape[:3] == (1, 2, 288)
    assert lychee_compile.reports()[-1].sites[0].decision == "sparse"
