"""Growing caches that are given and returned in another shape than they are attended in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")

B, H, D, L, STEPS = 2, 2, 16, 40, 3
SMALL = {"budget": 24, "sinks": 2, "recent": 16}
EVERYTHING = {**SMALL, "budget": 60}
FOLDED, TOKENS_FIRST, HEADS_FIRST = (B, -1, H * D), (B, -1, H, D), (B, H, -1, D)
MEMORY = torch.randn(1, H, 4, D)


def attend(query: Tensor, keys: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, keys)


def heads(x: Tensor) -> Tensor:
    return x.view(TOKENS_FIRST).transpose(1, 2)


def together(keys: Tensor) -> Tensor:
    return keys.transpose(1, 2).reshape(FOLDED)


def joined_folded(q: Tensor, c: Tensor, x: Tensor) -> Any:
    c = torch.cat((c, x), 1)
    return attend(q, heads(c)), c


def joined_unfolded(q: Tensor, c: Tensor, x: Tensor) -> Any:
    keys = torch.cat((heads(c), heads(x)), 2)
    return attend(q, keys), together(keys)


def behind_memory(q: Tensor, c: Tensor, x: Tensor) -> Any:
    keys = torch.cat((heads(c), heads(x)), 2)
    return attend(q, torch.cat((MEMORY.expand(B, -1, -1, -1), keys), 2)), together(keys)


def folded_behind_memory(q: Tensor, c: Tensor, x: Tensor) -> Any:
    c = torch.cat((c, x), 1)
    return attend(q, torch.cat((MEMORY.expand(B, -1, -1, -1), heads(c)), 2)), c


def tokens_first(q: Tensor, c: Tensor, x: Tensor) -> Any:
    keys = torch.cat((c.transpose(1, 2), x.transpose(1, 2)), 2)
    return attend(q, keys), keys.transpose(1, 2).contiguous()


def folded_to_join(q: Tensor, c: Tensor, x: Tensor) -> Any:
    c = torch.cat((c.reshape(FOLDED), x.reshape(FOLDED)), 1)
    return attend(q, heads(c)), c.view(TOKENS_FIRST)


def rows_and_heads_together(q: Tensor, c: Tensor, x: Tensor) -> Any:
    keys = torch.cat((c.flatten(0, 1), x.flatten(0, 1)), 1)
    weights = (q.flatten(0, 1) @ keys.mT * 0.25).softmax(-1)
    return (weights @ keys).view(q.shape), keys.view(HEADS_FIRST)


FOUND = [
    (joined_folded, FOLDED),
    (joined_unfolded, FOLDED),
    (behind_memory, FOLDED),
    (folded_behind_memory, FOLDED),
    (tokens_first, TOKENS_FIRST),
    (folded_to_join, TOKENS_FIRST),
    (rows_and_heads_together, HEADS_FIRST),
]


def given(shape: tuple[int, ...], tokens: int) -> Tensor:
    return torch.randn([tokens if size < 0 else size for size in shape])


@pytest.mark.parametrize(("step", "shape"), FOUND)
def test_it_is_found_and_followed(step: Callable[..., Any], shape: tuple[int, ...]) -> None:
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    cache = given(shape, L)
    for _ in range(STEPS):
        query, new = torch.randn(B, H, 1, D), given(shape, 1)
        expected, left = step(query, cache, new)
        got, cache = compiled(query, cache, new)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
        assert torch.equal(cache, left)
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.cache) == ("sparse", "dynamic")


def returned_unfolded(q: Tensor, c: Tensor, x: Tensor) -> Any:
    c = torch.cat((c, x), 1)
    return attend(q, heads(c)), c.view(TOKENS_FIRST)


def returned_heads_first(q: Tensor, c: Tensor, x: Tensor) -> Any:
    keys = torch.cat((c.transpose(1, 2), x.transpose(1, 2)), 2)
    return attend(q, keys), keys


def returned_tokens_first(q: Tensor, c: Tensor, x: Tensor) -> Any:
    keys = torch.cat((c, x), 2)
    return attend(q, keys), keys.transpose(1, 2)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (returned_unfolded, FOLDED),
        (returned_heads_first, TOKENS_FIRST),
        (returned_tokens_first, HEADS_FIRST),
    ],
)
def test_another_shape_than_the_one_it_was_given_in_is_said(step: Any, shape: Any) -> None:
    """The next call cannot be known to go on with the same cache. It is no sliding window."""
    inputs = torch.randn(B, H, 1, D), given(shape, L), given(shape, 1)
    (site,) = lychee_compile.explain(step, *inputs, options=SMALL).sites
    assert (site.decision, site.cache, site.reason.code) == ("kept", "none", "cache-reshaped")
