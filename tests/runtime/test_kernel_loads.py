"""Generated kernels over caches that hold something else than the keys that attention reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import SIZE, SMALL, Cache, assert_exact, assert_sparse
from stored_caches import FORMS, Sizes, scaled
from torch import Tensor

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

LENGTH = 100


class Steps:
    """Steps of decoding over keys in one of `FORMS`, with values that tell what was read."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.form, self.sizes = FORMS[name], Sizes(slots=SIZE, dtype=dtype)
        self.cache = Cache(batch=2, dtype=dtype)
        self.held = self.form.store(self.sizes)
        self.values = torch.eye(SIZE, dtype=dtype).expand(2, 2, SIZE, SIZE)
        options = {**SMALL, **options}
        self.run = torch.compile(self.attend, backend="lychee", options=options)
        self.position = LENGTH - 1

    def attend(self, query: Tensor, key: Tensor, values: Tensor, pos: Tensor, *held: Tensor) -> Any:
        keys, _ = self.form.step(key, key, pos, *held)
        mask = torch.arange(SIZE) <= pos[:, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

    def fill(self) -> Steps:
        """Write keys as an eager prefill does."""
        for slot in range(LENGTH - 1):
            key = self.cache.fresh(1)
            self.form.step(key, key, torch.tensor([slot]), *self.held)
        return self

    def step(self) -> tuple[Tensor, Tensor]:
        given = self.sizes.query(), self.cache.fresh(1), self.values, torch.tensor([self.position])
        self.position += 1
        dense = self.attend(*given, *[each.clone() for each in self.held])
        return self.run(*given, *self.held), dense

    def assert_sparse(self, count: int) -> None:
        for _ in range(count):
            assert_sparse(self.step(), self.cache)


def assert_decided(decision: str) -> None:
    assert [each.decision for each in lychee_compile.reports()[-1].sites] == [decision]


@pytest.mark.parametrize(
    "name", ["rotated bytes", pytest.param("latents", marks=pytest.mark.thorough)]
)
def test_the_best_of_computed_keys_are_read(name: str) -> None:
    steps = Steps(name).fill()
    assert_exact(steps.step())
    steps.assert_sparse(3)
    assert_decided("sparse")


def spoil_scales(held: list[Tensor]) -> None:
    held[1][1, :, 20:30] *= 3


def give_pages_to_another_row(held: list[Tensor]) -> None:
    held[4][0, 2:4] = held[4][1, 2:4].clone()


def write_the_cache(held: list[Tensor]) -> None:
    held[0][1, :, 20:30] -= 3


@pytest.mark.parametrize(
    ("name", "spoil", "spoilt"),
    [
        ("scale per token", spoil_scales, 1),
        ("scale per token", write_the_cache, 1),
        ("pages of rows", give_pages_to_another_row, 0),
    ],
)
def test_a_row_is_read_whole_once_one_of_its_keys_has_changed(
    name: str, spoil: Callable[[list[Tensor]], None], spoilt: int
) -> None:
    """The other row keeps its index."""
    steps = Steps(name).fill()
    assert_exact(steps.step())
    steps.assert_sparse(9)
    spoil(steps.held)
    step, whole = steps.step(), [spoilt]
    assert_exact((step[0][whole], step[1][whole]))
    assert_sparse(tuple(each[[1 - spoilt]] for each in step), steps.cache)
    steps.assert_sparse(3)  # the host has learnt of it, and has indexed the row anew


def test_a_table_may_list_new_pages() -> None:
    """Pages behind the known tokens, as they are given to a row that grows, change no key."""
    steps = Steps("pages of rows").fill()
    assert_exact(steps.step())
    for _ in range(3):
        steps.held[4][:, -1] = steps.held[4][:, -1].flip(0)
        steps.assert_sparse(1)


@pytest.mark.parametrize(
    "policy",
    ["quest", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("fasa", "dhsa"))],
)
def test_levels_summarise_computed_keys(policy: str) -> None:
    steps = Steps("rotated bytes", policy=policy, budget=SIZE - 1).fill()
    for _ in range(3):
        assert_exact(steps.step())
    assert_decided("sparse")


def test_a_growing_cache_of_bytes() -> None:
    def grow(query: Tensor, key: Tensor, *held: Tensor) -> Any:
        number, unit = scaled(key)
        numbers, units = torch.cat((held[0], number), 2), torch.cat((held[1], unit), 2)
        keys = numbers.to(query.dtype) * units
        values = torch.cat((held[2], torch.eye(SIZE)[keys.shape[2] - 1].expand(2, 2, 1, SIZE)), 2)
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return out, numbers, units, values

    cache, run = Cache(batch=2), torch.compile(grow, backend="lychee", options=SMALL)
    number, unit = scaled(cache.fresh(LENGTH))
    held = [number, unit, torch.eye(SIZE)[:LENGTH].expand(2, 2, LENGTH, SIZE)]
    for count in range(4):
        given = torch.randn(2, 4, 1, 16), cache.fresh(1)
        dense = grow(*given, *held)[0]
        got, *held = run(*given, *held)
        if count > 1:
            assert_sparse((got, dense), cache)
    assert_decided("sparse")


def test_what_no_kernel_computes_is_read_exactly() -> None:
    """The graph computes keys from scales of 64 bits."""

    def attend(query: Tensor, key: Tensor, pos: Tensor, stored: Tensor, scale: Tensor) -> Any:
        stored.index_copy_(2, pos, (key / scale).round().to(torch.int8))
        keys = (stored * scale).to(query.dtype)
        mask = torch.arange(SIZE) <= pos[:, None]
        return F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)

    run = torch.compile(attend, backend="lychee", options=SMALL)
    held = [torch.zeros(1, 2, SIZE, 16, dtype=torch.int8), torch.full((1, 2, 1, 16), 0.03).double()]
    given = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), torch.tensor([LENGTH])
    dense = attend(*given, *[each.clone() for each in held])
    assert_exact((run(*given, *held), dense))
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.reason.code) == ("exact", "keys-computed-no-kernel")
    assert "float64" in site.reason.words


def test_exact_kernels_compute_keys_and_values() -> None:
    form, sizes = FORMS["scale per token"], Sizes(slots=SIZE)
    held = form.store(sizes)
    run = torch.compile(form.attend, backend="lychee", options={"budget": None})
    given = sizes.query(), sizes.keys(1), sizes.keys(1), torch.tensor([LENGTH])
    dense = form.attend(*given, *[each.clone() for each in held])
    assert_exact((run(*given, *held), dense))
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.reason.code) == ("exact", "budget-none")
    assert "loads" in site.kernel
