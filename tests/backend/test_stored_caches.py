"""Decoding over caches that hold keys and values in other forms than attention reads them in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from stored_caches import FORMS, Form, Sizes, angles, scaled
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.operators.observe import SparseCall, observers

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

SMALL = {"budget": 24, "sinks": 2, "recent": 8, "chunk": (2, 4)}
ALL = {**SMALL, "budget": 95}
BEGIN = 60
SHAPES = (
    Sizes(),
    Sizes(batch=1, heads=3, group=1, head_dim=8),
    Sizes(heads=1, group=3, dtype=torch.bfloat16),
)
SEVERAL = (
    "layers in one tensor",
    "scale per token",
    "scale of all",
    "float8",
    "pairs rotated",
    "latents",
    "pages",
)


@pytest.fixture
def calls() -> Iterator[list[SparseCall]]:
    """Return the sparse calls of a test, each with what it has read."""
    seen: list[SparseCall] = []
    observers.append(seen.append)
    yield seen
    observers.remove(seen.append)


class Twins:
    """A cache that the backend decodes over, and a copy of it that PyTorch decodes over."""

    def __init__(self, form: Form, sizes: Sizes, options: dict[str, Any]) -> None:
        self.form, self.sizes = form, sizes
        self.held = form.store(sizes)
        self.copy = [each.clone() for each in self.held]
        self.compiled = torch.compile(form.attend, backend="lychee", options=options)

    def step(self, position: int, query: Tensor | None = None, key: Tensor | None = None) -> Any:
        """Return what both give, after they have written the same."""
        s = self.sizes
        new = (s.query() if query is None else query, s.keys(1) if key is None else key, s.keys(1))
        pos = torch.tensor([position])
        got = self.compiled(*new, pos, *self.held)
        want = self.form.attend(*new, pos, *self.copy)
        for ours, theirs in zip(self.held, self.copy, strict=True):
            assert torch.equal(ours.float(), theirs.float())
        return got, want

    def write(self, position: int, key: Tensor) -> None:
        """Write a key outside of compiled code."""
        value = self.sizes.keys(1)
        for held in (self.held, self.copy):
            self.form.step(key, value, torch.tensor([position]), *held)


def close(pair: tuple[Tensor, Tensor]) -> None:
    rough = pair[0].dtype != torch.float32
    tolerance = {"atol": 3e-2, "rtol": 3e-2} if rough else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(*pair, **tolerance)


@pytest.mark.parametrize("name", [each for each in FORMS if each != "tail"])
def test_all_keys_are_read_as_dense_attention_reads_them(
    name: str, calls: list[SparseCall]
) -> None:
    """Steps, a rewind, a write from outside, and tables that change.

    The past before a tail is so short here that it counts as keys in front of the cache.
    """
    form, place = FORMS[name], list(FORMS).index(name)
    sizes = replace(SHAPES[place % 3], batch=1) if name == "pages" else SHAPES[place % 3]
    twins = Twins(form, sizes, ALL)
    for position in (BEGIN, BEGIN + 1, BEGIN + 2, BEGIN + 1, BEGIN + 2):
        close(twins.step(position))
    twins.write(20, twins.sizes.keys(1))
    close(twins.step(BEGIN + 3))
    if form.tables:
        for held in (twins.held, twins.copy):
            held[-1].mul_(0.5)
        close(twins.step(BEGIN + 4))
    assert len(calls) == 6 + bool(form.tables)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_key_that_is_written_outside_is_found(name: str, calls: list[SparseCall]) -> None:
    """One key that outweighs all others: an index of the old keys would not choose it."""
    form = FORMS[name]
    twins = Twins(form, Sizes(group=1, batch=1 if name == "pages" else 2), SMALL)
    for position in range(BEGIN, BEGIN + 3):
        twins.step(position)
    read = [int(call.selection.token_mask().sum(-1).max()) for call in calls]
    assert len(read) == 3
    assert max(read) <= 24
    query = twins.sizes.query()
    twins.write(30, planted(name, twins.sizes, query))
    got, want = twins.step(BEGIN + 3, query)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)


def planted(name: str, sizes: Sizes, query: Tensor) -> Tensor:
    """Return a key that outweighs all others for `query` once it is read.

    Where keys are turned when they are read, the transpose of that turns the query back.
    """
    if "rotated" not in name and name != "latents":
        return 6 * query
    form = FORMS["rotated" if name == "rotated bytes" else name]
    with torch.enable_grad():
        key = torch.zeros_like(query, requires_grad=True)
        keys, _ = form.step(key, query, torch.tensor([30]), *form.store(sizes))
        (keys[:, :, 30:31] * query).sum().backward()
    assert key.grad is not None
    return 6 * key.grad


def test_a_table_that_is_new_at_each_call_is_given_up_on(calls: list[SparseCall]) -> None:
    twins = Twins(FORMS["rotated"], Sizes(), ALL)
    for position in range(BEGIN, BEGIN + 8):
        twins.held[-1] = twins.held[-1].clone()
        close(twins.step(position))
    assert 3 <= len(calls) < 8
    (report,) = lychee_compile.reports()
    assert any("beside the cache" in note for note in report.notes)


def test_values_alone_may_be_stored_in_another_form(calls: list[SparseCall]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, *held: Tensor) -> Tensor:
        ck, cv, scale = held
        keys = ck.index_copy_(2, pos, k)
        values = cv.index_copy_(2, pos, (v / scale).round().to(torch.int8)).float() * scale
        mask = torch.arange(ck.shape[2]) <= pos[:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=True
        )

    s = Sizes()
    held = [s.keys(), s.keys().mul(20).to(torch.int8), torch.full((s.heads, 1, 1), 0.05)]
    copy = [each.clone() for each in held]
    compiled = torch.compile(attend, backend="lychee", options=ALL)
    for position in range(BEGIN, BEGIN + 3):
        new = s.query(), s.keys(1), s.keys(1), torch.tensor([position])
        close((compiled(*new, *held), attend(*new, *copy)))
    assert len(calls) == 3
    assert type(calls[0].operands.value).__name__ == "LoadedTensor"


def test_pages_that_change_places_and_rows_that_share_pages(calls: list[SparseCall]) -> None:
    """A page goes to another row, and a write to a shared page changes the keys of two rows."""
    sizes = Sizes(group=1)
    twins = Twins(FORMS["pages of rows"], sizes, SMALL)
    for position in range(BEGIN, BEGIN + 3):
        twins.step(position)
    for held in (twins.held, twins.copy):
        held[-1][0, 2], held[-1][1, 3] = held[-1][1, 3].clone(), held[-1][0, 2].clone()
    query = twins.sizes.query()
    twins.write(20, 6 * query)
    got, want = twins.step(BEGIN + 3, query)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    assert len(calls) == 4
    for held in (twins.held, twins.copy):
        held[-1][1, 3] = held[-1][0, 2]  # token 18 of row 0 is token 26 of row 1
    twins.step(BEGIN + 4)
    query = twins.sizes.query()
    key = 6 * query[:1].expand_as(query)
    twins.step(18, key=key)
    got, want = twins.step(BEGIN + 5, torch.cat((query[1:], query[:1])))
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)


def by_index(cache: Tensor, new: Tensor, pos: Tensor) -> Tensor:
    cache[torch.arange(len(cache))[:, None], :, pos] = new.transpose(1, 2)
    return cache


def by_scatter(cache: Tensor, new: Tensor, pos: Tensor) -> Tensor:
    return cache.scatter_(2, pos[:, None, :, None].expand_as(new), new)


def quantised(cache: Tensor, new: Tensor, pos: Tensor) -> Tensor:
    """A fixed scale, so that one tensor holds all."""
    number = (new * 25).round().clamp(-127, 127)
    stored = by_index(cache, number.to(torch.int8), pos)
    return stored.float() * 0.04


@pytest.mark.parametrize("put", [by_index, by_scatter, quantised])
def test_rows_that_go_on_pause_rewind_and_are_replaced(put: Any, calls: list[SparseCall]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        keys, values = put(ck, k, pos), put(cv, v, pos)
        mask = torch.arange(keys.shape[2]) <= pos[:, None, -1:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=True
        )

    s = Sizes(batch=3)
    held = [s.keys(), s.keys()]
    if put is quantised:
        held = [each.mul(25).to(torch.int8) for each in held]
    copy = [each.clone() for each in held]
    compiled = torch.compile(attend, backend="lychee", options=ALL)
    steps = [(60, 40, 90), (61, 40, 91), (62, 41, 80), (63, 0, 81), (64, 1, 82)]
    for positions in steps:
        pos = torch.tensor(positions)[:, None]
        new = s.query(), s.keys(1), s.keys(1)
        close((compiled(*new, pos, *held), attend(*new, pos, *copy)))
    assert len(calls) == len(steps)


def grown_and_rotated(
    q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, cos: Tensor, sin: Tensor
) -> Any:
    """Keys are stored before their rotation, and all of them are turned at each step."""
    ck, cv = torch.cat((ck, k), 2), torch.cat((cv, v), 2)
    cos, sin = cos[: ck.shape[2]], sin[: ck.shape[2]]
    turned = torch.stack((-ck[..., 1::2], ck[..., ::2]), -1).flatten(-2)
    keys = ck * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, cv, enable_gqa=True)
    return out, ck, cv, cos, sin


def grown_bytes(
    q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, ks: Tensor, vs: Tensor
) -> Any:
    """Numbers of 8 bits and their scales grow side by side."""
    number, unit = scaled(k)
    ck, ks = torch.cat((ck, number), 2), torch.cat((ks, unit), 2)
    number, unit = scaled(v)
    cv, vs = torch.cat((cv, number), 2), torch.cat((vs, unit), 2)
    keys, values = ck.float() * ks, cv.float() * vs
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    return out, ck, cv, ks, vs


@pytest.mark.parametrize("form", [grown_and_rotated, grown_bytes])
def test_a_growing_cache_is_an_expression_too(form: Any, calls: list[SparseCall]) -> None:
    """Steps, tokens that are taken back, and a key that is written outside."""
    s = Sizes(slots=60)
    if form is grown_bytes:
        (ck, ks), (cv, vs) = scaled(s.keys()), scaled(s.keys())
        held = [ck, cv, ks, vs]
    else:
        tables = angles(Sizes(slots=96))
        held = [s.keys(), s.keys(), tables.cos(), tables.sin()]
    step = torch.compile(form, backend="lychee", options=ALL)
    tables = held[2:]
    for number in range(9):
        if number == 5:
            held = [each[:, :, :62].contiguous() if each.dim() == 4 else each for each in held]
        if number == 7:
            held[0][:, :, 20].mul_(2)
        new = s.query(), s.keys(1), s.keys(1)
        given = [*held[:2], *tables] if form is grown_and_rotated else held
        want = form(*new, *(each.clone() for each in given))
        got, *held = step(*new, *given)
        close((got, want[0]))
        for ours, theirs in zip(held, want[1:], strict=True):
            assert torch.equal(ours, theirs)
    assert len(calls) >= 8
