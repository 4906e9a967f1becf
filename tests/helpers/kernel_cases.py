"""Attentions with masks and biases of every kind, and the terms of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.codegen.specification import KV, B, H, Q, S
from lychee_compile.kernels.reference.hidden import HIDDEN
from lychee_compile.passes.symbolic.elementwise import Flag

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 4, 2, 3, 12, 8
LENGTH = 5


def operands(kv_heads: int = KV_HEADS, queries: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, queries, DIM),
        torch.randn(BATCH, kv_heads, KEYS, DIM),
        torch.randn(BATCH, kv_heads, KEYS, DIM),
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **given)


def element(name: str, *indices: Any, integer: bool = False) -> sympy.Indexed:
    """Return an element of a captured tensor."""
    symbol = sympy.Symbol(name, integer=True) if integer else sympy.Symbol(name)
    return sympy.Indexed(sympy.IndexedBase(symbol), *indices)


def number(name: str) -> sympy.Symbol:
    """Return a captured integer without dimensions."""
    return sympy.Symbol(name, integer=True)


def slots() -> Tensor:
    return torch.arange(KEYS)


def rows(length: Tensor | int) -> Tensor:
    """Return positions of the queries, [T, 1]."""
    return torch.arange(QUERIES)[:, None] + length


def same(left: sympy.Basic, right: sympy.Basic) -> bool:
    """Equal, floats but for rounding."""
    if isinstance(left, sympy.Expr):
        difference = sympy.expand(left - right)
        return all(abs(each) < 1e-12 for each in difference.as_coefficients_dict().values())
    return left == right


def bias_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def random_mask() -> Tensor:
    seen = torch.rand(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)) < 0.6
    return seen | (slots() == 0)


at, given_pad = number("given_at"), element("given_pad", B, KV)
bias_bhqk, head_bias = element("given_bias", B, 0, Q, KV), element("given_bias", H, Q, KV)
slope = element("given_slopes", H)
shared = element("given_slopes", sympy.floor(H / 2))
scaled = DIM**-0.5 * S

CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], Any, Any]] = {
    "nothing": (sdpa, {}, scaled, True),
    "is_causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), {}, scaled, KV <= Q),
    "bool mask": (
        sdpa,
        {"mask": random_mask()},
        scaled,
        Flag(element("given_mask", B, 0, Q, KV)),
    ),
    "float mask": (
        sdpa,
        {"bias": torch.zeros(BATCH, 1, QUERIES, KEYS).masked_fill(~random_mask(), -torch.inf)},
        scaled + bias_bhqk,
        bias_bhqk > HIDDEN,
    ),
    "bias for each head": (
        sdpa,
        {"bias": bias_of((HEADS, QUERIES, KEYS))},
        scaled + head_bias,
        head_bias > HIDDEN,
    ),
    "bounds that no key exceeds": (
        lambda q, k, v, at: sdpa(q, k, v, (slots() < rows(at * 0 + KEYS)) & (slots() >= -1 - at)),
        {"at": torch.tensor(LENGTH)},
        scaled,
        sympy.Ge(KV, -1 - at),
    ),
    "window": (
        lambda q, k, v, at: sdpa(q, k, v, (slots() <= rows(at)) & (slots() > rows(at) - 4)),
        {"at": torch.tensor(LENGTH)},
        scaled,
        sympy.Le(KV, Q + at) & sympy.Gt(KV, Q + at - 4),
    ),
    "left padding": (
        lambda q, k, v, at, pad: sdpa(q, k, v, (slots() <= rows(at)) & pad[:, None, None]),
        {"at": torch.tensor(LENGTH), "pad": slots() >= torch.tensor([[3], [0]])},
        scaled,
        sympy.Le(KV, Q + at) & Flag(given_pad),
    ),
    "padding of numbers": (
        lambda q, k, v, pad: sdpa(q, k, v, (1 - pad[:, None, None]) * -1e9),
        {"pad": (slots() >= torch.tensor([[3], [0]])).float()},
        scaled - 1e9 * (1 - given_pad),
        -1e9 * (1 - given_pad) > HIDDEN,
    ),
    "alibi": (
        lambda q, k, v, slopes, at: sdpa(
            q,
            k,
            v,
            (slopes[:, None, None] * (slots() - rows(at))).masked_fill(
                slots() > rows(at), -torch.inf
            ),
        ),
        {"slopes": 2.0 ** -torch.arange(1.0, HEADS + 1), "at": torch.tensor(LENGTH)},
        scaled + slope * (KV - Q - at),
        sympy.Le(KV, Q + at),
    ),
    "slopes of groups": (
        lambda q, k, v, slopes: (
            (
                (q.unflatten(1, (KV_HEADS, -1)) @ k[:, :, None].mT)
                + slopes[:, None, None, None] * slots()
            ).softmax(-1)
            @ v[:, :, None]
        ).flatten(1, 2),
        {"slopes": torch.tensor([0.5, 0.25])},
        S + shared * KV,
        True,
    ),
    "slopes within groups": (
        lambda q, k, v, slopes: (
            (
                (q.unflatten(1, (KV_HEADS, -1)) @ k[:, :, None].mT)
                + slopes[:, None, None] * slots()
            ).softmax(-1)
            @ v[:, :, None]
        ).flatten(1, 2),
        {"slopes": torch.tensor([0.5, 0.25])},
        S + element("given_slopes", sympy.Mod(H, 2)) * KV,
        True,
    ),
    "slopes in two axes": (
        lambda q, k, v, slopes: (
            (
                (q.unflatten(1, (KV_HEADS, -1)) @ k[:, :, None].mT)
                + slopes.view(KV_HEADS, -1, 1, 1) * slots()
            ).softmax(-1)
            @ v[:, :, None]
        ).flatten(1, 2),
        {"slopes": torch.tensor([0.5, 0.25, 0.7, 0.1])},
        S + slope * KV,
        True,
    ),
    "documents": (
        lambda q, k, v, doc, at: sdpa(
            q, k, v, (doc[:, rows(at)[:, 0], None] == doc[:, None])[:, None]
        ),
        {"doc": (slots() + torch.tensor([[0], [2]])) // 4, "at": torch.tensor(LENGTH)},
        scaled,
        sympy.Eq(
            element("given_doc", B, sympy.Mod(Q + at, KEYS), integer=True),
            element("given_doc", B, KV, integer=True),
        ),
    ),
    "documents from the end": (
        lambda q, k, v, doc, at: sdpa(
            q, k, v, (doc[:, (rows(at) - KEYS)[:, 0], None] == doc[:, None])[:, None]
        ),
        {"doc": (slots() + torch.tensor([[0], [2]])) // 4, "at": torch.tensor(LENGTH)},
        scaled,
        None,
    ),
    "soft-cap": (
        lambda q, k, v, at: (
            (20 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / 60))
            .masked_fill(slots() > rows(at), -torch.inf)
            .softmax(-1)
            @ v.repeat_interleave(2, 1)
        ),
        {"at": torch.tensor(LENGTH)},
        20.0 * sympy.tanh(20 / 60 / 20.0 * S),
        sympy.Le(KV, Q + at),
    ),
    "temperature and bias": (
        lambda q, k, v, tau, bias: (
            (q @ k.repeat_interleave(2, 1).mT * tau[:, None, None] + bias).softmax(-1)
            @ v.repeat_interleave(2, 1)
        ),
        {"tau": torch.rand(HEADS) + 0.5, "bias": bias_of((HEADS, QUERIES, KEYS))},
        S + head_bias,
        head_bias > HIDDEN,
    ),
    "sink": (
        lambda q, k, v, sinks: (
            torch.cat(
                (
                    q @ k.repeat_interleave(2, 1).mT,
                    sinks.view(1, -1, 1, 1).expand(BATCH, -1, QUERIES, 1),
                ),
                -1,
            ).softmax(-1)[..., :-1]
            @ v.repeat_interleave(2, 1)
        ),
        {"sinks": torch.randn(HEADS)},
        S,
        True,
    ),
}
