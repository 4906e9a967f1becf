"""Attention written by hand is found in any spelling, and decodes sparsely from a cache."""

from __future__ import annotations

import pytest
import torch
from recovered import evaluate
from spellings import SPELLINGS, WHOLES
from spellings_base import BATCH, TOLERANCE, Given, Spelling
from spellings_whole import Whole
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.passes.site import Site

SIZE, START, STEPS = 48, 30, 6
TOKENS, QUERIES = 24, 9
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")
each_spelling = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda each: each.name)
each_first, each_second = (
    pytest.mark.parametrize(
        "spelling",
        [
            pytest.param(
                each, marks=() if number % every == place else pytest.mark.thorough, id=each.name
            )
            for number, each in enumerate(SPELLINGS)
        ],
    )
    for every, place in ((4, 0), (2, 1))
)
"""A quarter of them, and half of them; the others are thorough."""
each_whole = pytest.mark.parametrize("whole", WHOLES, ids=lambda each: each.name)


def assert_equal_within_rounding(got: Tensor, expected: Tensor) -> None:
    band = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, atol=band, rtol=band)


def sites() -> list[Site]:
    """Return the sites of the one graph compiled."""
    assert not counters["graph_break"]
    (report,) = lychee_compile.reports()
    return report.sites


def assert_understood(site: Site, spelling: Spelling, query_len: int, kv_len: int) -> None:
    assert site.form == "eager"
    if not (spelling.folded and query_len == 1):
        assert (site.query_heads, site.query_len) == (spelling.query_heads, query_len)
    assert (site.kv_heads, site.kv_len) == (spelling.kv_heads, kv_len)
    assert (site.head_dim, site.value_head_dim) == (spelling.head_dim, spelling.value_head_dim)
    assert site.source.startswith("spellings_")


def assert_recovered(site: Site, spelling: Spelling, query_len: int, kv_len: int) -> None:
    """Check that the expressions of the report, evaluated, give the same weights as the formula."""
    axes = (BATCH, spelling.query_heads, query_len, kv_len)
    raw = torch.randn(axes).double()
    offset = 0 if spelling.cross else kv_len - query_len
    score, seen = spelling.meaning(raw, torch.arange(query_len) + offset)
    indices = torch.meshgrid(*map(torch.arange, axes), indexing="ij")
    names = dict(zip(("b", "h", "q", "kv"), indices, strict=True))
    names |= {"s": raw, **spelling.held(kv_len)}
    got_seen = evaluate(site.predicate, names).expand_as(seen)
    got_score = evaluate(site.score.removesuffix(" with an extra logit"), names).expand_as(score)
    assert torch.equal(got_seen, seen)
    weights, got = (
        x.masked_fill(~seen, -torch.inf).softmax(-1) for x in (score, got_score.double())
    )
    torch.testing.assert_close(got, weights, atol=2e-3, rtol=2e-3)


def prefill(spelling: Spelling, query: Tensor, key: Tensor, value: Tensor, held: Given) -> Tensor:
    """Queries and keys of the same tokens, or in a single query's case of the last one."""
    kv_len = key.shape[spelling.token_axis]
    positions = torch.arange(kv_len - query.shape[spelling.token_axis], kv_len)
    if spelling.cross:
        positions = torch.arange(query.shape[spelling.token_axis])
    return spelling(query, key, value, spelling.given(positions, kv_len, held))


def step(
    spelling: Spelling,
    query: Tensor,
    cache: tuple[Tensor, Tensor],
    fresh: tuple[Tensor, Tensor],
    positions: Tensor,
    held: Given,
) -> Tensor:
    """Write the new keys and values into their caches, then attend."""
    key, value = cache
    if not spelling.cross:
        key.index_copy_(spelling.token_axis, positions, fresh[0])
        value.index_copy_(spelling.token_axis, positions, fresh[1])
    return spelling(query, key, value, spelling.given(positions, SIZE, held))


def query_len_of(spelling: Spelling) -> int:
    if spelling.one_query:
        return 1
    return QUERIES if spelling.cross else TOKENS


def test_names_are_unique() -> None:
    names = [each.name for each in (*SPELLINGS, *WHOLES)]
    assert len(names) == len(set(names)) > 200


@each_spelling
def test_a_spelling_is_attention(spelling: Spelling) -> None:
    for query_len, kv_len, last in ((query_len_of(spelling), TOKENS, TOKENS - 1), (1, SIZE, START)):
        positions = torch.arange(last - query_len + 1, last + 1)
        operands = spelling.operands(query_len, kv_len)
        given = spelling.given(positions, kv_len, spelling.held(kv_len))
        output = spelling(*operands, given)
        assert output.dtype == spelling.dtype
        expected = spelling.plain(*operands, positions)
        assert_equal_within_rounding(spelling.heads_first(output), expected.to(output.dtype))


@each_whole
def test_a_whole_block_is_attention(whole: Whole) -> None:
    operands = whole.operands()
    torch.testing.assert_close(whole.call(*operands), whole.means(*operands), atol=1e-5, rtol=1e-4)


@each_second
def test_it_is_found_in_a_prefill(spelling: Spelling) -> None:
    query_len = query_len_of(spelling)
    operands = spelling.operands(query_len, TOKENS)
    held = spelling.held(TOKENS)
    expected = prefill(spelling, *operands, held)
    compiled = torch.compile(prefill, backend="lychee")
    assert_equal_within_rounding(compiled(spelling, *operands, held), expected)
    (site,) = sites()
    assert_understood(site, spelling, query_len, TOKENS)
    if not spelling.opaque:
        assert_recovered(site, spelling, query_len, TOKENS)
    assert spelling.mask in site.mask
    assert site.mask != "none"
    assert site.decision in ("kept", "exact")


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(each, marks=pytest.mark.thorough if number % 4 else (), id=each.name)
        for number, each in enumerate(SPELLINGS[::10])
    ],
)
def test_it_is_found_where_lengths_are_symbolic(spelling: Spelling) -> None:
    compiled = torch.compile(prefill, backend="lychee")
    for kv_len in (TOKENS, TOKENS + 5):  # Dynamo takes for symbolic what changes
        query_len = kv_len if query_len_of(spelling) == TOKENS else query_len_of(spelling)
        operands, held = spelling.operands(query_len, kv_len), spelling.held(kv_len)
        expected = prefill(spelling, *operands, held)
        assert_equal_within_rounding(compiled(spelling, *operands, held), expected)
    (site,) = lychee_compile.reports()[-1].sites
    assert isinstance(site.kv_len, str)
    assert (site.query_heads, site.kv_heads) == (spelling.query_heads, spelling.kv_heads)
    assert (site.head_dim, site.value_head_dim) == (spelling.head_dim, spelling.value_head_dim)


@each_first
def test_it_decodes_from_a_cache(spelling: Spelling) -> None:
    _, *cache = spelling.operands(1, SIZE)
    cache_eager = [x.clone() for x in cache]
    held = spelling.held(SIZE)
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    for at in range(START, START + STEPS):
        query, *fresh = spelling.operands(1, 1)
        given = (tuple(fresh), torch.tensor([at]), held)
        expected = step(spelling, query, tuple(cache_eager), *given)
        got = compiled(spelling, query, tuple(cache), *given)
        assert all(torch.equal(*pair) for pair in zip(cache, cache_eager, strict=True))
        assert_equal_within_rounding(got, expected)
    (site,) = sites()
    assert_understood(site, spelling, 1, SIZE)
    if site.decision != "sparse":
        assert spelling.may_stay, site.reason
        return
    assert site.cache == "static"


@each_whole
def test_a_whole_block_is_found(whole: Whole) -> None:
    operands = whole.operands()
    expected = whole.call(*operands)
    compiled = torch.compile(whole.call, backend="lychee")
    torch.testing.assert_close(compiled(*operands), expected, atol=1e-5, rtol=1e-5)
    assert len(sites()) == whole.sites
    for site in sites():
        assert site.form == "eager"
        assert site.head_dim == whole.head_dim
        assert whole.heads in (None, (site.query_heads, site.kv_heads))
        assert whole.mask in site.mask
        assert site.decision in ("kept", "exact")
