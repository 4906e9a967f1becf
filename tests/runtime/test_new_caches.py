"""An index waits for a second call; keys that are new tensors at each call are read in full."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from kernel_steps import SMALL, compiled, grow
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.operators.cache_index import CacheIndex
from lychee_compile.runtime import new_caches

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

SHAPE = (2, 1, 1, 90, 8)


def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values)


def write(query: Tensor, keys: Tensor, values: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    keys.index_copy_(2, slot, new)
    values.index_copy_(2, slot, new)
    return F.scaled_dot_product_attention(query, keys, values)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that gets the number of keys of each cache that an index begins to be built of."""
    new_caches._warn.cache_clear()
    sizes: list[int] = []
    update = CacheIndex.update

    def count(self: CacheIndex, key: Tensor, *given: object, **named: object) -> None:
        if self.updates == 0:
            sizes.append(key.shape[2])
        update(self, key, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(CacheIndex, "update", count)
    return sizes


def sparse_calls(step, *inputs: Tensor) -> tuple[Tensor, int]:
    with lychee_compile.record() as recorder:
        output = step(*inputs)
    return output, len(recorder.calls)


def test_a_cache_that_is_only_read_is_sparse_from_the_second_call_on(built: list[int]) -> None:
    step, (keys, values) = compiled(read), torch.randn(SHAPE)
    query = torch.randn(1, 1, 1, 8)
    first, calls = sparse_calls(step, query, keys, values)
    torch.testing.assert_close(first, read(query, keys, values))
    assert (calls, built) == (0, [])
    assert [sparse_calls(step, query, keys, values)[1] for _ in range(3)] == [1, 1, 1]
    assert built == [90]
    other = torch.randn(SHAPE)  # caches have come again, so that this one is trusted to
    assert sparse_calls(step, query, *other)[1] == 1


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_new_keys_at_each_call_are_read_in_full_and_the_user_is_told(
    heads: int, masked: bool, built: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mask = torch.arange(keys.shape[2])[None] > 3 if masked else None
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

    step, expected = compiled(attend), torch.randn(SHAPE)
    with caplog.at_level(logging.WARNING, logger="lychee_compile"):
        for length in range(90, 98):
            expected = torch.cat((expected, torch.randn(2, 1, 1, 1, 8)), 3)
            keys, values = expected.clone().unbind()
            query = torch.randn(1, heads, 1, 8)
            output, calls = sparse_calls(step, query, keys, values)
            torch.testing.assert_close(output, attend(query, keys, values))
            assert calls == 0
            assert keys.shape[2] == length + 1
            del keys, values
    assert built == []
    assert caplog.text.count(new_caches.NEW_KEYS) == 1
    assert new_caches.NEW_KEYS in lychee_compile.reports()[-1].notes


def test_beams_that_are_reordered_at_each_step_are_soon_not_indexed(built: list[int]) -> None:
    step = compiled(grow)
    keys, values = torch.randn(2, 3, 1, 90, 8)
    for _ in range(6):
        query, key, value = torch.randn(3, 3, 1, 1, 8)
        expected = torch.cat((keys, key), 2)
        _, keys, values = step(query, keys, values, key, value)
        assert torch.equal(keys, expected)
        order = torch.randint(3, (3,))
        keys, values = keys.index_select(0, order), values.index_select(0, order)
    assert len(built) <= 4  # until it is known that they never come again
    _, keys, values = step(query, keys, values, key, value)
    _, calls = sparse_calls(lambda *given: step(*given)[0], query, keys, values, key, value)
    assert calls == 1  # it came again


def test_a_cache_that_the_graph_writes_is_sparse_at_once(built: list[int]) -> None:
    """Until three such caches in a row are dropped after one call."""
    step = compiled(write)

    def once() -> int:
        keys, values = torch.randn(SHAPE)
        query, new = torch.randn(2, 1, 1, 1, 8)
        return sparse_calls(step, query, keys, values, torch.tensor([89]), new)[1]

    assert [once() for _ in range(4)] == [1, 1, 1, 0]
    keys, values = torch.randn(SHAPE)
    query, new = torch.randn(2, 1, 1, 1, 8)
    steps = [
        sparse_calls(step, query, keys, values, torch.tensor([slot]), new)[1]
        for slot in (86, 87, 88)
    ]
    assert steps == [0, 1, 1]
    assert once() == 1


def test_two_caches_by_turns_are_both_indexed(built: list[int]) -> None:
    step, query = compiled(read), torch.randn(1, 1, 1, 8)
    first, second = torch.randn(2, *SHAPE)
    calls = [sparse_calls(step, query, *cache)[1] for cache in (first, second) * 3]
    assert calls == [0, 0, 1, 1, 1, 1]
    assert len(built) == 2
    assert SMALL["budget"] < SHAPE[3]
