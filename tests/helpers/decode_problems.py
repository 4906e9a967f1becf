"""Small decode attentions: their specification for the code generator, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import (
    KV,
    AttentionSpec,
    B,
    Captured,
    H,
    Q,
    S,
    SparseSpec,
)
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.passes.symbolic.elementwise import Flag

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SCORES = ("scaled", "soft-cap", "slopes", "bias")
RANGES = ("none", "causal", "rows", "padded", "window")
MASKS = (*RANGES, "mask", "padding mask", "mask by head", "window and mask")
LAYOUTS = ("plain", "slots first", "channels first", "one head")
CAP, WINDOW, LOW = 3.0, 20, -9999.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of queries [B, Hkv * G, T, D], keys [B, Hkv, L, D] and values [B, Hkv, L, Dv]."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 4
    query_len: int = 1
    kv_len: int = 100
    head_dim: int = 64
    value_dim: int = 64


@dataclass(repr=False)
class Problem:
    """One attention: `spec` says to the code generator what `score` and `visible` are here."""

    spec: AttentionSpec
    query: Tensor
    key: Tensor
    value: Tensor
    captured: list[Tensor]
    extra: Tensor | None
    score: Callable[[Tensor, Tensor], Tensor]
    """Function from products [B, Hq, T, N], of queries and the keys in slots [N], to scores."""
    visible: Tensor
    """bool [B, Hq, T, L]."""

    def __repr__(self) -> str:
        shapes = [tuple(each.shape) for each in (self.query, self.key, self.value)]
        return f"Problem({self.spec}, query, key, value {shapes})"

    def module(self) -> ModuleType:
        """Return the generated module."""
        return module_cache.load(module_cache.store(emit_module(self.spec), self.spec.name).stem)

    def operands(self) -> AttentionOperands:
        """Return what a launch is given."""
        return AttentionOperands(self.query, self.key, self.value, self.captured, self.extra)

    def finish(self, products: Tensor, slots: Tensor) -> Tensor:
        """`score`, of products [B, Hkv, G, T, N]."""
        return self.score(products.flatten(1, 2), slots).unflatten(1, products.shape[1:3])

    def finish_scores(self) -> Tensor:
        """Return scores of all keys in float64, [B, Hq, T, L]."""
        return self._score(torch.float64)

    def attention(self, dtype: torch.dtype = torch.float64, read: Tensor | None = None) -> Tensor:
        """Return eager attention in `dtype` over the slots in `read`, bool [B, Hkv, T, L]."""
        visible, group = self.visible, self.spec.group
        if read is not None:
            visible = visible & read.repeat_interleave(group, 1)
        score = self._score(dtype).masked_fill(~visible, -torch.inf)
        if self.extra is not None:
            column = self.extra.to(dtype).expand(score.shape[:3])
            score = torch.cat((score, column[..., None]), -1)
        weight = score.to(torch.promote_types(dtype, torch.float32)).softmax(-1).to(dtype)
        weight = weight[..., : visible.shape[-1]].masked_fill(~visible, 0)
        return weight @ self.value.to(dtype).repeat_interleave(group, 1)

    def assert_as_good_as_eager(self, output: Tensor, read: Tensor | None = None) -> None:
        """No further from the truth than eager attention is, but for a rounding.

        The rounding is one of the result, and one in float32 of scores and of their soft-cap.
        """
        truth, eager = self.attention(read=read), self.attention(self.query.dtype, read)
        error, allowed = ((each - truth).abs().max() for each in (output, eager))
        half, single = torch.finfo(output.dtype).eps / 2, torch.finfo(torch.float32).eps
        score = self._score(torch.float64).masked_fill(~self.visible, 0)
        band = half * truth.abs().max()
        band += single * (CAP + score.abs().max()) * self.value.double().abs().max()
        assert output.isfinite().all()
        assert error <= allowed + band, f"off by {error:.2g}, eager {allowed:.2g}, band {band:.2g}"

    def _score(self, dtype: torch.dtype) -> Tensor:
        """Return scores [B, Hq, T, L]."""
        key = self.key.to(dtype).repeat_interleave(self.spec.group, 1)
        return self.score(self.query.to(dtype) @ key.mT, torch.arange(key.shape[2]))


def make_problem(
    dtype: str = "float32",
    sizes: Sizes = Sizes(),
    score: str = "scaled",
    mask: str = "causal",
    extra: bool = False,
    layout: str = "plain",
    sparse: SparseSpec | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Problem:
    """Return an attention with random contents, whose queries are at the slots from `length` on."""
    random = torch.Generator().manual_seed(seed)
    length = sizes.kv_len - sizes.query_len if length is None else length
    heads = sizes.kv_heads * sizes.group
    finish, score_form, read = _score(score, sizes, random)
    visible, visible_form, looked_at = _mask(mask, sizes, length, random)
    tensors = read | looked_at
    if score == "bias":
        visible, seen = visible & (read["bias"] > LOW), element("bias", B, H, Q, KV) > LOW
        visible_form = sympy.And(visible_form, seen)
    spec = AttentionSpec(
        dtype,
        sizes.group,
        sizes.head_dim,
        sizes.value_dim,
        score_form,
        visible_form,
        tuple(
            Captured(name, str(tensor.dtype).removeprefix("torch."), tensor.ndim)
            for name, tensor in tensors.items()
        ),
        extra,
        sparse,
    )
    query = 1.5 * torch.randn(sizes.batch, sizes.query_len, heads, sizes.head_dim, generator=random)
    value = torch.randn(
        sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.value_dim, generator=random
    )
    return Problem(
        spec,
        query.to(DTYPES[dtype]).transpose(1, 2),
        laid_out(keys(sizes, random).to(DTYPES[dtype]), layout),
        laid_out(value.to(DTYPES[dtype]), layout),
        list(tensors.values()),
        torch.randn(heads, 1, generator=random) if extra else None,
        finish,
        visible,
    )


def keys(sizes: Sizes, random: torch.Generator) -> Tensor:
    """Return keys [B, Hkv, L, D] as models have them: near a subspace, away from the origin."""
    spaces, dim = (sizes.batch, sizes.kv_heads), sizes.head_dim
    rank = dim // 4
    inside = torch.randn(*spaces, sizes.kv_len, rank, generator=random)
    axes = torch.randn(*spaces, rank, dim, generator=random) / math.sqrt(rank)
    noise = 0.3 * torch.randn(*spaces, sizes.kv_len, dim, generator=random)
    return inside @ axes + noise + 2 * torch.randn(*spaces, 1, dim, generator=random)


def laid_out(cache: Tensor, layout: str) -> Tensor:
    """Return the same numbers [B, Hkv, L, D] with other strides, and NaN around them."""
    order = {"slots first": (0, 2, 1, 3), "channels first": (0, 1, 3, 2)}.get(layout, (0, 1, 2, 3))
    if layout == "one head":
        return laid_out(cache[:, :1], "plain").expand(cache.shape)
    moved = cache.permute(order)
    room = torch.full([size + 3 for size in moved.shape], torch.nan, dtype=cache.dtype)
    room[tuple(slice(1, size + 1) for size in moved.shape)] = moved
    return room[tuple(slice(1, size + 1) for size in moved.shape)].permute(order)


def element(name: str, *indices: Any) -> sympy.Expr:
    """Return an element of a captured tensor."""
    return sympy.Indexed(sympy.IndexedBase(name), *indices)


def _whole(name: str, *indices: Any) -> sympy.Expr:
    """Return an element of a captured tensor of integers."""
    return sympy.Indexed(sympy.IndexedBase(sympy.Symbol(name, integer=True)), *indices)


def _score(
    kind: str, sizes: Sizes, random: torch.Generator
) -> tuple[Callable[[Tensor, Tensor], Tensor], sympy.Expr, dict[str, Tensor]]:
    """Return scores as a function of products and slots, as an expression, and its tensors."""
    scale, heads = 1 / math.sqrt(sizes.head_dim), sizes.kv_heads * sizes.group
    scaled = S * scale
    if kind == "soft-cap":
        capped = CAP * sympy.tanh(scaled / CAP)
        return lambda s, _: CAP * torch.tanh(s * scale / CAP), capped, {}
    if kind == "slopes":
        slopes = torch.rand(heads, generator=random) / 4
        late = torch.arange(sizes.query_len)[:, None]

        def sloped(s: Tensor, slots: Tensor) -> Tensor:
            return s * scale + (slopes[:, None, None] * (slots - late)).to(s.dtype)

        return sloped, scaled + element("slopes", H) * (KV - Q), {"slopes": slopes}
    if kind == "bias":
        shape = (sizes.batch, 1, sizes.query_len, sizes.kv_len)
        bias = torch.randn(shape, generator=random)
        hidden = torch.rand(shape, generator=random) < 0.2
        hidden[..., : sizes.kv_len // 9] = True  # as padding is
        bias = bias.masked_fill(hidden, torch.finfo(torch.float32).min)
        bias = bias.expand(-1, heads, -1, -1)
        form = scaled + element("bias", B, H, Q, KV)
        return lambda s, slots: s * scale + bias[..., slots].to(s.dtype), form, {"bias": bias}
    return lambda s, _: s * scale, scaled, {}


def _mask(
    kind: str, sizes: Sizes, length: int, random: torch.Generator
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Return what is visible as a tensor, as an expression, and the tensors of the expression."""
    shape = (sizes.batch, sizes.kv_heads * sizes.group, sizes.query_len, sizes.kv_len)
    slot, late = torch.arange(sizes.kv_len), torch.arange(sizes.query_len)[:, None]
    last = sympy.Symbol("length", integer=True)
    if kind == "none":
        return torch.ones(shape, dtype=torch.bool), sympy.true, {}
    if kind == "causal":
        return (slot <= late + length).expand(shape), Q + last >= KV, _named(length)
    if kind == "rows":  # a length for every row of the batch
        lengths = length - torch.arange(sizes.batch) * 5
        seen = slot <= late + lengths[:, None, None, None]
        return seen.expand(shape), _whole("lengths", B) + Q >= KV, {"lengths": lengths}
    if kind == "window":
        seen = (slot <= late + length) & (slot > late + length - WINDOW)
        form = sympy.And(Q + last >= KV, Q + last - WINDOW < KV)
        return seen.expand(shape), form, _named(length)
    if kind == "padded":
        starts = torch.arange(sizes.batch) * 7 + 3
        form = sympy.And(_whole("starts", B) <= KV, Q + last >= KV)
        seen = (slot >= starts[:, None, None, None]) & (slot <= late + length)
        return seen.expand(shape), form, {"starts": starts} | _named(length)
    by_head = kind == "mask by head"
    seen = torch.rand(shape if by_head else (shape[0], 1, *shape[2:]), generator=random) < 0.6
    if kind == "padding mask":
        seen = slot >= (torch.arange(sizes.batch) * 70 + 3)[:, None, None, None]
    seen = seen & (slot <= late + length)
    seen[0, 0, -1, sizes.kv_len // 3 :] &= sizes.kv_len % 2 == 0  # holes of whole tiles
    form, flags = Flag(element("mask", B, H if by_head else 0, Q, KV)), {"mask": seen}
    if kind != "window and mask":
        return seen.expand(shape), form, flags
    seen = seen & (slot > late + length - WINDOW)
    return seen.expand(shape), sympy.And(form, Q + last - WINDOW < KV), flags | _named(length)


def _named(length: int) -> dict[str, Tensor]:
    return {"length": torch.tensor(length)}
