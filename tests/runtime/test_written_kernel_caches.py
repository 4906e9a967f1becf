"""Kernels over caches that a step gives back as new tensors, or joins with the new token."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import Cache, assert_exact, assert_sparse, compiled, upkeep_of
from torch import Tensor

from lychee_compile.runtime.cache_registry import registry

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


def attend(query: Tensor, keys: Tensor, values: Tensor, positions: Any) -> Tensor:
    mask = (torch.arange(keys.shape[2])[None] <= positions)[None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def copied(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, key: Tensor, value: Tensor
) -> Any:
    keys, values = keys.index_copy(2, positions, key), values.index_copy(2, positions, value)
    return attend(query, keys, values, positions), keys, values


def blended(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, key: Tensor, value: Tensor
) -> Any:
    here = (torch.arange(keys.shape[2]) == positions)[:, None]
    keys, values = torch.where(here, key, keys), torch.where(here, value, values)
    return attend(query, keys, values, positions), keys, values


def of_int(
    query: Tensor, keys: Tensor, values: Tensor, position: int, key: Tensor, value: Tensor
) -> Tensor:
    keys.narrow(2, position, 1).copy_(key)
    values.narrow(2, position, 1).copy_(value)
    return attend(query, keys, values, position)


def put_together(
    query: Tensor, keys: Tensor, values: Tensor, position: int, key: Tensor, value: Tensor
) -> Tensor:
    all_keys = torch.cat((keys[:, :, :position], key), 2)
    all_values = torch.cat((values[:, :, :position], value), 2)
    keys[:, :, position : position + 1] = key
    values[:, :, position : position + 1] = value
    return attend(query, all_keys, all_values, position)


@pytest.mark.parametrize("step", [copied, pytest.param(blended, marks=pytest.mark.thorough)])
def test_the_index_goes_with_the_tensor_that_is_given_back(step: Any) -> None:
    cache, function = Cache().fill(100), compiled(step)

    def given_back(query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        out, cache.keys, cache.values = function(query, keys, values, *rest)
        return out

    assert_exact(cache.step(given_back))
    older = cache.keys
    index = upkeep_of(older)
    assert_sparse(cache.step(given_back), cache)
    assert upkeep_of(older) is None
    assert upkeep_of(cache.keys) is index
    assert_sparse(cache.step(given_back), cache)
    # A second continuation of the older tensor begins with an index of its own.
    cache.keys, cache.values, cache.length = older.clone(), cache.values.clone(), 101
    branch = cache.keys
    assert_exact(cache.step(given_back))
    assert_sparse(cache.step(given_back), cache)
    del branch, older
    gc.collect()  # tests collect seldom by themselves
    assert len(registry) == 1


@pytest.mark.parametrize("step", [pytest.param(of_int, marks=pytest.mark.thorough), put_together])
def test_steps_with_a_position_that_the_host_knows(step: Any) -> None:
    cache, function = Cache().fill(100), compiled(step)

    def known(query: Tensor, keys: Tensor, values: Tensor, at: Tensor, *rest: Tensor) -> Any:
        return function(query, keys, values, int(at), *rest)

    for _ in range(4):  # for the second position Dynamo compiles once more, for any
        cache.step(known)
    assert_sparse(cache.step(known), cache)
