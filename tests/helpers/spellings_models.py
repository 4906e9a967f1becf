"""Attention of encoders, of vision and diffusion models, and of latent attention, as written."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_whole import join_heads, packed, sdpa, split_heads, whole
from torch import Tensor

PAD = torch.tensor([[1] * 24, [1] * 17 + [0] * 7])
"""The attention mask of a batch of two texts, int64 [2, 24]."""
HIDDEN = torch.where(PAD.bool(), 0.0, -math.inf)[:, None, None]


# Encoders of text and sound.


@whole((2, 24, 192), means=lambda x: packed(x, bias=HIDDEN), mask="padding")
def bert(qkv):
    query, key, value = (split_heads(x, 4) for x in qkv.chunk(3, -1))
    extended = (1.0 - PAD[:, None, None, :].to(qkv.dtype)) * torch.finfo(qkv.dtype).min
    attention_scores = torch.matmul(query, key.transpose(-1, -2))
    attention_scores = attention_scores / math.sqrt(16)
    attention_scores = attention_scores + extended
    attention_probs = F.softmax(attention_scores, dim=-1)
    context_layer = torch.matmul(attention_probs, value)
    context_layer = context_layer.permute(0, 2, 1, 3).contiguous()
    return context_layer.view(*context_layer.size()[:-2], 64)


@whole((2, 24, 192), means=lambda x: packed(x, bias=HIDDEN), mask="padding")
def distilbert(qkv):
    q, k, v = (split_heads(x, 4) for x in qkv.chunk(3, -1))
    q = q / math.sqrt(16)
    scores = torch.matmul(q, k.transpose(2, 3))
    mask = (PAD == 0).view(2, 1, 1, 24).expand_as(scores)
    scores = scores.masked_fill(mask, torch.tensor(torch.finfo(scores.dtype).min))
    weights = F.softmax(scores, dim=-1)
    return torch.matmul(weights, v).transpose(1, 2).contiguous().view(2, -1, 64)


def rel_shift(x: Tensor) -> Tensor:
    """Shift [B, H, T, 2T - 1] of relative positions to [B, H, T, T]."""
    b, h, t, wide = x.shape
    padded = torch.cat([torch.zeros(b, h, t, 1), x], dim=-1)
    return padded.view(b, h, wide + 1, t)[:, :, 1:].view_as(x)[..., :t]


@whole(
    (2, 4, 24, 16),
    (2, 4, 24, 16),
    (2, 4, 24, 16),
    (4, 47, 16),
    means=lambda q, k, v, p: sdpa(q, k, v, rel_shift(q @ p.mT) / 4 + HIDDEN),
    mask="",
)
def conformer(q, k, v, p):
    matrix_ac = torch.matmul(q, k.transpose(-2, -1))
    matrix_bd = rel_shift(torch.matmul(q, p.transpose(-2, -1)))
    scores = (matrix_ac + matrix_bd) / math.sqrt(16)
    mask = PAD.unsqueeze(1).unsqueeze(1).eq(0)
    scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    attn = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
    return torch.matmul(attn, v)


def _time_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


@whole(
    (12, 2, 4, 16),
    (24, 2, 4, 16),
    (24, 2, 4, 16),
    (12, 24, 2, 4),
    means=lambda q, k, v, bd: sdpa(
        *map(_time_first, (q, k, v)), bd.permute(2, 3, 0, 1) / 4
    ).permute(2, 0, 1, 3),
    mask="",
)
def transformer_xl(rw_head_q, w_head_k, w_head_v, BD):
    AC = torch.einsum("ibnd,jbnd->ijbn", (rw_head_q, w_head_k))
    attn_score = AC + BD
    attn_score.mul_(1 / 16**0.5)
    attn_prob = F.softmax(attn_score, dim=1)
    return torch.einsum("ijbn,jbnd->ibnd", (attn_prob, w_head_v))


@whole(
    (2, 24, 4, 16),
    (2, 24, 4, 16),
    (2, 24, 4, 16),
    (4, 24, 24),
    (2, 24, 4, 16),
    means=lambda q, k, v, pair, g: (
        sdpa(*(x.transpose(1, 2) for x in (q, k, v)), pair, scale=1.0).transpose(1, 2) * g.sigmoid()
    ),
    mask="",
)
def alphafold_gated(q, k, v, pair_bias, g):
    logits = torch.einsum("bqhc,bkhc->bhqk", q, k) + pair_bias
    weights = F.softmax(logits, dim=-1)
    weighted_avg = torch.einsum("bhqk,bkhc->bqhc", weights, v)
    return weighted_avg * torch.sigmoid(g)


# Vision.

WINDOWS, SHIFT = 4, 1
_region = torch.arange(4)[:, None].expand(4, 9) * 3 + torch.arange(9) // 3
SHIFT_MASK = torch.where(_region[:, :, None] == _region[:, None], 0.0, -100.0)
SHIFT_MASK[:3] = 0.0
"""Additive mask, float [windows, 9, 9]: 0 for patches that were neighbours before the shift."""


def _windows(bias: Tensor) -> Tensor:
    return bias[None] + SHIFT_MASK.repeat(2, 1, 1)[:, None]


@whole(
    (8, 9, 192),
    (4, 9, 9),
    means=lambda x, bias: packed(x, bias=_windows(bias)),
    mask="",
)
def swin_window(qkv, bias):
    B_, N, C = qkv.shape[0], qkv.shape[1], 64
    qkv = qkv.reshape(B_, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    q = q * 16**-0.5
    attn = q @ k.transpose(-2, -1)
    attn = attn + bias.unsqueeze(0)
    attn = attn.view(B_ // WINDOWS, WINDOWS, 4, N, N) + SHIFT_MASK.unsqueeze(1).unsqueeze(0)
    attn = attn.view(-1, 4, N, N)
    attn = F.softmax(attn, dim=-1)
    return (attn @ v).transpose(1, 2).reshape(B_, N, C)


def _partition(x: Tensor) -> Tensor:
    """Cut [B, 6, 6, C] into windows [B * 4, 9, C]."""
    x = x.view(x.shape[0], 2, 3, 2, 3, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, 9, x.shape[-1])


def _merge(x: Tensor) -> Tensor:
    x = x.view(-1, 2, 2, 3, 3, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 6, x.shape[-1])


def _shifted(x: Tensor, table: Tensor) -> Tensor:
    windows = _partition(torch.roll(x, (-SHIFT, -SHIFT), (1, 2)))
    bias = table[_offsets].view(9, 9, 4).permute(2, 0, 1)
    return torch.roll(_merge(packed(windows, bias=_windows(bias))), (SHIFT, SHIFT), (1, 2))


_offsets = (torch.arange(9)[:, None] - torch.arange(9) + 8).flatten()


@whole((2, 6, 6, 192), (17, 4), means=_shifted, mask="")
def torchvision_swin(x, relative_position_bias_table):
    x = torch.roll(x, shifts=(-SHIFT, -SHIFT), dims=(1, 2))
    x = x.view(2, 2, 3, 2, 3, 192)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(2 * WINDOWS, 9, 192)
    qkv = x.reshape(x.size(0), x.size(1), 3, 4, 16).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    q = q * (64 // 4) ** -0.5
    attn = q.matmul(k.transpose(-2, -1))
    bias = relative_position_bias_table[_offsets].view(9, 9, -1)
    attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
    attn = attn.view(x.size(0) // WINDOWS, WINDOWS, 4, x.size(1), x.size(1))
    attn = attn + SHIFT_MASK.unsqueeze(1).unsqueeze(0)
    attn = attn.view(-1, 4, x.size(1), x.size(1))
    attn = F.softmax(attn, dim=-1)
    attn = F.dropout(attn, p=0.0, training=True)
    x = attn.matmul(v).transpose(1, 2).reshape(x.size(0), x.size(1), 64)
    x = x.view(2, 2, 2, 3, 3, 64).permute(0, 1, 3, 2, 4, 5).reshape(2, 6, 6, 64)
    return torch.roll(x, shifts=(SHIFT, SHIFT), dims=(1, 2))


def _cosine(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return join_heads(sdpa(q * scale.clamp(max=4.6).exp(), k, v, scale=1.0))


@whole(
    (2, 24, 192),
    (4, 1, 1),
    means=lambda x, scale: _cosine(*(split_heads(part, 4) for part in x.chunk(3, -1)), scale),
)
def swin_v2_cosine(qkv, logit_scale):
    q, k, v = qkv.view(2, 24, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logit_scale = torch.clamp(logit_scale, max=4.6).exp()
    attn = (attn * logit_scale).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(2, 24, 64)


def _decomposed(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    grid = q.view(2, 4, 4, 6, 16)
    height = torch.einsum("bnhwc,hkc->bnhwk", grid, rel_h)[..., :, None]
    width = torch.einsum("bnhwc,wkc->bnhwk", grid, rel_w)[..., None, :]
    return (height + width).reshape(2, 4, 24, 24)


@whole(
    (2, 4, 24, 16),
    (2, 4, 24, 16),
    (2, 4, 24, 16),
    (4, 4, 16),
    (6, 6, 16),
    means=lambda q, k, v, h, w: sdpa(q, k, v, _decomposed(q, h, w)),
    mask="",
    heads=None,
)
def segment_anything(query, key, value, Rh, Rw):
    query, key, value = (x.reshape(8, 24, 16) for x in (query, key, value))
    attn = (query * 0.25) @ key.transpose(-2, -1)
    r_q = query.reshape(8, 4, 6, 16)
    rel_h = torch.einsum("bhwc,hkc->bhwk", r_q, Rh)
    rel_w = torch.einsum("bhwc,wkc->bhwk", r_q, Rw)
    attn = attn.view(8, 4, 6, 4, 6) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
    attn = attn.view(8, 24, 24).softmax(dim=-1)
    return (attn @ value).view(2, 4, 24, 16)


# Images as [B, C, H, W]: U-Nets, autoencoders, non-local networks.


def _pixels(x: Tensor) -> Tensor:
    """Flatten [B, C, H, W] to one head, [B, 1, H * W, C]."""
    return x.flatten(2).mT[:, None]


def _spatial(q: Tensor, k: Tensor, v: Tensor, **given: float) -> Tensor:
    out = sdpa(_pixels(q), _pixels(k), _pixels(v), **given)
    return out[:, 0].mT.unflatten(2, q.shape[2:])


IMAGES = ((2, 16, 4, 6), (2, 16, 4, 6), (2, 16, 4, 6))


@whole(*IMAGES, means=_spatial, heads=(1, 1))
def vae_attention_block(q, k, v):
    b, c, h, w = q.shape
    q = q.reshape(b, c, h * w).permute(0, 2, 1)
    k = k.reshape(b, c, h * w)
    w_ = torch.bmm(q, k) * (int(c) ** (-0.5))
    w_ = F.softmax(w_, dim=2)
    v = v.reshape(b, c, h * w)
    w_ = w_.permute(0, 2, 1)
    return torch.bmm(v, w_).reshape(b, c, h, w)


@whole(*IMAGES, means=lambda q, k, v: _spatial(q, k, v, scale=1.0), heads=(1, 1))
def sagan(q, k, v):
    B, C, H, W = q.shape
    proj_query = q.view(B, -1, W * H).permute(0, 2, 1)
    energy = torch.bmm(proj_query, k.view(B, -1, W * H))
    attention = torch.softmax(energy, dim=-1)
    return torch.bmm(v.view(B, -1, W * H), attention.permute(0, 2, 1)).view(B, C, H, W)


@whole(*IMAGES, means=lambda q, k, v: _spatial(q, k, v, scale=1.0), heads=(1, 1))
def non_local(theta_x, phi_x, g_x):
    theta = theta_x.view(2, 16, -1).permute(0, 2, 1)
    f = torch.matmul(theta, phi_x.view(2, 16, -1))
    y = torch.matmul(F.softmax(f, dim=-1), g_x.view(2, 16, -1).permute(0, 2, 1))
    return y.permute(0, 2, 1).contiguous().view(2, 16, 4, 6)


def _channels_packed(qkv: Tensor) -> Tensor:
    return packed(qkv.flatten(2).mT).mT


@whole((2, 192, 4, 6), means=_channels_packed)
def ddpm_lucidrains(qkv):
    b, _, h, w = qkv.shape
    q, k, v = (t.reshape(b, 4, 16, h * w) for t in qkv.chunk(3, dim=1))
    q = q * 16**-0.5
    sim = torch.einsum("b h d i, b h d j -> b h i j", q, k)
    attn = sim.softmax(dim=-1)
    out = torch.einsum("b h i j, b h d j -> b h i d", attn, v)
    return out.permute(0, 1, 3, 2).reshape(b, 64, h * w)


@whole((2, 192, 4, 6), means=_channels_packed)
def guided_diffusion(qkv):
    bs, width, length = qkv.shape[0], qkv.shape[1], 24
    q, k, v = qkv.reshape(bs, width, length).chunk(3, dim=1)
    ch = width // (3 * 4)
    scale = 1 / math.sqrt(math.sqrt(ch))
    weight = torch.einsum(
        "bct,bcs->bts",
        (q * scale).reshape(bs * 4, ch, length),
        (k * scale).reshape(bs * 4, ch, length),
    )
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    a = torch.einsum("bts,bcs->bct", weight, v.reshape(bs * 4, ch, length))
    return a.reshape(bs, -1, length)


@whole(
    (2, 24, 64),
    (2, 7, 64),
    (2, 7, 64),
    means=lambda q, k, v: join_heads(sdpa(*(split_heads(x, 4) for x in (q, k, v)))),
)
def stable_diffusion_cross(q, k, v):
    def fold(x: Tensor) -> Tensor:  # b n (h d) -> (b h) n d
        return x.view(2, -1, 4, 16).permute(0, 2, 1, 3).reshape(8, -1, 16)

    q, k, v = map(fold, (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * 0.25
    attn = sim.softmax(dim=-1)
    out = torch.einsum("b i j, b j d -> b i d", attn, v)
    return out.view(2, 4, -1, 16).permute(0, 2, 1, 3).reshape(2, -1, 64)


@whole((8, 24, 16), (8, 7, 16), (8, 7, 16), means=sdpa, heads=None)
def diffusers_attention_scores(query, key, value):
    buffer = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype)
    scores = torch.baddbmm(buffer, query, key.transpose(-1, -2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(dim=-1).to(query.dtype), value)


# Latent attention.


@whole(
    (2, 24, 4, 16),
    (2, 24, 4, 8),
    (2, 24, 4, 16),
    (2, 24, 1, 8),
    (2, 24, 4, 20),
    means=lambda qn, qp, kn, kp, v: join_heads(
        sdpa(
            torch.cat((qn, qp), -1).transpose(1, 2),
            torch.cat((kn, kp.expand(2, 24, 4, 8)), -1).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
        )
    ),
    head_dim=24,
    mask="causal",
)
def deepseek_mla(q_nope, q_pe, k_nope, k_pe, v):
    q = torch.cat([q_nope, q_pe], dim=-1)
    k = torch.cat([k_nope, k_pe.expand(-1, -1, 4, -1)], dim=-1)
    scores = torch.einsum("bshd,bthd->bsht", q, k) * 24**-0.5
    scores += torch.full((24, 24), float("-inf")).triu_(1).unsqueeze(1)
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,bthd->bshd", scores, v).flatten(2)


@whole(
    (2, 24, 4, 16),
    (2, 24, 4, 8),
    (2, 24, 16),
    (2, 24, 8),
    means=lambda qn, qp, kv, pe: sdpa(
        torch.cat((qn, qp), -1).transpose(1, 2),
        torch.cat((kv, pe), -1)[:, None],
        kv[:, None],
    ).transpose(1, 2),
    heads=None,
    head_dim=16,
    mask="",
)
def deepseek_mla_absorbed(q_nope, q_pe, kv_cache, pe_cache):
    scores = torch.einsum("bshc,btc->bsht", q_nope, kv_cache)
    scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, pe_cache)) * 24**-0.5
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q_nope)
    return torch.einsum("bsht,btc->bshc", scores, kv_cache)
