"""Keys and values that each step projects from cached latents: attention runs over the latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

BATCH, HEADS, CHANNELS, NOPE, ROPE, WIDE, SLOTS = 2, 3, 16, 8, 4, 6, 96
SMALL = {"budget": 24, "sinks": 2, "recent": 8, "chunk": (2, 4)}
ALL = {**SMALL, "budget": SLOTS - 1}
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def joined(keys: Tensor, rotary: Tensor) -> Tensor:
    return torch.cat([keys, rotary[:, None].expand(-1, HEADS, -1, -1)], -1)


def visible(pos: Tensor) -> Tensor:
    return torch.arange(SLOTS) <= pos[:, None]


def einsum(q: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, up: Tensor, _: Tensor) -> Tensor:
    """Values are the keys without their rotary part."""
    keys = joined(torch.einsum("btc,hcd->bhtd", lat, up[..., :NOPE]), rot)
    return F.scaled_dot_product_attention(q, keys, keys[..., :NOPE], attn_mask=visible(pos))


def matmul(q: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, up: Tensor, _: Tensor) -> Tensor:
    """Products and softmax are written out, and the rotary part comes first."""
    keys = torch.cat([rot[:, None].expand(-1, HEADS, -1, -1), lat[:, None] @ up[..., :NOPE]], -1)
    values = lat[:, None] @ up[..., NOPE:]
    q = torch.cat([q[..., NOPE:], q[..., :NOPE]], -1)
    scores = (q @ keys.transpose(-1, -2)) * (NOPE + ROPE) ** -0.5
    return scores.masked_fill(~visible(pos), float("-inf")).softmax(-1) @ values


def linear(q: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    """One projection gives keys and values of all heads, side by side in each head."""
    both = F.linear(lat, weight).view(BATCH, SLOTS, HEADS, NOPE + WIDE).transpose(1, 2)
    keys, values = both.split([NOPE, WIDE], -1)
    mask = visible(pos)
    return F.scaled_dot_product_attention(q, joined(keys, rot), values, attn_mask=mask)


def scaled(q: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, up: Tensor, _: Tensor) -> Tensor:
    """Keys have no rotary part and a factor, and heads come in two groups that share them."""
    keys = 0.5 * torch.einsum("btc,hcd->bthd", lat, up[..., :NOPE]).transpose(1, 2)
    keys, values = (
        each[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for each in (keys, keys)
    )
    q = torch.cat([q[..., :NOPE], q[..., -NOPE:]], 1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible(pos))


def shared(q: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, up: Tensor, _: Tensor) -> Tensor:
    """Values are the keys, rotary part included: they stay as they are computed."""
    keys = joined(torch.einsum("btc,hcd->bhtd", lat, up[..., :NOPE]), rot)
    return F.scaled_dot_product_attention(q, keys, keys, attn_mask=visible(pos))


def normed(q: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, up: Tensor, _: Tensor) -> Tensor:
    """A projection of latents that are normalised when they are read."""
    return einsum(q, pos, F.layer_norm(lat, (CHANNELS,)), rot, up, _)


class Twins:
    """Caches that the backend decodes over, and copies of them that PyTorch decodes over."""

    def __init__(self, attend: Step, options: dict[str, Any]) -> None:
        self.attend = attend
        held = torch.randn(BATCH, SLOTS, CHANNELS), torch.randn(BATCH, SLOTS, ROPE)
        self.held, self.copy = held, [each.clone() for each in held]
        self.weights = (
            torch.randn(HEADS, CHANNELS, NOPE + WIDE) / 4,
            torch.randn(HEADS * (NOPE + WIDE), CHANNELS) / 4,
        )
        self.compiled = torch.compile(self._step, backend="lychee", options=options)

    def _step(self, q: Tensor, pos: Tensor, new: list[Tensor], held: list[Tensor]) -> Tensor:
        for cache, tokens in zip(held, new, strict=True):
            cache.index_copy_(1, pos, tokens)
        return self.attend(q, pos, *held, *self.weights)

    def step(self, first: int, queries: int = 1) -> tuple[Tensor, Tensor]:
        """Return what both give, after they have written the same."""
        q = 2 * torch.randn(BATCH, HEADS, queries, NOPE + ROPE)
        new = [torch.randn(BATCH, queries, size) for size in (CHANNELS, ROPE)]
        pos = torch.arange(first, first + queries)
        return self.compiled(q, pos, new, self.held), self._step(q, pos, new, self.copy)


def decisions() -> list[tuple[str, str | None]]:
    return [
        (site.decision, site.reason and site.reason.code)
        for report in lychee_compile.reports()
        for site in report.sites
    ]


@pytest.mark.parametrize("attend", [einsum, matmul, linear, scaled, shared])
def test_attention_over_latents_is_that_over_their_projections(attend: Step) -> None:
    twins = Twins(attend, ALL)
    for position in range(60, 63):
        torch.testing.assert_close(*twins.step(position), atol=1e-5, rtol=1e-4)
    assert decisions() == [("sparse", None)]


def test_a_small_budget_reads_some_of_the_latents() -> None:
    twins = Twins(linear, SMALL)
    with lychee_compile.record() as recorded:
        got, want = twins.step(80)
    (call,) = recorded.calls
    assert int(call.tokens_read.max()) <= SMALL["budget"]
    assert not torch.allclose(got, want)


def test_the_projection_of_a_prefill_stays() -> None:
    twins = Twins(linear, SMALL)
    torch.testing.assert_close(*twins.step(0, queries=64))
    ((decision, reason),) = decisions()
    assert (decision, reason) == ("kept", "prefill")


def test_a_norm_between_latents_and_projection_is_named() -> None:
    twins = Twins(normed, SMALL)
    torch.testing.assert_close(*twins.step(60))
    (site,) = lychee_compile.reports()[-1].sites
    assert site.reason is not None
    assert site.reason.code == "cache-computed"
    assert "layer_norm" in site.reason.words


@pytest.mark.parametrize("dynamic", [True, None])
def test_latents_may_grow_and_be_split_into_parts(dynamic: bool | None) -> None:
    up = torch.randn(HEADS * (NOPE + WIDE), CHANNELS) / 4

    def step(q: Tensor, new: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        held = torch.cat([held, new], 1)
        latents, rotary = held.split([CHANNELS, ROPE], -1)
        both = F.linear(latents, up).unflatten(-1, (HEADS, NOPE + WIDE)).transpose(1, 2)
        keys, values = both.split([NOPE, WIDE], -1)
        return F.scaled_dot_product_attention(q, joined(keys, rotary), values), held

    options = {**ALL, "budget": SLOTS + 3}
    compiled = torch.compile(step, backend="lychee", options=options, dynamic=dynamic)
    held = want_held = torch.randn(BATCH, SLOTS, CHANNELS + ROPE)
    for _ in range(3):
        given = torch.randn(BATCH, HEADS, 1, NOPE + ROPE), torch.randn(BATCH, 1, CHANNELS + ROPE)
        got, held = compiled(*given, held)
        want, want_held = step(*given, want_held)
        torch.testing.assert_close((got, held), (want, want_held), atol=1e-5, rtol=1e-4)
    assert decisions()[-1] == ("sparse", None)
