"""Caches of fixed size, written in every spelling: decoding stays sparse, and no index is stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.options import Options
from lychee_compile.runtime.cache_registry import registry

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

B, H, G, D, L, BEGIN, STEPS = 2, 2, 2, 16, 120, 70, 4
SMALL = {"budget": 24, "sinks": 2, "recent": 8, "chunk": (2, 4)}


def hot(pos: Any) -> Tensor:
    return (torch.arange(L) == pos)[:, None]


def index_copy_in_place(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    return c.index_copy_(2, pos, x)


def scatter_in_place(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    c.scatter_(2, pos[:, None].expand(B, H, 1, D), x)
    return c


def index_put_for_all_rows(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    c[torch.arange(B)[:, None, None], torch.arange(H)[:, None], pos] = x
    return c


def index_put_by_every_row(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    c[:, :, pos] = x
    return c


def whole_copy_of_where(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    c.copy_(torch.where(hot(pos), x, c))
    return c


def whole_copy_of_index_copy(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    new = c.index_copy(2, pos, x)
    c.copy_(new)
    return new


def slice_of_int(c: Tensor, pos: int, x: Tensor) -> Tensor:
    c[:, :, pos : pos + 1] = x
    return c


def select_of_int(c: Tensor, pos: int, x: Tensor) -> Tensor:
    c[:, :, pos] = x[:, :, 0]
    return c


def narrow_of_int(c: Tensor, pos: int, x: Tensor) -> Tensor:
    c.narrow(2, pos, 1).copy_(x)
    return c


def old_and_new_put_together(c: Tensor, pos: int, x: Tensor) -> Tensor:
    keys = torch.cat((c[:, :, :pos], x), 2)
    c[:, :, pos : pos + 1] = x
    return keys


def index_copy(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    return c.index_copy(2, pos, x)


def index_put(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    return c.index_put((torch.arange(B)[:, None, None], torch.arange(H)[:, None], pos), x)


def scatter(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    return c.scatter(2, pos.view(1, 1, 1, 1).expand(B, H, 1, D), x)


def where(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    return torch.where(hot(pos), x, c)


def where_not(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    return torch.where((pos - torch.arange(L) != 0)[:, None], c, x)


def where_of_int(c: Tensor, pos: int, x: Tensor) -> Tensor:
    return torch.where(hot(pos), x, c)


def one_hot(c: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    chosen = hot(pos).to(c.dtype)
    return c * (1 - chosen) + x * chosen


def slice_scatter(c: Tensor, pos: int, x: Tensor) -> Tensor:
    return torch.slice_scatter(c, x, 2, pos, pos + 1)


def select_scatter(c: Tensor, pos: int, x: Tensor) -> Tensor:
    return torch.select_scatter(c, x[:, :, 0], 2, pos)


IN_PLACE = [
    index_copy_in_place, scatter_in_place, index_put_for_all_rows, index_put_by_every_row,
    whole_copy_of_where, whole_copy_of_index_copy, slice_of_int, select_of_int, narrow_of_int,
    old_and_new_put_together,
]  # fmt: skip
RETURNED = [
    index_copy, index_put, scatter, where, where_not, where_of_int, one_hot, slice_scatter,
    select_scatter,
]  # fmt: skip
TWINS = [
    scatter_in_place, index_put_by_every_row, whole_copy_of_index_copy, select_of_int,
    narrow_of_int, index_put, where, where_not, slice_scatter,
]  # fmt: skip
"""Spellings that another one here resembles: CI leaves them out."""
Write = Callable[..., Tensor]


def step_of(write: Write) -> Callable[..., Any]:
    """Return a step of decoding that writes by `write`, and gives the caches if it copies them."""

    def step(query: Tensor, x: Tensor, y: Tensor, ck: Tensor, cv: Tensor, pos: Any) -> Any:
        keys, values = write(ck, pos, x), write(cv, pos, y)
        mask = torch.arange(keys.shape[2])[None] <= pos
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return (out, keys, values) if write in RETURNED else (out, ck, cv)

    return step


def takes_int(write: Write) -> bool:
    return "int" in str(write.__annotations__["pos"])


def given(number: int, integer: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return query, key, value and position of one step."""
    torch.manual_seed(100 * seed + number)
    query, x, y = 2 * torch.randn(B, H * G, 1, D), torch.randn(B, H, 1, D), torch.randn(B, H, 1, D)
    return query, x, y, BEGIN + number if integer else torch.tensor([BEGIN + number])


def caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(B, H, L, D).to(dtype), torch.randn(B, H, L, D).to(dtype)


def decoded(step: Callable[..., Any], integer: bool) -> list[Tensor]:
    keys, values = caches()
    outputs = []
    for number in range(STEPS):
        *tensors, pos = given(number, integer)
        out, keys, values = step(*tensors, keys, values, pos)
        outputs.append(out)
    return outputs


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(each, marks=pytest.mark.thorough if each in TWINS else ())
        for each in (*IN_PLACE, *RETURNED)
    ],
)
def test_every_spelling_is_a_write(write: Write) -> None:
    step, integer = step_of(write), takes_int(write)
    dense = decoded(step, integer)
    options = {**SMALL, "budget": L - 1}
    every = decoded(torch.compile(step, backend="lychee", options=options), integer)
    for got, expected in zip(every, dense, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    with lychee_compile.record() as recorder:
        decoded(torch.compile(step, backend="lychee", options=SMALL), integer)
    assert len(recorder.calls) == STEPS
    assert max(int(call.tokens_read.max()) for call in recorder.calls) == SMALL["budget"]


def checked(keys: Tensor, length: int) -> None:
    """Check that the index of `keys` describes the keys that are in it."""
    cache = registry.index_of(keys, Options.parse(None, SMALL).index_config())
    assert cache is not None
    assert cache.known.tolist() == [length] * B
    assert torch.equal(cache.fingerprint[:, :length], fingerprints(keys[:, :, :length]))


def test_branches_of_a_cache_are_never_mixed() -> None:
    """Two continuations of one tensor, step by step in turn, are what each is alone."""
    compiled = torch.compile(step_of(index_copy), backend="lychee", options=SMALL)

    def advance(state: tuple[Tensor, Tensor], number: int, seed: int) -> Any:
        *tensors, pos = given(number, False, seed)
        out, *state = compiled(*tensors, *state, pos)
        checked(state[0], BEGIN + number + 1)
        return out, tuple(state)

    alone = {}
    for seed in (1, 2):
        registry.clear()
        state, alone[seed] = caches(), []
        for number in range(STEPS):
            out, state = advance(state, number, seed)
            alone[seed].append(out)
    registry.clear()
    first = caches()
    states = {1: first, 2: first}
    for number in range(STEPS):
        for seed in (1, 2):
            out, states[seed] = advance(states[seed], number, seed)
            assert torch.equal(out, alone[seed][number])
    torch.testing.assert_close(first[0], caches()[0], rtol=0, atol=0)


def test_an_older_tensor_can_be_decoded_from_again() -> None:
    compiled = torch.compile(step_of(where), backend="lychee", options=SMALL)
    kept = [caches()]
    outputs = []
    for number in range(STEPS):
        *tensors, pos = given(number, False)
        out, *state = compiled(*tensors, *kept[-1], pos)
        kept.append(tuple(state))
        outputs.append(out)
    for number in (2, 0, 3):
        *tensors, pos = given(number, False)
        out, *state = compiled(*tensors, *kept[number], pos)
        checked(state[0], BEGIN + number + 1)
        assert torch.equal(state[0], kept[number + 1][0])


def test_a_cache_given_back_and_written_by_somebody_is_compared() -> None:
    compiled = torch.compile(step_of(one_hot), backend="lychee", options=SMALL)
    state: Any = caches()
    for number in range(STEPS):
        *tensors, pos = given(number, False)
        _, *state = compiled(*tensors, *state, pos)
        checked(state[0], BEGIN + number + 1)
        state[0][:, :, 5 + number] = 3.0


def test_the_index_of_a_dropped_cache_goes() -> None:
    compiled = torch.compile(step_of(index_put), backend="lychee", options=SMALL)
    state: Any = caches()
    for number in range(STEPS):
        *tensors, pos = given(number, False)
        _, *state = compiled(*tensors, *state, pos)
    assert len(registry) == 1
    del state
    assert len(registry) == 0


def twice_in_one_graph(
    query: Tensor, x: Tensor, y: Tensor, ck: Tensor, cv: Tensor, pos: Tensor
) -> Any:
    """Write in place, and give back a copy with one more token."""
    first, *_ = step_of(index_copy_in_place)(query, x, y, ck, cv, pos)
    second, *state = step_of(index_copy)(query, x, y, ck, cv, pos + 1)
    return first + second, *state


def test_a_second_write_to_a_cache_is_not_followed() -> None:
    *tensors, pos = given(0, False)
    dense = twice_in_one_graph(*tensors, *caches(), pos)
    report = lychee_compile.explain(twice_in_one_graph, *tensors, *caches(), pos, options=SMALL)
    codes = [site.reason and site.reason.code for site in report.sites]
    assert codes == [None, "cache-not-an-input"]
    options = {**SMALL, "budget": L - 1}
    compiled = torch.compile(twice_in_one_graph, backend="lychee", options=options)
    for got, expected in zip(compiled(*tensors, *caches(), pos), dense, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def moving_position(
    query: Tensor, x: Tensor, y: Tensor, ck: Tensor, cv: Tensor, pos: Tensor
) -> Tensor:
    """Write at a position that moves on before attention reads it."""
    ck.index_copy_(2, pos, x)
    cv.index_copy_(2, pos, y)
    mask = torch.arange(L)[None] <= pos
    pos.add_(1)
    return F.scaled_dot_product_attention(query, ck, cv, attn_mask=mask, enable_gqa=True)


def test_a_position_that_moves_on_is_not_trusted() -> None:
    *tensors, pos = given(0, False)
    report = lychee_compile.explain(moving_position, *tensors, *caches(), pos, options=SMALL)
    (site,) = report.sites
    assert site.reason is not None
    assert site.reason.code == "cache-write-unknown"


def unfolded(query: Tensor, x: Tensor, y: Tensor, ck: Tensor, cv: Tensor) -> Any:
    keys, values = (
        torch.cat((c.view(B * H, -1, D), new.view(B * H, 1, D)), 1) for c, new in ((ck, x), (cv, y))
    )
    weights = torch.bmm(query.view(B * H, 1, D), keys.mT).softmax(-1)
    out = torch.bmm(weights, values).view(B, H, 1, D)
    return out, keys.view(B, H, -1, D), values.view(B, H, -1, D)


def transposed(query: Tensor, x: Tensor, y: Tensor, ck: Tensor, cv: Tensor) -> Any:
    keys, values = (torch.cat((c.transpose(1, 2), new), 2) for c, new in ((ck, x), (cv, y)))
    out = F.scaled_dot_product_attention(query, keys, values)
    return out, keys.transpose(1, 2), values.transpose(1, 2)


def merged(query: Tensor, x: Tensor, y: Tensor, ck: Tensor, cv: Tensor) -> Any:
    out, keys, values = transposed(query, x, y, *(each.view(B, -1, H, D) for each in (ck, cv)))
    return out, keys.reshape(B, -1, H * D), values.reshape(B, -1, H * D)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (unfolded, (B, H, L, D)),
        pytest.param(transposed, (B, L, H, D), marks=pytest.mark.thorough),
        (merged, (B, L, H * D)),
    ],
)
def test_a_growing_cache_may_be_returned_in_another_shape(step: Any, shape: Any) -> None:
    compiled = torch.compile(step, backend="lychee", options={**SMALL, "budget": L + STEPS - 1})
    sparse = torch.compile(step, backend="lychee", options=SMALL)
    state: Any = (torch.randn(shape), torch.randn(shape))
    other: Any = state
    with lychee_compile.record() as recorder:
        for _ in range(STEPS - 1):
            new = torch.randn(3, B, H, 1, D).unbind(0)
            dense, *expected = step(*new, *state)
            out, *state = compiled(*new, *state)
            _, *other = sparse(*new, *other)
            torch.testing.assert_close([out, *state], [dense, *expected], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other, state)
    read = [int(call.tokens_read.max()) for call in recorder.calls]
    assert read.count(SMALL["budget"]) == STEPS - 1
