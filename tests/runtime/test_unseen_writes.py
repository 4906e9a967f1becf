"""Keys that somebody changes unseen by PyTorch are noticed by the next compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_interpreter
from kernel_steps import (
    CLOSE,
    DIM,
    GROUP,
    KV_HEADS,
    SIZE,
    SMALL,
    Cache,
    assert_exact,
    assert_sparse,
    compiled,
    grow,
)
from torch import Tensor

from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.options import Options
from lychee_compile.runtime.cache_registry import registry

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


def through_data(keys: Tensor) -> None:
    keys.data.copy_(keys.flip(0, 2))


def a_prefix_through_data(keys: Tensor) -> None:
    keys.data[:, :, :60] = torch.randn_like(keys[:, :, :60])


def of_the_storage(keys: Tensor) -> None:
    keys.untyped_storage().copy_((keys * -1).contiguous().untyped_storage())


def through_numpy(keys: Tensor) -> None:
    keys.detach().numpy()[..., :50, :] = 2


def in_place(keys: Tensor) -> None:
    """PyTorch counts this, unless the tensor was made in inference mode."""
    keys[:, :, 5:70] += 1


Change = Callable[[Tensor], None]
QUEST: dict[str, Any] = {"policy": "quest", "dense_layers": 0, "budget": 60}
KERNELS = [
    (through_data, torch.no_grad, {}, 2, 1, torch.bfloat16),
    (through_numpy, torch.inference_mode, {"flat_tokens": 0}, 1, 3, torch.float32),
    (in_place, torch.inference_mode, QUEST, 2, 1, torch.float32),
    pytest.param(
        a_prefix_through_data, torch.no_grad, QUEST, 1, 1, torch.float32, marks=pytest.mark.thorough
    ),
    pytest.param(
        of_the_storage, torch.inference_mode, {}, 1, 2, torch.float16, marks=pytest.mark.thorough
    ),
]


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(("change", "mode", "options", "batch", "count", "dtype"), KERNELS)
def test_kernels_read_all_keys_in_the_step_that_finds_changed_ones(
    change: Change, mode: Any, options: dict[str, Any], batch: int, count: int, dtype: torch.dtype
) -> None:
    budget = options.get("budget", SMALL["budget"])
    with mode():
        cache, step = Cache(batch, dtype).fill(90), compiled(**options)
        cache.step(step, count)
        assert_sparse(cache.step(step, count), cache, budget)
        change(cache.keys)
        if dtype == torch.float32:
            assert_exact(cache.step(step, count))
        else:
            torch.testing.assert_close(*cache.step(step, count), atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(
    "mode", [torch.no_grad, pytest.param(torch.inference_mode, marks=pytest.mark.thorough)]
)
def test_a_growing_cache_that_is_changed_is_read_in_full(mode: Any) -> None:
    step = compiled(grow)

    def exact(keys: Tensor, values: Tensor) -> tuple[bool, Tensor, Tensor]:
        query = 4 * torch.randn(1, KV_HEADS * GROUP, 1, DIM)
        new = torch.randn(2, 1, KV_HEADS, 1, DIM)
        dense = grow(query, keys, values, *new)[0]
        got, keys, values = step(query, keys, values, *new)
        return torch.allclose(got, dense, CLOSE["rtol"], CLOSE["atol"]), keys, values

    with mode():
        keys, values = torch.randn(2, 1, KV_HEADS, 90, DIM)
        found = []
        for number in range(5):
            if number == 4:
                through_data(keys)
            same, keys, values = exact(keys, values)
            found.append(same)
    assert found == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        (through_data, torch.no_grad),
        (a_prefix_through_data, torch.inference_mode),
        (of_the_storage, torch.inference_mode),
        (through_numpy, torch.no_grad),
        (in_place, torch.inference_mode),
    ],
)
def test_an_index_on_a_cpu_describes_changed_keys(change: Change, mode: Any) -> None:
    config = Options.parse(None, SMALL).index_config()
    with mode():
        cache, step = Cache(2).fill(90), compiled()
        for number in range(4):
            if number == 2:
                change(cache.keys)
            assert_sparse(cache.step(step), cache)
            index = registry.index_of(cache.keys, config)
            assert index is not None
            length = cache.length
            assert torch.equal(index.fingerprint[:, :length], fingerprints(cache.keys)[:, :length])
    assert length < SIZE
