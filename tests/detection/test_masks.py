"""Recovered masks: predicate and range of keys by brute force, and how they are put in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Traced, evaluate, loads

from lychee_compile.codegen.specification import KV, B, H, Q
from lychee_compile.passes.detect import detect
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.masks.reading import Reading
from lychee_compile.passes.graph.normalise import normalise

BATCH, HEADS, QUERIES, KEYS, DIM = 2, 2, 4, 6, 3
NAMES = ("query", "key", "value", "at", "pad", "document", "lengths", "cut", "given")

Mask = Callable[..., Tensor]
"""(q, kv, at, pad, document, lengths, cut, given) -> visible; q [T, 1] and kv [L] count from 0."""

MASKS: dict[str, tuple[Mask, str]] = {
    "causal": (lambda q, kv, *_: kv <= q, "causal"),
    "causal, turned": (lambda q, kv, *_: ~(kv > q), "causal"),
    "tril": (lambda q, kv, *_: torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(), "causal"),
    "not triu": (lambda q, kv, *_: ~torch.ones(QUERIES, KEYS).triu(1).bool(), "causal"),
    "triu == 0": (lambda q, kv, *_: torch.ones(QUERIES, KEYS).triu(1) == 0, "causal"),
    "tril of ints": (lambda q, kv, *_: torch.ones(QUERIES, KEYS).tril() > 0.5, "causal"),
    "offset": (lambda q, kv, *_: kv <= q + 2, "causal, offset = 2"),
    "offset below": (lambda q, kv, *_: kv < q + 3, "causal, offset = 2"),
    "tril, offset": (lambda q, kv, *_: torch.ones(QUERIES, KEYS).tril(2).bool(),
                     "causal, offset = 2"),
    "tensor offset": (lambda q, kv, at, *_: kv <= q + at, "causal, offset = at_1"),
    "minus": (lambda q, kv, at, *_: kv - at <= q, "causal, offset = at_1"),
    "window": (lambda q, kv, *_: (kv <= q) & (kv > q - 3), "causal, window 3"),
    "window by distance": (lambda q, kv, *_: (q - kv >= 0) & (q - kv < 3), "causal, window 3"),
    "window, offset": (lambda q, kv, at, *_: (kv <= q + at) & (kv >= q + at - 1),
                       "causal, offset = at_1, window 2"),
    "window of keys": (lambda q, kv, *_: (kv <= q) & (kv >= 2), ""),
    "both sides": (lambda q, kv, *_: (q - kv).abs() < 2, ""),
    "prefix": (lambda q, kv, *_: (kv <= q) | (kv < 2), "causal, prefix 2"),
    "tensor prefix": (lambda q, kv, at, *_: (kv <= q) | (kv < at), "causal, prefix at_1"),
    "padding": (lambda q, kv, at, pad, *_: pad[:, None, None], "padding pad_1"),
    "no padding": (lambda q, kv, at, pad, *_: ~(~pad)[:, None, None], "padding pad_1"),
    "padding of ints": (lambda q, kv, at, pad, *_: pad.int()[:, None, None] != 0, "padding pad_1"),
    "padding, filled": (lambda q, kv, at, pad, *_:
                        pad.masked_fill(kv > 4, False)[:, None, None], ""),
    "padding, where": (lambda q, kv, at, pad, *_:
                       torch.where(kv <= q, pad[:, None, None], False), ""),
    "padding by index": (lambda q, kv, at, pad, *_:
                         pad[torch.arange(BATCH)[:, None, None, None], kv], "padding pad_1"),
    "padding by negative index": (lambda q, kv, at, pad, *_: pad[:, kv - KEYS][:, None, None], ""),
    "causal, padding": (lambda q, kv, at, pad, *_: (kv <= q) & pad[:, None, None],
                        "causal, padding pad_1"),
    "product of masks": (lambda q, kv, at, pad, *_: (kv <= q) * pad[:, None, None], ""),
    "sum of masks": (lambda q, kv, at, pad, *_: (kv <= q) + pad[:, None, None], ""),
    "document of queries": (lambda q, kv, at, pad, doc, *_: doc[:QUERIES, None] == doc,
                            "same document"),
    "chunks": (lambda q, kv, *_: (kv // 2 == q // 2) & (kv <= q), ""),
    "chunks, cast": (lambda q, kv, *_: ((kv / 2).long() == (q / 2).long()) & (kv <= q), ""),
    "chunks, shifted": (lambda q, kv, *_: (kv >> 1 == q >> 1) & (kv <= q),
                        "causal, floor(kv/2) == floor(q/2)"),
    "every second key": (lambda q, kv, *_: kv % 2 == q % 2, "kv % 2 == q % 2"),
    "strided": (lambda q, kv, *_: (q - kv) % 2 == 0, ""),
    "half, from": (lambda q, kv, *_: kv > q / 2, ""),
    "half, to": (lambda q, kv, *_: kv < q * 0.5, ""),
    "lengths": (lambda q, kv, at, pad, doc, lengths, *_: kv < lengths[:, None, None, None], ""),
    "float bound, from": (lambda q, kv, at, pad, doc, lengths, cut, given: (kv > cut)[None], ""),
    "float bound, to": (lambda q, kv, at, pad, doc, lengths, cut, given: (kv < cut)[None], ""),
    "float bound, ends": (lambda q, kv, at, pad, doc, lengths, cut, given:
                          (kv >= cut) & (kv <= q), ""),
    "given": (lambda *masks: masks[-1], "bool tensor [2, 1, 4, 6]"),
    "given, shifted": (lambda *masks: masks[-1].roll(1, -1), ""),
    "flipped": (lambda q, kv, *_: (kv <= q).flip(1), ""),
    "turned around": (lambda q, kv, *_: (kv.flip(0) <= q), ""),
    "all": (lambda q, kv, *_: kv + q >= 0, "none"),
}  # fmt: skip

SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "sdpa": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    "sdpa, added": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.zeros(m.shape).masked_fill(~m, -torch.inf)
    ),
    "sdpa, where": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.where(m, 0.0, torch.finfo(torch.float32).min)
    ),
    "masked_fill": lambda q, k, v, m: (q @ k.mT).masked_fill(~m, -torch.inf).softmax(-1) @ v,
    "where": lambda q, k, v, m: torch.where(m, q @ k.mT, -1e9).softmax(-1) @ v,
    "where not": lambda q, k, v, m: torch.where(~m, -1e30, q @ k.mT).softmax(-1) @ v,
    "one minus": lambda q, k, v, m: (q @ k.mT + (1.0 - m.float()) * -1e9).softmax(-1) @ v,
    "minus": lambda q, k, v, m: (q @ k.mT - (~m).float() * 1e9).softmax(-1) @ v,
    "zeros, filled": lambda q, k, v, m: (
        (q @ k.mT + torch.zeros(QUERIES, KEYS).masked_fill(~m, -1e9)).softmax(-1) @ v
    ),
}


def inputs() -> list[Tensor]:
    pad = torch.tensor([[True] * 5 + [False], [False, True, True, True, False, True]])
    given = torch.rand(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.6
    shapes = ((BATCH, HEADS, tokens, DIM) for tokens in (QUERIES, KEYS, KEYS))
    masks = [torch.tensor(2), pad, torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([3, 5])]
    return [*map(torch.randn, shapes), *masks, torch.tensor(1.5), given]


def recovered(spell: Callable[..., Tensor], mask: Mask) -> tuple[Reading, Attention, dict]:
    """Return the reading of a mask, the attention found, and the values of its tensors by name."""

    def function(query, key, value, *others):
        q, kv = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
        return spell(query, key, value, mask(q, kv, *others))

    # Names as a user gives them, for the words.
    source = f"lambda {', '.join(NAMES)}: function({', '.join(NAMES)})"
    traced = Traced(eval(source, {"function": function}), *inputs())
    written = normalise(traced.gm, traced.mode)
    (found,) = detect.find_attention(traced.gm, written)
    assert isinstance(found, Attention), found
    names = found.score and _names(traced, found)
    return Reading(found), found, names


def _names(traced: Traced, found: Attention) -> dict[str, Tensor]:
    from lychee_compile.passes.graph.names import Names

    return loads(traced, Names(traced.gm), tuple(inputs()))


def visible_by_hand(mask: Mask) -> Tensor:
    q, kv = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
    return mask(q, kv, *inputs()[3:]).expand(BATCH, HEADS, QUERIES, KEYS)


def check(reading: Reading, values: dict[str, Any], expected: Tensor) -> None:
    """Check that the predicate is the mask, and no visible key lies outside the range."""
    first, end = reading.key_range
    for place in itertools.product(*map(range, expected.shape)):
        at: dict[Any, int] = dict(zip((B, H, Q, KV), place, strict=True))
        seen = bool(expected[place])
        got = evaluate(reading.visible, at, values)
        assert got == seen, (place, reading.visible)
        if seen:
            assert evaluate(first, at, values) <= place[-1] < evaluate(end, at, values), (
                place, reading.key_range,
            )  # fmt: skip


EVERY_PAIR = [
    *((name, spelling) for name in MASKS for spelling in ("sdpa", "where", "one minus")),
    *(("causal, padding", spelling) for spelling in SPELLINGS),
]


@pytest.mark.parametrize(("name", "spelling"), sorted(set(EVERY_PAIR)))
def test_a_mask_is_recovered(name: str, spelling: str) -> None:
    mask, words = MASKS[name]
    reading, _, values = recovered(SPELLINGS[spelling], mask)
    check(reading, values, visible_by_hand(mask))
    if words:
        plain = not name.startswith("given") or spelling in ("sdpa", "where")
        assert reading.words() == words or not plain
    assert isinstance(reading.predicate, str)


@settings(max_examples=20)
@given(st.data())
def test_masks_in_any_combination(data) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(MASKS)), min_size=2, max_size=3))
    how = data.draw(st.lists(st.sampled_from(["&", "|", "& not", "^"]), min_size=2, max_size=2))
    spelling = data.draw(st.sampled_from(sorted(SPELLINGS)))
    note(f"{names} {how} {spelling}")

    def mask(*given: Any) -> Tensor:
        made = MASKS[names[0]][0](*given)
        for name, operator in zip(names[1:], how, strict=False):
            other = MASKS[name][0](*given)
            made = {"&": made & other, "|": made | other, "& not": made & ~other}.get(
                operator, made ^ other
            )
        return made

    reading, _, values = recovered(SPELLINGS[spelling], mask)
    check(reading, values, visible_by_hand(mask))
    assert isinstance(reading.words(), str)
    assert isinstance(reading.predicate, str)


def test_is_causal_is_a_mask_too() -> None:
    def function(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    traced = Traced(function, *inputs()[:3])
    (found,) = detect.find_attention(traced.gm, frozenset())
    reading = Reading(found)
    assert (reading.words(), reading.predicate) == ("causal", "kv <= q")
    expected = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    check(reading, {}, expected.expand(BATCH, HEADS, QUERIES, KEYS))
