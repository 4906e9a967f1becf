"""Detection, cache binding and rewriting, on graphs of a few lines each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.passes.site import Site
from lychee_compile.runtime.cache_registry import registry

BATCH, HEADS, GROUP, SIZE, DIM = 2, 2, 2, 160, 8
START, STEPS = 60, 10
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}
SPARSE = {**EVERYTHING, "budget": 32, "overfetch": 1}

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(query, key cache, value cache, new key, new value, position) -> attention output."""

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def attend(query: Tensor, key: Tensor, value: Tensor, seen: int, **given: Any) -> Tensor:
    mask = (torch.arange(key.shape[2]) < seen)[None, None, None]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, **{"enable_gqa": True, **given}
    )


def index_copy(q, k, v, k_new, v_new, at):
    positions = torch.tensor([at])
    k.index_copy_(2, positions, k_new)
    v.index_copy_(2, positions, v_new)
    return attend(q, k, v, at + 1)


def position_tensor(q, k, v, k_new, v_new, at):
    positions = torch.tensor([at])
    k[:, :, positions] = k_new
    v[:, :, positions] = v_new
    return attend(q, k, v, at + 1)


def negative_position(q, k, v, k_new, v_new, at):
    positions = torch.tensor([at - SIZE])
    k[:, :, positions] = k_new
    v[:, :, positions] = v_new
    return attend(q, k, v, at + 1)


def row_by_row(q, k, v, k_new, v_new, at):
    k[torch.arange(BATCH), :, torch.tensor([at, at + 1])] = k_new[:, :, 0]
    return attend(q, k, v, at + 2)


def ring(q, k, v, k_new, v_new, at):
    positions = torch.tensor([at]) % (START + STEPS // 2)
    k[:, :, positions] = k_new
    v[:, :, positions] = v_new
    return attend(q, k, v, START + STEPS // 2)


def slice_write(q, k, v, k_new, v_new, at):
    k[:, :, at : at + 1] = k_new
    v[:, :, at : at + 1] = v_new
    return attend(q, k, v, at + 1)


def slice_from_the_end(q, k, v, k_new, v_new, at):
    k[:, :, -1:] = k_new
    v[:, :, -1:] = v_new
    mask = (torch.arange(SIZE) != at)[None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def tokens_before_heads(q, k, v, k_new, v_new, at):
    positions = torch.tensor([at])
    k.index_copy_(1, positions, k_new.transpose(1, 2))
    v.index_copy_(1, positions, v_new.transpose(1, 2))
    return attend(q, k.transpose(1, 2), v.transpose(1, 2), at + 1)


def repeated(spell: Callable[[Tensor], Tensor]) -> Step:
    """Return a step whose keys and values are spread over the query heads by `spell`."""

    def step(q, k, v, k_new, v_new, at):
        positions = torch.tensor([at])
        k.index_copy_(2, positions, k_new)
        v.index_copy_(2, positions, v_new)
        return attend(q, spell(k), spell(v), at + 1, enable_gqa=False)

    return step


def expand(x: Tensor) -> Tensor:
    wide = x[:, :, None].expand(BATCH, HEADS, GROUP, SIZE, DIM)
    return wide.reshape(BATCH, HEADS * GROUP, SIZE, DIM)


def interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(GROUP, dim=1)


def tile(x: Tensor) -> Tensor:
    return x.repeat(1, GROUP, 1, 1)


def tile_by_expand(x: Tensor) -> Tensor:
    wide = x[:, None].expand(BATCH, GROUP, HEADS, SIZE, DIM)
    return wide.reshape(BATCH, GROUP * HEADS, SIZE, DIM)


def expand_rounded(x: Tensor) -> Tensor:
    return expand(x.to(torch.float8_e4m3fn).to(x.dtype))


def scattered(q, k, v, k_new, v_new, at):
    k.scatter_(2, torch.full_like(k_new, at, dtype=torch.int64), k_new)
    return attend(q, k, v, at + 1)


def scaled_keys(q, k, v, k_new, v_new, at):
    k.index_copy_(2, torch.tensor([at]), k_new)
    return attend(q, k * 2, v, at + 1)


def buffers(step: Step) -> tuple[Tensor, Tensor]:
    flat = step is tokens_before_heads
    shape = (BATCH, SIZE, HEADS, DIM) if flat else (BATCH, HEADS, SIZE, DIM)
    return torch.randn(shape), torch.randn(shape)


def decode(step: Step, options: dict[str, Any]) -> list[Site]:
    """Decode by `step` compiled and uncompiled over equal caches; the sites of the last graph.

    With a budget that holds everything the outputs must be equal.
    """
    k, v = buffers(step)
    k_eager, v_eager = k.clone(), v.clone()
    compiled = torch.compile(step, backend="lychee", options=options)
    for at in range(START, START + STEPS):
        query = torch.randn(BATCH, HEADS * GROUP, 1, DIM)
        fresh = torch.randn(2, BATCH, HEADS, 1, DIM)
        got = compiled(query, k, v, *fresh, at)
        expected = step(query, k_eager, v_eager, *fresh, at)
        assert got.shape == expected.shape
        assert torch.equal(k, k_eager)
        assert torch.isfinite(got).all()
        if options is EVERYTHING:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not counters["graph_break"]
    return lychee_compile.reports()[-1].sites


BOUND = [
    index_copy,
    scattered,
    position_tensor,
    negative_position,
    row_by_row,
    ring,
    slice_write,
    slice_from_the_end,
    tokens_before_heads,
    repeated(expand),
    repeated(interleave),
    repeated(tile),
    repeated(tile_by_expand),
    scaled_keys,
]


def name_of(step: Any) -> str | None:
    cells = getattr(step, "__closure__", None)
    return cells[0].cell_contents.__name__ if cells else getattr(step, "__name__", None)


@pytest.mark.parametrize("step", BOUND, ids=name_of)
def test_a_bound_cache_gives_dense_attention_when_all_is_read(step: Step) -> None:
    (site,) = decode(step, EVERYTHING)
    assert (site.decision, site.cache) == ("sparse", "static")
    assert (site.query_heads, site.kv_heads, site.head_dim) == (HEADS * GROUP, HEADS, DIM)
    assert (site.query_len, site.kv_len) == (1, SIZE)


@pytest.mark.parametrize("step", [step for step in BOUND if step is not ring], ids=name_of)
def test_a_bound_cache_is_read_sparsely(step: Step) -> None:
    with lychee_compile.record() as recorder:
        decode(step, SPARSE)
    assert counters["lychee"]["sparse"] == counters["lychee"]["found"] > 0
    assert len(recorder.calls) == STEPS
    assert all(int(call.tokens_read.max()) <= SPARSE["budget"] for call in recorder.calls)


def rolled(q, k, v, k_new, v_new, at):
    moved_k, moved_v = k.roll(-1, 2), v.roll(-1, 2)
    last = torch.tensor([SIZE - 1])
    moved_k.index_copy_(2, last, k_new)
    moved_v.index_copy_(2, last, v_new)
    k.copy_(moved_k)
    v.copy_(moved_v)
    return attend(q, moved_k, moved_v, SIZE)


def window(q, k, v, k_new, v_new, at):
    k, v = (torch.cat((x, new), 2)[:, :, 1:] for x, new in ((k, k_new), (v, v_new)))
    return attend(q, k, v, SIZE)


def written_twice(q, k, v, k_new, v_new, at):
    positions = torch.tensor([at])
    k.index_copy_(2, positions, k_new)
    k.index_copy_(2, positions + 1, k_new)
    return attend(q, k, v, at + 2)


def heads_apart(q, k, v, k_new, v_new, at):
    rows, heads = torch.arange(BATCH)[:, None], torch.arange(HEADS)
    k[rows, heads, torch.tensor([[at, at + 1], [at + 1, at]])] = k_new[:, :, 0]
    return attend(q, k, v, at + 2)


def by_bool_mask(q, k, v, k_new, v_new, at):
    k[:, :, torch.arange(SIZE) == at] = k_new
    return attend(q, k, v, at + 1)


def read_before_written(q, k, v, k_new, v_new, at):
    result = attend(q, k, v, at)
    k[:, :, at : at + 1] = k_new
    return result


def computed(q, k, v, k_new, v_new, at):
    return attend(q, k.tanh(), v, at)


@pytest.mark.parametrize(
    ("step", "cache", "reason"),
    [
        (rolled, "sliding", "rolls"),
        (window, "sliding", "sliding window"),
        (written_twice, "none", "more than once"),
        (heads_apart, "none", "no rows of the batch"),
        (by_bool_mask, "none", "other indices than token positions"),
        (read_before_written, "none", "after it is read"),
        (repeated(expand_rounded), "none", "computed from the cache anew at each step (by to)"),
        (computed, "none", "not read from a KV cache"),
    ],
    ids=name_of,
)
def test_what_is_no_cache_stays_as_it_is(step: Step, cache: str, reason: str) -> None:
    (site,) = decode(step, EVERYTHING)
    assert (site.decision, site.cache, site.by_design) == ("kept", cache, False)
    assert reason in str(site.reason)
    assert "scaled_dot_product_attention" in site.kernel
    assert len(registry) == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_sites_that_read_one_cache_share_its_index(transposed: bool) -> None:
    def step(q, k, v, k_new, v_new, at):
        if transposed:
            return tokens_before_heads(q, k, v, k_new, v_new, at) + attend(
                -q, k.transpose(1, 2), v.transpose(1, 2), at + 1
            )
        return index_copy(q, k, v, k_new, v_new, at) + attend(-q, k, v, at + 1)

    shape = (BATCH, SIZE, HEADS, DIM) if transposed else (BATCH, HEADS, SIZE, DIM)
    k, v = torch.randn(2, *shape)
    k_eager, v_eager = k.clone(), v.clone()
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    for at in range(START, START + 8):
        query = torch.randn(BATCH, HEADS * GROUP, 1, DIM)
        fresh = torch.randn(2, BATCH, HEADS, 1, DIM)
        got = compiled(query, k, v, *fresh, at)
        torch.testing.assert_close(
            got, step(query, k_eager, v_eager, *fresh, at), atol=1e-5, rtol=1e-5
        )
    assert [site.decision for site in lychee_compile.reports()[-1].sites] == ["sparse"] * 2
    assert len(registry) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, SIZE), (1, 1, SIZE), (BATCH, 1, 1, SIZE)])
def test_a_mask_of_any_rank_gives_what_eager_gives(shape: tuple[int, ...]) -> None:
    def step(query, key, value, mask, new, position):
        key.index_copy_(2, position, new)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    query = torch.randn(BATCH, HEADS * GROUP, 1, DIM)
    key, value = torch.randn(2, BATCH, HEADS, SIZE, DIM)
    mask = torch.ones(shape, dtype=torch.bool)
    new, position = torch.randn(BATCH, HEADS, 1, DIM), torch.tensor([SIZE - 1])
    if shape[-1] == SIZE:
        mask[..., 5] = False  # the budget holds all keys but one
    else:
        key[:, :, 20:40] = value[:, :, 20:40] = 0.5  # any of these may be left out
    expected = step(query, key.clone(), value, mask, new, position)
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    atol = 1e-5 if shape[-1] == SIZE else 0.02
    got = compiled(query, key, value, mask, new, position)
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5)
    assert counters["lychee"]["sparse"] == 1
