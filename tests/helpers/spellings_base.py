"""Spellings of attention: how each is called, and what it means, worked out apart from it.

Axes are named as in einops: `b` batch, `h` heads, `t` tokens, `d` head_dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Given = dict[str, Tensor]
BATCH, DIM = 2, 16
WINDOW, PREFIX = 12, 9
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Spelling:
    """Attention written by hand, as a function of queries, keys, values and what else it names.

    The rest of its parameters are looked up by name: `seen`, bool [Tq, L], is the causal mask,
    `positions`, int [Tq], are the slots of the queries, and the others are in `constants`.
    """

    call: Callable[..., Tensor]
    query_heads: int = 4
    kv_heads: int = 4
    head_dim: int = DIM
    value_head_dim: int = DIM
    layout: str = "b h t d"
    """Axes of query, key and value, and so of a cache."""
    output: str = "b h t d"
    dtype: torch.dtype = torch.float32
    scale: float = DIM**-0.5
    score: Callable[[Tensor, Given], Tensor] | None = None
    """Function from s = q.k, [B, Hq, Tq, L], to the scores; None stands for scale * s."""
    sees: Callable[[Given], Tensor] | None = None
    """Keys that a query sees, broadcastable to [B, Hq, Tq, L]; None stands for `seen`."""
    sink: str = ""
    """The constant, [Hq], that joins the softmax as an extra logit."""
    mask: str = "causal"
    """Words of the report on the mask in a prefill, or a part of them."""
    opaque: bool = False
    """True if the report's expressions name tensors that are computed on the way."""
    one_query: bool = False
    """True if it is written for a single query token."""
    folded: bool = False
    """True if query heads could as well be query tokens when there is one token."""
    cross: bool = False
    """True if it reads the keys of another sequence, which a step does not write."""
    may_stay: bool = False
    """True if it may be left as it is when it decodes."""

    @property
    def name(self) -> str:
        """The function's name."""
        return self.call.__name__

    @property
    def needs(self) -> list[str]:
        """Names of what it takes besides query, key and value."""
        return list(inspect.signature(self.call).parameters)[3:]

    @property
    def token_axis(self) -> int:
        """Axis of query, key and value that counts the tokens."""
        return self.layout.split().index("t")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, given: Given) -> Tensor:
        """Attend; `given` holds at least what it needs."""
        return self.call(query, key, value, **given)

    def tensors(self, heads: int, tokens: int, head_dim: int) -> Tensor:
        """Return random [B, heads, tokens, head_dim], laid out as the spelling takes it."""
        made = torch.randn(BATCH, heads, tokens, head_dim).to(self.dtype)
        return made if self.token_axis == 2 else made.transpose(1, 2).contiguous()

    def operands(self, query_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return random query, key and value."""
        return (
            self.tensors(self.query_heads, query_len, self.head_dim),
            self.tensors(self.kv_heads, kv_len, self.head_dim),
            self.tensors(self.kv_heads, kv_len, self.value_head_dim),
        )

    def held(self, kv_len: int) -> Given:
        """Return the constants that it needs."""
        made = constants(self.query_heads, kv_len)
        return {name: made[name].clone() for name in self.needs if name in made}

    def given(self, positions: Tensor, kv_len: int, held: Given) -> Given:
        """Return all that it needs, for queries at `positions`."""
        made = {"seen": causal(positions, kv_len), "positions": positions}
        return {name: made[name] for name in self.needs if name in made} | held

    def meaning(self, raw: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and visible keys by the formula, for products in float64 [B, Hq, Tq, L]."""
        kv_len = raw.shape[-1]
        given = constants(self.query_heads, kv_len)
        given |= {"seen": causal(positions, kv_len), "positions": positions}
        score = self.scale * raw if self.score is None else self.score(raw, given)
        seen = given["seen"] if self.sees is None else self.sees(given)
        return score, seen.expand_as(score)

    def plain(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Return the output by the formula, in float64: [B, Hq, Tq, Dv]."""
        if self.token_axis == 1:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        group = self.query_heads // self.kv_heads
        key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
        score, seen = self.meaning(query.double() @ key.transpose(-1, -2), positions)
        score = score.masked_fill(~seen, -math.inf)
        if self.sink:
            sink = constants(self.query_heads, key.shape[2])[self.sink].double()
            logit = sink[:, None, None].expand(*score.shape[:3], 1)
            return torch.cat((score, logit), -1).softmax(-1)[..., :-1] @ value
        return score.softmax(-1) @ value

    def heads_first(self, output: Tensor) -> Tensor:
        """Return an output of the spelling as [B, Hq, Tq, Dv]."""
        if self.output == "b h d":
            return output[:, :, None]
        if self.output == "b t (h d)":
            output = output.unflatten(-1, (self.query_heads, -1))
        return output if self.output == "b h t d" else output.transpose(1, 2)


def spelling(**facts: Any) -> Callable[[Callable[..., Tensor]], Spelling]:
    """Make a function a spelling with these facts."""
    return lambda call: Spelling(call, **facts)


def causal(positions: Tensor, kv_len: int) -> Tensor:
    """Return if queries at `positions`, int [Tq], see the keys: bool [Tq, L]."""
    return torch.arange(kv_len) <= positions[:, None]


def constants(query_heads: int, kv_len: int) -> Given:
    """Return tensors that spellings take besides operands and positions, the same in every call.

    `padding`, int [B, L], is 0 on keys that hold no token. `documents`, int [B, L], numbers the
    documents. `sinks`, `slopes` and `temperature` have one number for each query head. `table`,
    [32, Hq], is a bias for each distance. `bias`, [Hq, L, L], is a bias for each query and key.
    `tau` is 0-d.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    slot, row = torch.arange(kv_len), torch.arange(BATCH)[:, None]
    return {
        "padding": (~((slot > 0) & (slot <= 3 * row + 3))).long(),
        "documents": (slot + 3 * row) // 11,
        "sinks": normal(query_heads),
        "slopes": 2.0 ** -torch.arange(1.0, query_heads + 1),
        "temperature": 0.25 + normal(query_heads).abs(),
        "tau": torch.tensor(0.4),
        "table": normal(32, query_heads),
        "bias": normal(query_heads, kv_len, kv_len),
    }


def padded(given: Given) -> Tensor:
    """Return the keys that are no padding: bool [B, 1, 1, L]."""
    return given["padding"][:, None, None].bool()


def repeat_kv(x: Tensor, group: int) -> Tensor:
    """Repeat [B, Hkv, L, D] to [B, Hq, L, D], as transformers writes it."""
    batch, heads, tokens, dim = x.shape
    if group == 1:
        return x
    x = x[:, :, None, :, :].expand(batch, heads, group, tokens, dim)
    return x.reshape(batch, heads * group, tokens, dim)
