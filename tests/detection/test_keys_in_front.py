"""Keys in front of a cache are read besides; other joins keep an attention as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import memory_keys
import pytest
import torch
from memory_keys import DV, Growing, H, caches, new, one_operator
from torch import Tensor

import lychee_compile

SMALL = {"budget": 24, "sinks": 2, "recent": 8, "chunk": (2, 4)}
LENGTH = 120


def site(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    with torch.no_grad():
        report = lychee_compile.explain(function, *inputs, options={**SMALL, **options})
    (only,) = report.sites
    return only


def growing(function: Callable[..., Any], length: int = LENGTH, count: int = 1, **more: Any) -> Any:
    query, *fresh = new(count)
    return site(function, query, *caches(length), *fresh, **more)


@pytest.mark.parametrize("model", memory_keys.GROWING)
def test_a_growing_cache_behind_memory_keys_is_found(model: Any) -> None:
    found = growing(model())
    assert (found.decision, found.cache, found.kv_len) == ("sparse", "dynamic", LENGTH + 5)
    assert found.reads == "budget 24 of up to 121 tokens, and 4 in front of the cache"


@pytest.mark.parametrize("model", memory_keys.STATIC)
def test_a_static_cache_behind_memory_keys_is_found(model: Any) -> None:
    query, *fresh = new()
    found = site(model(), query, *caches(LENGTH), torch.tensor([70]), *fresh)
    assert (found.decision, found.cache) == ("sparse", "static")


class OneKey(Growing):
    def __init__(self) -> None:
        super().__init__(1)


class OfAnInput(Growing):
    """A soft prompt: its keys are inputs of the step."""

    def forward(
        self, q: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor, *front: Tensor
    ) -> Any:
        ck, cv = torch.cat((ck, k), 2), torch.cat((cv, v), 2)
        keys, values = torch.cat((front[0], ck), 2), torch.cat((front[1], cv), 2)
        return one_operator(q, keys, values), ck, cv


def test_one_key_in_front() -> None:
    assert growing(OneKey()).reads.endswith(", and 1 in front of the cache")


def test_keys_in_front_that_are_inputs() -> None:
    query, *fresh = new()
    assert site(OfAnInput(), query, *caches(LENGTH), *fresh, *caches(7)).decision == "sparse"


def test_a_prefill_that_fills_the_cache_is_exact_by_design() -> None:
    found = growing(Growing(), 0, 60)
    assert (found.cache, found.reason.code, found.by_design) == ("dynamic", "prefill", True)


def test_a_short_cache_is_within_the_budget() -> None:
    assert growing(Growing(), 20).reason.code == "within-budget"


@pytest.mark.parametrize("shape", [(0,), (2, H, 0, 16)])
def test_an_empty_tensor_is_no_key_in_front(shape: tuple[int, ...]) -> None:
    """A new cache begins so: it is found as a whole."""

    def step(q: Tensor, k: Tensor) -> Any:
        keys = torch.cat((torch.zeros(shape), k), 2)
        return one_operator(q, keys, keys), keys

    found = site(step, new()[0], caches(LENGTH)[0])
    assert (found.decision, found.cache) == ("sparse", "dynamic")
    assert found.reads == "budget 24 of up to 120 tokens"


class Behind(Growing):
    def before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        front, wide = (each.expand(len(keys), -1, -1, -1) for each in (self.keys, self.values))
        return torch.cat((keys, front), 2), torch.cat((values, wide), 2)


class OnBothSides(Growing):
    def before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        front, wide = (each.expand(len(keys), -1, -1, -1) for each in (self.keys, self.values))
        return torch.cat((front, keys, front), 2), torch.cat((wide, values, wide), 2)


class KeysOnly(Growing):
    """Values are a cache that holds all tokens, keys are joined."""

    def forward(self, q: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor) -> Any:
        ck, cv = torch.cat((ck, k), 2), torch.cat((cv, v), 2)
        return one_operator(q, self.before(ck, cv)[0], torch.cat((cv, cv[:, :, :4]), 2)), ck, cv


class Computed(Growing):
    """The keys behind the memory are made of the cache."""

    def before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return super().before(keys * self.scale, values)


class NotReturned(Growing):
    def forward(self, *given: Tensor) -> Any:
        return super().forward(*given)[0]


@pytest.mark.parametrize("model", [Behind, OnBothSides])
def test_other_joins_keep_their_reason(model: Any) -> None:
    found = growing(model())
    assert (found.decision, found.cache, found.reason.code) == ("kept", "none", "cache-joined")


@pytest.mark.parametrize("model", [KeysOnly, Computed])
def test_joins_that_are_computed_as_they_are_read_are_dense_with_budget_for_all(model: Any) -> None:
    made, held = model(), caches(LENGTH)
    assert growing(made).decision == "sparse"
    step = torch.compile(made, backend="lychee", options={**SMALL, "budget": 400})
    with torch.no_grad():
        for _ in range(3):
            query, *fresh = new()
            expected = made(query, *held, *fresh)
            got, *held = step(query, *held, *fresh)
            torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-5)


def test_more_keys_in_front_than_the_budget_are_chosen_from_like_others() -> None:
    query, *fresh = new()
    found = site(OfAnInput(), query, *caches(LENGTH), *fresh, *caches(25))
    assert (found.decision, found.reads) == ("sparse", "budget 24 of up to 146 tokens")


def test_without_a_cache_there_is_none() -> None:
    found = growing(NotReturned())
    assert (found.decision, found.cache) == ("kept", "none")


def overwritten(q: Tensor, ck: Tensor, cv: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are joined before the cache is written."""
    front = torch.ones(2, H, 4, 16), torch.ones(2, H, 4, DV)
    keys, values = torch.cat((front[0], ck), 2), torch.cat((front[1], cv), 2)
    ck.index_copy_(2, pos, k)
    cv.index_copy_(2, pos, v)
    return one_operator(q, keys, values)


def test_a_cache_that_is_written_after_the_join_stays() -> None:
    query, *fresh = new()
    found = site(overwritten, query, *caches(LENGTH), torch.tensor([70]), *fresh)
    assert found.decision == "kept"


def test_a_symbolic_number_of_queries_is_dense_with_budget_for_all() -> None:
    made = Growing()
    step = torch.compile(made, backend="lychee", options={**SMALL, "budget": 400})
    for count in (3, 5, 40):
        query, key, value = new(count)
        for each in (query, key, value):
            torch._dynamo.mark_dynamic(each, 2)
        held = caches(LENGTH)
        with torch.no_grad():
            expected = made(query, *held, key, value)
            got = step(query, *held, key, value)
        torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    assert lychee_compile.reports()[0].sites[0].decision == "sparse"
