"""The functional API: what it promises, and what it says of operands that do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    KINDS,
    Heads,
    configs,
    greedy_chunks,
    heads,
    lengths,
    masks,
    row_chunks,
    seeds,
)

from lychee_compile.functional import build_index, select, sparse_attention, update_index
from lychee_compile.kernels.policies.registry import policy_names
from lychee_compile.options import OptionError, Options

SMALL = {"budget": 40, "sinks": 2, "recent": 8, "chunk": (2, 4)}
SHAPE = Heads(2, 2, 2, 8)
KEY = SHAPE.keys("gaussian", 0, 100)
QUERY = SHAPE.queries(0, 1)


def options_of(config):
    return {name: value for name, value in vars(config).items() if name != "boundaries"}


@given(heads, configs(policy="lychee"), st.sampled_from(KINDS), seeds, st.data())
def test_a_decoding_loop(shape, config, kind, seed, data):
    """Build, then per token select, attend and update: dense with the budget for it."""
    tokens = data.draw(st.integers(1, 60))
    steps = data.draw(st.integers(1, 8))
    key = shape.keys(kind, seed, tokens + steps)
    value = shape.keys("gaussian", seed + 1, tokens + steps)
    index = build_index(key[:, :, :tokens], options=options_of(config))
    for end in range(tokens, tokens + steps + 1):
        now, own = key[:, :, :end], value[:, :, :end]
        assert update_index(index, now) is index
        query = shape.queries(seed + end, 1)
        narrow = select(index, query)
        most = max(config.budget, int((end - index.tail).max()) + config.sinks + config.recent)
        assert narrow.token_mask().sum(-1).max() <= most
        everything = select(index, query, budget=end)
        assert everything.token_mask().all()
        output, certificate = sparse_attention(query, now, own, everything, return_certificate=True)
        dense = F.scaled_dot_product_attention(query, now, own, enable_gqa=True)
        if kind not in ("huge", "outlier"):
            torch.testing.assert_close(output, dense, rtol=1e-3, atol=1e-3)
        assert not certificate.any()


@given(heads, configs(), seeds, st.data())
def test_boundaries_cut_the_chunks(shape, config, seed, data):
    tokens = data.draw(st.integers(1, 90))
    strength = torch.randint(
        5, (shape.batch, tokens), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    end = data.draw(lengths(shape.batch, tokens))
    key = shape.keys("gaussian", seed, tokens)
    index = build_index(key, strength, lengths=end, options=options_of(config))
    for row in range(shape.batch):
        stop = int(end[row])
        chunks, tail = greedy_chunks(strength[row].tolist(), 0, stop, config.chunk)
        assert row_chunks(index, row) == chunks + ([(tail, stop - tail)] if stop > tail else [])


@given(heads, configs(), seeds, st.data())
def test_rows_of_different_lengths_need_no_mask(shape, config, seed, data):
    """Keys beyond a row's length are not selected, and NaN in them does no harm."""
    end = data.draw(lengths(shape.batch, 60))
    key = shape.keys("common", seed, 60)
    beyond = torch.arange(60) >= end[:, None]
    key[beyond[:, None].expand(key.shape[:3])] = torch.nan
    index = build_index(key, lengths=end, options=options_of(config))
    query = shape.queries(seed, 1)
    selection = select(index, query)
    read = selection.token_mask()
    assert not (read & beyond[:, None, None, : read.shape[-1]]).any()
    output, certificate = sparse_attention(query, key, key, selection, return_certificate=True)
    assert output.isfinite().all()
    assert certificate.isfinite().all()
    assert not output[end == 0].any()


@given(heads, seeds, st.data())
def test_masks_are_those_of_sdpa(shape, seed, data):
    key, query = shape.keys("gaussian", seed, 50), shape.queries(seed, 2)
    mask = data.draw(masks(shape, 2, 50, torch.float32))
    index = build_index(key, options=SMALL)
    selection = select(index, query, mask=mask.tensor, budget=50, scale=0.2)
    assert torch.equal(
        selection.token_mask(), mask.seen.any(1)[:, None].expand(-1, shape.kv_heads, -1, -1)
    )
    output = sparse_attention(query, key, key, selection)
    dense = F.scaled_dot_product_attention(
        query, key, key, attn_mask=mask.tensor, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(output, dense, rtol=1e-3, atol=1e-3)


def test_float64_is_computed_in_float64():
    key, query = KEY.double() * 1.1, QUERY.double() * 1.1
    selection = select(build_index(key, options=SMALL), query, budget=100)
    output = sparse_attention(query, key, key, selection)
    dense = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)


def test_lengths_may_be_changed_afterwards():
    """A caller's own counter, bumped in place, is not the index's record of what it has seen."""
    end = torch.tensor([50, 60])
    index = build_index(KEY, lengths=end, options=SMALL)
    end += 20
    assert index.end.tolist() == [50, 60]
    update_index(index, KEY, lengths=end)
    assert index.end.tolist() == [70, 80]


def test_after_a_truncation_fewer_tokens_are_read_and_shorter_caches_taken():
    index = build_index(KEY, options=SMALL)
    index.truncate(torch.tensor([30, 30]))
    assert select(index, QUERY, budget=100).token_mask().shape[-1] == 30
    update_index(index, KEY[:, :, :35])
    fresh = build_index(KEY[:, :, :35], options=SMALL)
    assert [row_chunks(index, row) for row in (0, 1)] == [row_chunks(fresh, row) for row in (0, 1)]


def test_options_come_in_any_form():
    for options in (SMALL, Options(**SMALL)):
        assert build_index(KEY, options=options).config.budget == 40
    assert build_index(KEY).config == Options().index_config()
    with pytest.raises(OptionError, match="bugdet"):
        build_index(KEY, options={"bugdet": 1})


@pytest.mark.parametrize("policy", policy_names())
def test_the_default_device_of_a_program_changes_nothing(policy):
    """On the device "meta" any tensor of ours that names no device would have no numbers."""
    key, query = SHAPE.keys("gaussian", 1, 900), SHAPE.queries(2, 1)
    options = {**SMALL, "policy": policy, "budget": 800, "flat_tokens": 0}

    def attended():
        index = build_index(key[:, :, :850], options=options)
        update_index(index, key)
        return sparse_attention(query, key, key, select(index, query, k=key))

    expected = attended()
    with torch.device("meta"):
        assert torch.equal(attended(), expected)


def test_the_scale_is_remembered():
    index = build_index(KEY, options=SMALL)
    selection = select(index, QUERY, scale=0.5, budget=100)
    output = sparse_attention(QUERY, KEY, KEY, selection)
    dense = F.scaled_dot_product_attention(QUERY, KEY, KEY, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(output, dense)
    other = sparse_attention(QUERY, KEY, KEY, selection, scale=0.1)
    assert not torch.allclose(other, output)
    with pytest.raises(ValueError, match=r"scale=0.1 is not the 0.5"):
        sparse_attention(QUERY, KEY, KEY, selection, scale=0.1, return_certificate=True)


BITS = torch.zeros(2, 100, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_index(KEY[0]), r"k must be \[B, Hkv, L, D\], got float32 \[2, 100, 8\]"),
        (
            lambda: build_index(KEY, BITS[:, :9]),
            r"boundaries must be \[2, 100\], got uint8 \[2, 9\]",
        ),
        (lambda: build_index(KEY, BITS.long()), r"boundaries must be uint8, got int64"),
        (lambda: build_index(KEY, lengths=torch.tensor([3])), r"lengths must be \[2\], got"),
        (lambda: build_index(KEY, lengths=torch.tensor([3, 101])), r"nor exceed 100"),
        (lambda: update_index(index(), KEY[:, :, :9]), r"must not shrink"),
        (lambda: update_index(index(), KEY[:, :1]), r"k must be \[2, 2, L, 8\], got"),
        (lambda: update_index(index(), KEY[0]), r"k must be \[2, 2, L, 8\], got"),
        (lambda: select(index(), QUERY[0]), r"q must be \[B, Hq, Tq, D\], got"),
        (lambda: select(index(), QUERY[:1]), r"q must be \[2, Hq, Tq, 8\], got"),
        (lambda: select(index(), QUERY[:, :3]), r"Hq must be a multiple of 2"),
        (lambda: select(index(), QUERY, budget=0), r"budget must be at least 1, got 0"),
        (lambda: attend(QUERY, KEY[:, :, :60], KEY), r"k must be \[2, 2, 100 or more, D\], got"),
        (lambda: attend(QUERY, KEY, KEY[:, :, :60]), r"v must be \[2, 2, 100, Dv\], got"),
        (lambda: attend(QUERY[..., :7], KEY, KEY), r"q must be \[2, n \* 2, 1, 8\], got"),
    ],
)
def test_operands_that_do_not_fit_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def index():
    return build_index(KEY, options=SMALL)


def attend(query, key, value):
    return sparse_attention(query, key, value, select(index(), QUERY, budget=100))
