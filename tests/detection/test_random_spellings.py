"""Attention in spellings composed at random: found, rewritten, and equal to what was written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from spellings_random import HEADS, Given, Recipe, Sizes, attend, plainly, recipes
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile

STEPS = 3

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def constants(sizes: Sizes) -> Given:
    """Return the tensors that a recipe may need besides operands and positions."""
    slot, row = torch.arange(sizes.kv_len), torch.arange(sizes.batch)[:, None]
    return {
        "padding": (~((slot > 0) & (slot <= 2 * row + 1))).long(),
        "documents": (slot + 3 * row) // 10,
        "slopes": 2.0 ** -torch.arange(1.0, sizes.query_heads + 1),
        "temperature": 0.5 + torch.rand(sizes.query_heads),
        "table": torch.randn(8, sizes.query_heads),
        "sinks": torch.randn(sizes.query_heads),
    }


def step(recipe: Recipe, packed: Tensor, key: Tensor, value: Tensor, given: Given) -> Tensor:
    """Take query, key and value of the new tokens apart, write the cache, attend."""
    sizes = recipe.sizes
    query, *fresh = packed.split(sizes.packing, dim=-1)
    query = query.unflatten(-1, (sizes.query_heads, -1))
    fresh = [x.unflatten(-1, (sizes.kv_heads, -1)) for x in fresh]
    axis = 1
    if recipe.layout == "b h t d":
        axis, query, fresh = 2, query.transpose(1, 2), [x.transpose(1, 2) for x in fresh]
    key.index_copy_(axis, given["positions"], fresh[0])
    value.index_copy_(axis, given["positions"], fresh[1])
    return attend(recipe, query, key, value, given)


def caches(recipe: Recipe) -> list[Tensor]:
    """Return keys and values of another sequence, all over the cache."""
    sizes = recipe.sizes
    made = [
        torch.randn(sizes.batch, sizes.kv_heads, sizes.kv_len, width).to(recipe.dtype)
        for width in (sizes.head_dim, sizes.value_head_dim)
    ]
    return made if recipe.layout == "b h t d" else [x.transpose(1, 2).contiguous() for x in made]


def assert_as_right_as_eager(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Check that the error is about that of eager attention, against float64 in low precision."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, eager, atol=2e-5, rtol=2e-5)
        return
    band = torch.finfo(got.dtype).eps * exact.abs().max()
    error, allowed = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= 2 * allowed + band


def start_afresh() -> None:
    """Seed the random numbers, and forget what was compiled before.

    Earlier cases would make sizes symbolic and run into Dynamo's limit of recompilations.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def share(part: float) -> settings:
    """Fewer cases than of other properties: each compiles, or there is one test for each choice."""
    cases = max(int(part * settings().max_examples), 1)
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    phases = [phase for phase in Phase if phase is not Phase.explain]  # it traces the compiler
    return settings(max_examples=cases, phases=phases, suppress_health_check=checks)


each_form = pytest.mark.parametrize("heads", HEADS)


@each_form
@share(1 / 4)
@given(data=st.data())
def test_a_random_spelling_is_attention(heads: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    recipe = data.draw(recipes(heads))
    sizes = recipe.sizes
    positions = torch.arange(sizes.query_len) + sizes.kv_len // 2
    held = {"positions": positions, **constants(sizes)}
    query = torch.randn(sizes.batch, sizes.query_heads, sizes.query_len, sizes.head_dim).double()
    key, value = (x.double() for x in caches(recipe))
    if recipe.layout == "b t h d":
        query = query.transpose(1, 2)
    expected = attend(plainly(recipe), query, key, value, held)
    torch.testing.assert_close(
        attend(recipe, query, key, value, held), expected, atol=1e-6, rtol=1e-6
    )


@each_form
@share(1 / 20)
@given(data=st.data())
def test_a_random_spelling_decodes_sparsely(heads: str, data: st.DataObject) -> None:
    start_afresh()
    recipe = data.draw(recipes(heads))
    sizes, held = recipe.sizes, constants(recipe.sizes)
    key, value = caches(recipe)
    key_eager, value_eager = key.clone(), value.clone()
    options = {"budget": sizes.kv_len - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}
    compiled = torch.compile(step, backend="lychee", options=options)
    for turn in range(STEPS):
        start = sizes.kv_len // 2 + turn * sizes.query_len
        now = {"positions": torch.arange(start, start + sizes.query_len), **held}
        packed = torch.randn(sizes.batch, sizes.query_len, sum(sizes.packing)).to(recipe.dtype)
        got = compiled(recipe, packed, key, value, now)
        eager = step(recipe, packed, key_eager, value_eager, now)
        doubles = (x.double() for x in (packed, key_eager, value_eager))
        assert_as_right_as_eager(got, eager, step(recipe, *doubles, now))
    assert not counters["graph_break"]
    (report,) = lychee_compile.reports()
    (site,) = report.sites
    assert site.form == "eager"
    assert (site.query_heads, site.kv_heads) == (sizes.query_heads, sizes.kv_heads)
    assert (site.head_dim, site.value_head_dim) == (sizes.head_dim, sizes.value_head_dim)
    assert (site.query_len, site.kv_len) == (sizes.query_len, sizes.kv_len)
    assert (site.decision, site.cache) == ("sparse", "static"), site.reason
