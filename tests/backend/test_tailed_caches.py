"""Decoding over a quantised past with a tail in full precision: sparse, and never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_caches import Sizes
from tailed_caches import PASTS, ROOM, Growing, Sliced, Static, Tailed
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.operators.observe import SparseCall, observers

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

SMALL = {"budget": 24, "sinks": 2, "recent": 4, "chunk": (2, 4)}
BEGIN, SLOTS = 64, 96
CACHES: dict[str, Callable[..., Tailed]] = {
    "growing": Growing,
    "put together at once": partial(Growing, at_once=True),
    "static": Static,
    "sliced": Sliced,
}
FORMS = [
    ("growing", "groups of tokens", torch.float32),
    ("put together at once", "4 bits", torch.bfloat16),
    ("static", "groups of tokens", torch.bfloat16),
    pytest.param("sliced", "bytes", torch.float32, marks=pytest.mark.thorough),
    ("growing", "as it is", torch.float32),
]


@pytest.fixture
def calls() -> Iterator[list[SparseCall]]:
    """Return the sparse calls of a test, each with what it has read."""
    seen: list[SparseCall] = []
    observers.append(seen.append)
    yield seen
    observers.remove(seen.append)


class Steps:
    """Steps over a cache, compiled and not."""

    def __init__(self, cache: Tailed, budget: int = SLOTS + ROOM - 1) -> None:
        self.cache = cache
        options = {**SMALL, "budget": budget}
        self.run = torch.compile(cache.attend, backend="lychee", options=options)

    def step(self, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, cache = self.cache.sizes, self.cache
        new = s.query() if query is None else query, s.keys(1), s.keys(1)
        other = copy.deepcopy(cache)
        want = other.attend(*new, *other.given())
        held = cache.given()
        if isinstance(cache, Growing):
            for each in held:
                torch._dynamo.maybe_mark_dynamic(each, 2)
        return cache.take(self.run(*new, *held)), other.take(want)


def close(pair: tuple[Tensor, Tensor]) -> None:
    rough = pair[0].dtype != torch.float32
    torch.testing.assert_close(*pair, atol=3e-2 if rough else 1e-5, rtol=3e-2 if rough else 1e-4)


@pytest.mark.parametrize(("kind", "past", "dtype"), FORMS)
def test_all_keys_are_read_as_dense_attention_reads_them(
    kind: str, past: str, dtype: torch.dtype, calls: list[SparseCall]
) -> None:
    """The tail moves to the past twice on the way."""
    values = "as it is" if past == "as it is" else "bytes"
    steps = Steps(CACHES[kind](past, values, Sizes(slots=SLOTS, dtype=dtype), BEGIN))
    for _ in range(18):
        close(steps.step())
    assert len(calls) >= 14 if kind == "sliced" else len(calls) == 18  # within the budget at first
    assert lychee_compile.reports()[-1].sites[0].decision == "sparse"


def _plant_in_past(cache: Tailed, key: Tensor, place: int) -> None:
    """Write a key to the past, in place, as nobody compiled sees it."""
    for held, part in zip(cache.past, cache.ways[0].store(key), strict=False):
        held[:, :, place : place + 1] = part


@pytest.mark.parametrize(
    ("kind", "moved"), [("growing", True), ("static", True), ("sliced", False)]
)
def test_a_key_that_changes_in_the_past_is_found(
    kind: str, moved: bool, calls: list[SparseCall]
) -> None:
    """One key that outweighs all others: an index of the old keys would not choose it.

    If the tail has `moved`, the place held a key of the tail before.
    """
    s = Sizes(group=1, slots=SLOTS)
    steps = Steps(CACHES[kind]("bytes", "bytes", s, BEGIN), 24)
    for _ in range(9 if moved else 4):
        steps.step()
    query = s.query()
    _plant_in_past(steps.cache, 6 * query, BEGIN + 1 if moved else 30)
    got, want = steps.step(query)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    read = [int(call.selection.token_mask().sum(-1).max()) for call in calls]
    assert len(read) == (10 if moved else 5)
    assert max(read) <= 24


def test_a_past_that_is_longer_with_the_same_memory_is_not_taken_for_the_old_one(
    calls: list[SparseCall],
) -> None:
    """The number of tokens of the past is all that changes: no storage and no version tells."""
    s = Sizes(group=1, slots=SLOTS)
    buffers = [s.keys() for _ in range(2)]
    cache = Growing("as it is", "as it is", s, BEGIN)
    cache.past = [each[:, :, :BEGIN] for each in buffers]
    steps = Steps(cache, 24)
    for _ in range(4):
        steps.step()
    query = s.query()
    buffers[0].data[:, :, BEGIN + 1 : BEGIN + 2] = 6 * query
    cache.past = [each[:, :, : BEGIN + 2] for each in buffers]
    cache.tail = [each[:, :, 2:] for each in cache.tail]
    got, want = steps.step(query)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    assert len(calls) == 5


@settings(max_examples=max(2, settings.default.max_examples // 9))
@given(
    st.sampled_from(["growing", "put together at once", "static"]),
    st.sampled_from(list(PASTS)),
    st.sampled_from(["bytes", "as it is"]),
    st.sampled_from([(1, 1, 3, 8), (2, 2, 1, 16), (3, 1, 2, 24)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(2, 12),
)
def test_shapes_forms_and_histories(
    kind: str, keys: str, values: str, shape: tuple[int, ...], dtype: torch.dtype, count: int
) -> None:
    torch._dynamo.reset()
    batch, heads, group, head_dim = shape
    s = Sizes(batch, heads, group, SLOTS, head_dim, dtype)
    steps = Steps(CACHES[kind](keys, values, s, BEGIN))
    for _ in range(count):
        close(steps.step())


def flushing(
    query: Tensor, hidden: Tensor, weight: Tensor, past: Tensor, scale: Tensor, tail: Tensor
) -> Any:
    """Attend, and move all keys to the past, as transformers does when a tail is full."""
    key = hidden @ weight
    keys = torch.cat((past.float() * scale, tail, key), 2)
    fresh = keys.abs().amax(-1, keepdim=True) / 127
    attended = torch.nn.functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
    return attended, (keys / fresh).round().to(torch.int8), fresh


def test_a_call_that_moves_the_tail_is_kept_with_the_reason() -> None:
    s = Sizes()
    cache = Growing("bytes", "bytes", s, BEGIN)
    run = torch.compile(flushing, backend="lychee", options=SMALL)
    run(s.query(), s.keys(1), torch.eye(s.head_dim), *cache.past[:2], cache.tail[0])
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "kept"
    assert site.reason.code == "cache-tail-moves"


def test_a_choice_by_a_length_in_a_tensor_is_no_cache_with_a_tail() -> None:
    """The length moves at each step, so that all keys would be compared at each step."""

    def attend(query: Tensor, key: Tensor, used: Tensor, cache: Tensor) -> Tensor:
        held = cache.index_copy_(2, used, key)
        seen = (torch.arange(held.shape[2]) <= used)[:, None]
        keys = torch.where(seen, held, 0.0)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, held, enable_gqa=True)

    s = Sizes()
    given = s.query(), s.keys(1), torch.tensor([BEGIN]), s.keys()
    (site,) = lychee_compile.explain(attend, *given, options=SMALL).sites
    assert site.decision == "kept"
    assert site.reason.code == "cache-computed"
