"""Reasons of keys whose cache has no index say what is seen of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile

B, H, G, D, L = 2, 2, 2, 16, 120
SMALL = {"budget": 24, "sinks": 2, "recent": 16}
POS = torch.tensor([70])


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


GROUPS = B * H * L * D // 64


def groups(dtype: torch.dtype) -> Tensor:
    """Return keys in rows of 64 numbers, whatever tokens they belong to."""
    return (torch.rand(GROUPS, 64) * 100).to(dtype)


def query() -> Tensor:
    return torch.randn(B, H * G, 1, D)


def cache(*more: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*more, B, H, L, D).to(dtype)


def new() -> Tensor:
    return torch.randn(B, H, 1, D)


def site(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    with torch.no_grad():
        report = lychee_compile.explain(function, *inputs, options={**SMALL, **options})
    (only,) = report.sites
    return only


def rotated(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, turn: Tensor) -> Tensor:
    c.index_copy_(2, pos, x)
    half = torch.cat((-c[..., D // 2 :], c[..., : D // 2]), -1)
    return attend(q, c * turn.cos() + half * turn.sin(), c)


def normalised(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    c.index_copy_(2, pos, x)
    return attend(q, F.layer_norm(c, (D,)), c)


def grown_and_scaled(q: Tensor, c: Tensor, x: Tensor, scale: Tensor) -> Any:
    c = torch.cat((c, x), 2)
    return attend(q, c * scale, c), c


def expanded(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, up: Tensor) -> Tensor:
    c.index_copy_(2, pos, x)
    return attend(q, c @ up, c)


def joined(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, other: Tensor) -> Tensor:
    c.index_copy_(2, pos, x)
    other.index_copy_(2, pos, x)
    return attend(torch.cat((q, q), -1), torch.cat((c, other), -1), c)


def memory_behind(q: Tensor, c: Tensor, x: Tensor, memory: Tensor) -> Any:
    c = torch.cat((c, x), 2)
    keys = torch.cat((c, memory.expand(B, -1, -1, -1)), 2)
    return attend(q, keys, keys), c


def as_bytes(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    c.view(torch.uint8).index_copy_(2, pos, x.to(c.dtype).view(torch.uint8))
    return attend(q, c.float(), c.float())


def as_integers(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, scale: Tensor) -> Tensor:
    c.index_copy_(2, pos, x.to(torch.int8))
    scale.index_copy_(2, pos, x[..., :1])
    return attend(q, c.float() * scale, c.float())


def groups_of_integers(q: Tensor, c: Tensor, x: Tensor, scale: Tensor, zero: Tensor) -> Any:
    """Each row of 64 numbers has a scale; the newest keys are kept as they are."""
    old = ((c.float() - zero) * scale).view(B, H, -1, D)
    keys = torch.cat((old, x), 2)
    return attend(q, keys, keys)


def groups_and_newest(q: Tensor, c: Tensor, newest: Tensor, x: Tensor, scale: Tensor) -> Any:
    old = (c.to(torch.float32) * scale).view(B, H, -1, D)
    keys = torch.cat((old, newest, x), 2)
    return attend(q, keys, keys), torch.cat((newest, x), 2)


def halves_of_bytes(q: Tensor, c: Tensor, x: Tensor, scale: Tensor) -> Any:
    """Two numbers of 4 bits lie in each byte."""
    old = torch.stack(((c & 15).float(), (c >> 4).float()), -1).view(-1, 64)
    keys = torch.cat(((old * scale).view(B, H, -1, D), x), 2)
    return attend(q, keys, keys)


def old_and_newest(q: Tensor, old: Tensor, newest: Tensor, x: Tensor) -> Any:
    """Only the newest keys grow; the old ones are a prompt that several requests share."""
    keys = torch.cat((old, newest, x), 2)
    return attend(q, keys, keys), torch.cat((newest, x), 2)


def paged(q: Tensor, c: Tensor, table: Tensor) -> Tensor:
    c[0, :, 3] = 1
    keys = c[table].view(1, H, L, D).expand(B, -1, -1, -1)
    return attend(q, keys, keys)


def index_selected(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, order: Tensor) -> Tensor:
    c.index_copy_(2, pos, x)
    keys = c.index_select(2, order)
    return attend(q, keys, keys)


def stacked(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    c[1, 0].index_copy_(2, pos, x)
    c[1, 1].index_copy_(2, pos, x)
    return attend(q, c[1, 0], c[1, 1])


def stacked_and_moved(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    """Layers are read and written as a whole too."""
    c[1, 0].index_copy_(2, pos, x)
    c[0].mul_(0.5)
    return attend(q, c[1, 0], c[0, 1])


def stacked_across(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    """Parts overlap: layer 1, and the values of all layers."""
    c[1, 0].index_copy_(2, pos, x)
    c[:, 1].mul_(0.5)
    return attend(q, c[1, 0], c[1, 1])


def turned_by_a_state(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, state: Tensor) -> Tensor:
    """The factor of keys changes at each call."""
    c.index_copy_(2, pos, x)
    state.add_(0.01)
    return attend(q, c * state, c)


def overflowing(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, zero: Tensor) -> Tensor:
    """The difference of two numbers of 8 bits has 8 bits."""
    c.index_copy_(2, pos, x.to(torch.int8))
    return attend(q, (c - zero).float(), c.float())


def growing_in_front(q: Tensor, c: Tensor, x: Tensor, past: Tensor) -> Any:
    """Keys behind the cache move on when it grows."""
    past = torch.cat((past, x), 2)
    keys = torch.cat((past, c), 2)
    return attend(q, keys * 2, keys), past


def unbound_layers(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    keys, values = c.unbind(0)
    keys[:, :, 3:4] = x
    values[:, :, 3:4] = x
    return attend(q, keys, values, torch.arange(L)[None] <= pos)


def rows_apart(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    c[torch.arange(B)[:, None], :, pos] = x.transpose(1, 2)
    return attend(q, c, c)


def rows_apart_by_scatter(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    c.scatter_(2, pos[:, None, :, None].expand(B, H, 1, D), x)
    return attend(q, c, c)


def rows_apart_by_where(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Any:
    c = torch.where((torch.arange(L) == pos)[:, None, :, None], x, c)
    return attend(q, c, c), c


def heads_apart(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    rows, heads = torch.arange(B)[:, None], torch.arange(H)
    c[rows, heads, pos] = x[:, :, 0]
    return attend(q, c, c)


def replaced(q: Tensor, c: Tensor, x: Tensor) -> Tensor:
    c.copy_(c * 0.5 + x)
    return attend(q, c, c)


def dropped(q: Tensor, c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
    c = c.index_copy(2, pos, x)
    return attend(q, c, c)


def given_back_changed(q: Tensor, c: Tensor, x: Tensor, pos: Tensor, scale: Tensor) -> Any:
    c.index_copy_(2, pos, x)
    keys = c * scale
    return attend(q, keys, c), keys


ROWS = torch.tensor([[70], [71]])
HEADS = torch.tensor([[70, 71], [72, 73]])
CASES = [
    (normalised, (cache(), new(), POS), "cache-computed", "by layer_norm"),
    (expanded, (cache(), new(), POS, torch.randn(D, D)), "cache-computed", "by matmul"),
    (memory_behind, (cache(), new(), torch.randn(1, H, 4, D)), "cache-joined", "by cat"),
    (
        groups_of_integers,
        (groups(torch.uint8), new(), torch.rand(GROUPS, 1), torch.rand(GROUPS, 1)),
        "cache-converted",
        "uint8",
    ),
    (
        groups_and_newest,
        (groups(torch.int8), new(), new(), torch.rand(GROUPS, 1)),
        "cache-converted",
        "int8",
    ),
    (
        groups_and_newest,
        (groups(torch.float8_e4m3fn), new(), new(), torch.rand(GROUPS, 1)),
        "cache-converted",
        "float8_e4m3fn",
    ),
    (
        halves_of_bytes,
        (groups(torch.uint8)[: GROUPS // 2], new(), torch.rand(GROUPS, 1)),
        "cache-converted",
        "uint8",
    ),
    (old_and_newest, (cache(), new(), new()), "cache-joined", "by cat"),
    (old_and_newest, (cache(), torch.zeros(0), new()), "cache-joined", "by cat"),
    (paged, (torch.randn(10, H, 12, D), torch.randperm(10)), "cache-paged", "by index"),
    (index_selected, (cache(), new(), POS, torch.randperm(L)), "cache-paged", "by index_select"),
    (stacked_and_moved, (cache(2, 2), new(), POS), "cache-stacked", "larger tensor"),
    (stacked_across, (cache(2, 2), new(), POS), "cache-stacked", "larger tensor"),
    (heads_apart, (cache(), new(), HEADS), "cache-rows-apart", "no rows of the batch"),
    (turned_by_a_state, (cache(), new(), POS, torch.randn(D)), "cache-computed", "by mul"),
    (
        overflowing,
        (cache(dtype=torch.int8), new(), POS, cache(dtype=torch.int8)),
        "cache-converted",
        "int8",
    ),
    (growing_in_front, (cache(), new(), cache()), "cache-joined", "by cat"),
    (replaced, (cache(), new()), "cache-replaced", "as a whole"),
    (dropped, (cache(), new(), POS), "cache-not-returned", "neither returned"),
]


READ_AS_STORED = [
    (rotated, (cache(), new(), POS, torch.randn(L, D))),
    (grown_and_scaled, (cache(), new(), torch.randn(D))),
    (joined, (cache(), new(), POS, cache())),
    (as_bytes, (cache(dtype=torch.float8_e4m3fn), new(), POS)),
    (as_integers, (cache(dtype=torch.int8), new(), POS, torch.rand(B, H, L, 1))),
    (stacked, (cache(2, 2), new(), POS)),
    (unbound_layers, (cache(2), new(), POS)),
    (rows_apart, (cache(), new(), ROWS)),
    (rows_apart_by_scatter, (cache(), new(), ROWS)),
    (rows_apart_by_where, (cache(), new(), ROWS)),
    (given_back_changed, (cache(), new(), POS, torch.randn(D))),
]


@pytest.mark.parametrize(("function", "inputs"), READ_AS_STORED)
def test_keys_that_are_an_expression_of_what_is_stored(function: Any, inputs: Any) -> None:
    found = site(function, query(), *inputs)
    assert (found.decision, found.reason) == ("sparse", None)


@pytest.mark.parametrize(("function", "inputs", "code", "words"), CASES)
def test_what_is_seen_of_the_keys(function: Any, inputs: Any, code: str, words: str) -> None:
    found = site(function, query(), *inputs)
    assert (found.decision, found.cache, found.reason.code) == ("kept", "none", code)
    assert words in found.reason.words


class Encoder(torch.nn.Module):
    """Attention over keys that are computed from the input, with keys of its own in front."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.project = kind, torch.nn.Linear(32, 3 * H * D)
        self.memory = torch.nn.Parameter(torch.randn(H, 40, D))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        shape = batch, tokens, 3, H, D
        q, k, v = self.project(x).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "memory":
            k, v = (torch.cat((self.memory.expand(batch, -1, -1, -1), t), 2) for t in (k, v))
        if self.kind == "repeated memory":
            front = self.memory.view(1, H, 40, D).repeat(batch, 1, 1, 1)
            k, v = (torch.cat((front, t), 2) for t in (k, v))
        if self.kind == "class token":
            k = torch.cat((k[:, :, :1], k[:, :, 1:] * 1.5), 2)
        if self.kind == "without the first":
            k, v = k[:, :, 1:], v[:, :, 1:]
        return (q[:, :, -1:] @ k.mT * 0.25).softmax(-1) @ v


class Bytes(torch.nn.Module):
    """Attention of one query over keys that are made of an input or a parameter of bytes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.project = kind, torch.nn.Linear(D, H * D)
        made = torch.randint(255, (B, H, 60, D), dtype=torch.uint8)
        self.learnt = torch.nn.Parameter(made, requires_grad=False)

    def forward(self, q: Tensor, image: Tensor) -> Tensor:
        if self.kind == "image":
            keys = self.project(image.float() / 255).unflatten(-1, (H, D)).transpose(1, 2)
        elif self.kind == "learnt":
            keys = self.learnt.float() * 0.1
        else:
            keys = torch.where(image[:, None].expand(B, H, -1, -1), 1.0, q.mean())
        return attend(q, keys, keys)


@pytest.mark.parametrize("kind", ["image", "learnt", "mask"])
def test_other_bytes_are_no_cache(kind: str) -> None:
    image = torch.randint(255, (B, 60, D), dtype=torch.uint8)
    found = site(Bytes(kind), query(), image > 99 if kind == "mask" else image)
    assert (found.cache, found.reason.code) == ("none", "no-cache")


@pytest.mark.parametrize("kind", ["memory", "repeated memory", "class token", "without the first"])
def test_keys_of_an_encoder_are_no_cache(kind: str) -> None:
    found = site(Encoder(kind), torch.randn(B, 60, 32))
    assert (found.cache, found.reason.code) == ("none", "no-cache")


@pytest.mark.parametrize("kind", ["plain", "memory", "class token", "without the first"])
def test_few_keys_without_a_cache_are_not_within_a_budget(kind: str) -> None:
    """The reason stays one of design: a strict compilation does not fail for it."""
    found = site(Encoder(kind), torch.randn(B, 60, 32), budget=500)
    assert (found.reason.code, found.by_design) == ("no-cache", True)


def test_few_keys_of_a_cache_are_within_the_budget() -> None:
    found = site(normalised, query(), cache(), new(), POS, budget=500)
    assert found.reason.code == "within-budget"
