"""Attention without a cache, as a whole block has it: encoders, packed projections, other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """A function of tensors of some shapes in which all attentions are alike."""

    call: Callable[..., Tensor]
    shapes: tuple[Shape, ...]
    means: Callable[..., Tensor]
    """The same by `F.scaled_dot_product_attention`."""
    heads: tuple[int, int] | None = (4, 4)
    """Query heads and KV heads; None where heads and batch cannot be told apart."""
    head_dim: int = 16
    sites: int = 1
    mask: str = "none"
    """Words of the report on the mask, or a part of them."""

    @property
    def name(self) -> str:
        """The function's name."""
        return self.call.__name__

    def operands(self) -> list[Tensor]:
        """Return random inputs."""
        return [torch.randn(shape) for shape in self.shapes]


def whole(*shapes: Shape, **facts: Any) -> Callable[[Callable[..., Tensor]], Whole]:
    """Make a function of tensors of these shapes a `Whole`."""
    return lambda call: Whole(call, shapes, **facts)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split [B, T, H * D] into [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Join [B, H, T, D] to [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **given: Any) -> Tensor:
    """Attention, [B, H, T, D], in float64."""
    bias = None if bias is None else bias.double()
    out = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=bias, enable_gqa=q.dim() > 2, **given
    )
    return out.float()


def packed(x: Tensor, heads: int = 4, **given: Any) -> Tensor:
    """Attention of queries, keys and values side by side, [B, T, 3 * H * D]."""
    return join_heads(sdpa(*(split_heads(part, heads) for part in x.chunk(3, -1)), **given))


# Packed projections.


@whole((2, 24, 192), means=packed)
def timm_vit(qkv):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4).unbind(0)
    q = q * 16**-0.5
    attn = q @ k.transpose(-2, -1)
    attn = attn.softmax(dim=-1)
    attn = F.dropout(attn, 0.0, True)
    x = attn @ v
    return x.transpose(1, 2).reshape(B, N, C)


@whole((2, 24, 192), means=packed)
def deit_by_index(qkv):
    B, N, C = qkv.shape
    qkv = qkv.reshape(B, N, 3, 4, C // 12).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    attn = (q @ k.transpose(-2, -1)) * 0.25
    return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C // 3)


@whole((2, 24, 192), means=lambda x: packed(x, is_causal=True), mask="causal")
def nanogpt_split(qkv):
    B, T, C = qkv.shape[0], qkv.shape[1], 64
    q, k, v = qkv.split(C, dim=2)
    k = k.view(B, T, 4, C // 4).transpose(1, 2)
    q = q.view(B, T, 4, C // 4).transpose(1, 2)
    v = v.view(B, T, 4, C // 4).transpose(1, 2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
    att = F.softmax(att, dim=-1)
    return (att @ v).transpose(1, 2).contiguous().view(B, T, C)


@whole((2, 24, 192), means=packed)
def lucidrains_chunk(qkv):
    q, k, v = (t.unflatten(-1, (4, 16)).permute(0, 2, 1, 3) for t in qkv.chunk(3, dim=-1))
    dots = torch.matmul(q, k.transpose(-1, -2)) * 16**-0.5
    out = torch.matmul(torch.softmax(dots, -1), v)
    return out.permute(0, 2, 1, 3).reshape(qkv.shape[0], -1, 64)


@whole(
    (2, 24, 4, 48),
    means=lambda x: join_heads(sdpa(*(part.transpose(1, 2) for part in x.chunk(3, -1)))),
)
def gpt_neox_packing(qkv):
    query, key, value = qkv.transpose(1, 2).chunk(3, dim=-1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * 16**-0.5
    return torch.matmul(F.softmax(scores, -1), value).transpose(1, 2).reshape(2, 24, -1)


@whole(
    (2, 24, 6 * 16),
    means=lambda x: join_heads(sdpa(*split_heads(x, 6).split((4, 1, 1), 1))),
    heads=(4, 1),
)
def falcon_packing(fused_qkv):
    fused_qkv = fused_qkv.view(2, 24, 6, 16)
    query, key, value = fused_qkv[..., :-2, :], fused_qkv[..., [-2], :], fused_qkv[..., [-1], :]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attention_scores = query @ key.transpose(-1, -2)
    attention_scores /= math.sqrt(16)
    attention_scores = F.softmax(attention_scores, dim=-1, dtype=torch.float32)
    return (attention_scores @ value).permute(0, 2, 1, 3).reshape(2, 24, 64)


@whole((2, 24, 192), means=packed)
def packed_by_select(qkv):
    qkv = qkv.view(2, 24, 3, 4, 16)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv.select(2, 2)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


@whole((2, 24, 64), (192, 64), means=lambda x, weight: packed(x @ weight.T / 8))
def projected(x, weight):
    q, k, v = F.linear(x, weight / 8).view(2, 24, 3, 4, 16).permute(2, 0, 3, 1, 4)
    return join_heads((q @ k.mT / 4).softmax(-1) @ v)


# Fewer axes, or more.


@whole((24, 16), (30, 16), (30, 16), means=sdpa, heads=(1, 1))
def unbatched_two_axes(q, k, v):
    return torch.softmax(q @ k.T / 4, dim=-1) @ v


@whole((24, 16), (30, 16), (30, 16), means=sdpa, heads=(1, 1))
def unbatched_linear(q, k, v):
    return F.linear(F.softmax(F.linear(q, k) * 0.25, -1), v.T)


@whole((24, 16), (30, 16), (30, 16), means=sdpa, heads=(1, 1))
def unbatched_mm(q, k, v):
    return torch.mm(F.softmax(torch.mm(q, k.t()).div(4), dim=1), v)


@whole((24, 16), (30, 16), (30, 16), means=sdpa, heads=(1, 1))
def unbatched_inner(q, k, v):
    return torch.inner(q, k).mul(0.25).softmax(1).matmul(v)


@whole((24, 16), (30, 16), (30, 16), means=sdpa, heads=(1, 1))
def unbatched_tensordot(q, k, v):
    weights = torch.softmax(torch.tensordot(q, k, dims=([1], [1])) / 4, 1)
    return torch.tensordot(weights, v, dims=1)


@whole((24, 16), (30, 16), (30, 16), (24, 30), means=sdpa, heads=(1, 1), mask="")
def unbatched_addmm(q, k, v, bias):
    return torch.softmax(torch.addmm(bias, q, k.t(), alpha=0.25), -1) @ v


@whole((4, 24, 16), (4, 30, 16), (4, 30, 16), means=sdpa, heads=None)
def unbatched_three_axes(q, k, v):
    return torch.einsum("hqk,hkd->hqd", (torch.einsum("hqd,hkd->hqk", q, k) / 4).softmax(-1), v)


@whole(
    (24, 16),
    (3, 16, 16),
    means=lambda x, w: sdpa(x @ w[0] / 4, x @ w[1] / 4, x @ w[2]),
    heads=(1, 1),
)
def raschka_from_scratch(x, weights):
    queries, keys, values = x @ weights[0] / 4, x @ weights[1] / 4, x @ weights[2]
    attn_scores = queries @ keys.T
    attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
    return attn_weights @ values


@whole((2, 24, 16), means=lambda x: sdpa(x, x, x, scale=1.0), heads=(1, 1))
def queries_are_keys_are_values(x):
    return torch.bmm(F.softmax(torch.bmm(x, x.transpose(1, 2)), dim=2), x)


@whole(
    (2, 24, 192),
    means=lambda x: packed(x, is_causal=True),
    heads=(1, 1),
    sites=4,
    mask="causal",
)
def karpathy_heads_in_a_loop(qkv):
    out = []
    for head in range(4):
        q, k, v = (part[..., 16 * head : 16 * (head + 1)] for part in qkv.chunk(3, -1))
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(torch.tril(torch.ones(24, 24)) == 0, float("-inf"))
        out.append(F.softmax(wei, dim=-1) @ v)
    return torch.cat(out, dim=-1)


@whole(
    (2, 24, 64),
    (2, 30, 64),
    means=lambda q, kv: join_heads(sdpa(*(split_heads(x, 4) for x in (q, kv, kv)), scale=1 / 8)),
    heads=None,
)
def set_transformer(Q, K):
    Q_, K_, V_ = (torch.cat(x.split(16, 2), 0) for x in (Q, K, K))
    A = torch.softmax(Q_.bmm(K_.transpose(1, 2)) / math.sqrt(64), 2)
    return torch.cat(A.bmm(V_).split(Q.size(0), 0), 2)


@whole((2, 3, 4, 24, 16), (2, 3, 4, 30, 16), (2, 3, 4, 30, 16), means=sdpa, heads=None)
def flamingo_resampler(q, k, v):
    q = q * 16**-0.5
    sim = torch.einsum("... i d, ... j d -> ... i j", q, k)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    attn = sim.softmax(dim=-1)
    return torch.einsum("... i j, ... j d -> ... i d", attn, v)


@whole(
    (2, 4, 6, 8, 16),
    (2, 4, 6, 8, 16),
    (2, 4, 6, 8, 16),
    means=lambda q, k, v: sdpa(*(x.permute(0, 1, 3, 2, 4) for x in (q, k, v))).transpose(2, 3),
    heads=None,
)
def axial_over_columns(q, k, v):
    attn = torch.einsum("bhiwd,bhjwd->bhwij", q, k).div(4).softmax(-1)
    return torch.einsum("bhwij,bhjwd->bhiwd", attn, v)


@whole(
    (2, 5 * 6, 192),
    means=lambda x: packed(x.view(2, 5, 6, 192).transpose(1, 2).flatten(0, 1)),
    heads=None,
)
def timesformer_over_frames(qkv):
    def fold(x: Tensor) -> Tensor:  # b (f n) (h d) -> (b n h) f d
        return x.view(2, 5, 6, 4, 16).permute(0, 2, 3, 1, 4).reshape(-1, 5, 16)

    q, k, v = map(fold, qkv.chunk(3, dim=-1))
    attn = torch.einsum("b i d, b j d -> b i j", q * 0.25, k).softmax(dim=-1)
    out = torch.einsum("b i j, b j d -> b i d", attn, v)
    return out.view(12, 4, 5, 16).transpose(1, 2).reshape(12, 5, 64)
