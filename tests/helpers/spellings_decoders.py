"""Attention as the code bases of language models write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import WINDOW, padded, repeat_kv, spelling
from torch import Tensor, nn

_drop = nn.Dropout(0.1).eval()


@spelling(output="b t (h d)")
def nanogpt(q, k, v, positions):
    size = k.size(-2)
    bias = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(bias[:, :, positions, :size] == 0, float("-inf"))
    att = F.softmax(att, dim=-1)
    att = F.dropout(att, p=0.1, training=False)
    y = att @ v
    return y.transpose(1, 2).contiguous().view(q.size(0), q.size(2), -1)


@spelling()
def mingpt(q, k, v, seen):
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(seen.int()[None, None] == 0, float("-inf"))
    return _drop(F.softmax(att, dim=-1)) @ v


@spelling(kv_heads=2)
def gpt_fast(q, k, v, seen):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = torch.where(seen[None, None], scores, -float("inf"))
    return torch.matmul(F.softmax(scores, dim=-1), v)


@spelling()
def torch_documentation(query, key, value, seen):
    """The equivalent that the documentation of scaled_dot_product_attention gives."""
    scale_factor = 1 / math.sqrt(query.size(-1))
    attn_bias = torch.zeros(query.size(-2), key.size(-2), dtype=query.dtype)
    attn_bias.masked_fill_(seen.logical_not(), float("-inf"))
    attn_weight = query @ key.transpose(-2, -1) * scale_factor
    attn_weight += attn_bias
    attn_weight = torch.softmax(attn_weight, dim=-1)
    attn_weight = torch.dropout(attn_weight, 0.0, train=True)
    return attn_weight @ value


@spelling(kv_heads=2, layout="b t h d", output="b t (h d)", dtype=torch.bfloat16)
def meta_llama(xq, keys, values, seen):
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    bsz, seqlen, n_heads, head_dim = xq.shape
    n_rep = n_heads // keys.shape[2]
    keys, values = _repeat_before_transpose(keys, n_rep), _repeat_before_transpose(values, n_rep)
    xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(head_dim)
    scores = scores + mask
    scores = F.softmax(scores.float(), dim=-1).type_as(xq)
    output = torch.matmul(scores, values)
    return output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)


def _repeat_before_transpose(x: Tensor, n_rep: int) -> Tensor:
    bsz, slen, n_kv_heads, head_dim = x.shape
    wide = x[:, :, :, None, :].expand(bsz, slen, n_kv_heads, n_rep, head_dim)
    return wide.reshape(bsz, slen, n_kv_heads * n_rep, head_dim)


@spelling(kv_heads=2, output="b t h d", dtype=torch.bfloat16)
def hf_eager(query, key, value, seen):
    mask = torch.where(seen, 0.0, torch.finfo(query.dtype).min).to(query.dtype)[None, None]
    key_states = repeat_kv(key, query.shape[1] // key.shape[1])
    value_states = repeat_kv(value, query.shape[1] // value.shape[1])
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * 0.25
    attn_weights = attn_weights + mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=0.0, training=True)
    attn_output = torch.matmul(attn_weights, value_states)
    return attn_output.transpose(1, 2).contiguous()


@spelling()
def gpt_neox_baddbmm(query, key, value, seen):
    batch, heads, query_length, dim = query.size()
    key_length = key.size(-2)
    query = query.view(batch * heads, query_length, dim)
    key = key.view(batch * heads, key_length, dim)
    attn_scores = torch.zeros(batch * heads, query_length, key_length, dtype=query.dtype)
    attn_scores = torch.baddbmm(
        attn_scores, query, key.transpose(1, 2), beta=1.0, alpha=1.0 / math.sqrt(dim)
    )
    attn_scores = attn_scores.view(batch, heads, query_length, key_length)
    mask_value = torch.tensor(torch.finfo(attn_scores.dtype).min, dtype=attn_scores.dtype)
    attn_scores = torch.where(seen, attn_scores, mask_value)
    attn_weights = F.softmax(attn_scores, dim=-1).to(value.dtype)
    return torch.matmul(attn_weights, value)


@spelling(
    score=lambda s, given: s / 4 + given["slopes"][:, None, None] * torch.arange(s.shape[-1]),
)
def bloom_alibi_baddbmm(query, key, value, slopes, seen):
    batch, heads, q_length, dim = query.shape
    alibi = slopes[..., None] * torch.arange(key.shape[2])[None]
    alibi = alibi[None].expand(batch, -1, -1).reshape(batch * heads, 1, -1).to(query.dtype)
    query = query.reshape(batch * heads, -1, dim)
    key = key.transpose(-1, -2).reshape(batch * heads, dim, -1)
    value = value.reshape(batch * heads, -1, dim)
    attention_scores = alibi.baddbmm(batch1=query, batch2=key, beta=1.0, alpha=dim**-0.5)
    attn_weights = attention_scores.view(batch, heads, q_length, -1)
    attn_weights = attn_weights.masked_fill(~seen, torch.finfo(query.dtype).min)
    probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    probs = probs.view(batch * heads, q_length, -1)
    return torch.bmm(probs, value).view(batch, heads, q_length, dim)


@spelling(output="b t (h d)")
def opt_folded(query, key, value, seen):
    bsz, heads, tgt_len, dim = query.shape
    mask = torch.zeros(1, 1, *seen.shape).masked_fill_(~seen, torch.finfo(query.dtype).min)
    query_states = (query * dim**-0.5).view(bsz * heads, tgt_len, dim)
    key_states, value_states = key.view(bsz * heads, -1, dim), value.view(bsz * heads, -1, dim)
    attn_weights = torch.bmm(query_states, key_states.transpose(1, 2))
    attn_weights = attn_weights.view(bsz, heads, tgt_len, -1) + mask
    attn_weights = torch.max(attn_weights, torch.tensor(torch.finfo(attn_weights.dtype).min))
    attn_weights = attn_weights.view(bsz * heads, tgt_len, -1)
    attn_weights = F.softmax(attn_weights, dim=-1)
    attn_probs = F.dropout(attn_weights, p=0.1, training=False)
    attn_output = torch.bmm(attn_probs, value_states)
    attn_output = attn_output.view(bsz, heads, tgt_len, dim).transpose(1, 2)
    return attn_output.reshape(bsz, tgt_len, heads * dim)


@spelling(dtype=torch.float16)
def gpt_j(query, key, value, seen):
    query, key = query.to(torch.float32), key.to(torch.float32)
    attn_weights = torch.matmul(query, key.transpose(-1, -2))
    mask_value = torch.finfo(attn_weights.dtype).min
    mask_value = torch.tensor(mask_value, dtype=attn_weights.dtype)
    attn_weights = torch.where(seen, attn_weights, mask_value)
    attn_weights = attn_weights / torch.sqrt(torch.tensor(16, dtype=torch.float32))
    attn_weights = nn.functional.softmax(attn_weights, dim=-1)
    return torch.matmul(attn_weights.to(value.dtype), value)


@spelling()
def gpt2(query, key, value, seen):
    attn_weights = torch.matmul(query, key.transpose(-1, -2))
    attn_weights = attn_weights / torch.full([], value.size(-1) ** 0.5, dtype=query.dtype)
    mask_value = torch.full([], torch.finfo(attn_weights.dtype).min, dtype=attn_weights.dtype)
    attn_weights = torch.where(seen, attn_weights.to(attn_weights.dtype), mask_value)
    attn_weights = F.softmax(attn_weights, dim=-1).type(value.dtype)
    return torch.matmul(attn_weights, value)


@spelling(
    scale=1.0,
    sees=lambda given: (
        given["seen"]
        & (given["positions"][:, None] - torch.arange(given["seen"].shape[-1]) < WINDOW)
    ),
    mask="window",
)
def gpt_neo_local(query, key, value, positions):
    size = key.shape[-2]
    bias = torch.tril(torch.ones((size, size), dtype=torch.bool)).view(1, 1, size, size)
    bias = torch.bitwise_xor(bias, torch.tril(bias, -WINDOW))
    attn_weights = torch.matmul(query.float(), key.float().transpose(-1, -2))
    mask_value = torch.tensor(torch.finfo(torch.float32).min)
    attn_weights = torch.where(bias[:, :, positions], attn_weights, mask_value)
    attn_weights = F.softmax(attn_weights, dim=-1).to(value.dtype)
    return torch.matmul(attn_weights, value)


@spelling(kv_heads=1, folded=True)
def gpt_bigcode_multi_query(query, key, value, seen):
    batch, heads, query_length, dim = query.shape
    key, value = key.squeeze(1), value.squeeze(1)
    key_length = key.size(-2)
    query = query.transpose(1, 2).reshape(batch, query_length * heads, dim)
    attn_weights = torch.empty((batch, query_length * heads, key_length), dtype=query.dtype)
    attn_weights = torch.baddbmm(
        attn_weights, query, key.transpose(-1, -2), beta=0, alpha=dim**-0.5
    ).view(batch, query_length, heads, key_length)
    mask_value = torch.full([], torch.finfo(query.dtype).min, dtype=query.dtype)
    attn_weights = torch.where(seen[None, :, None], attn_weights, mask_value)
    attn_weights = F.softmax(attn_weights, dim=-1)
    attn_output = torch.bmm(attn_weights.view(batch, query_length * heads, key_length), value)
    return attn_output.view(batch, query_length, heads, dim).transpose(1, 2)


@spelling(
    kv_heads=1,
    score=lambda s, given: (
        (s + given["slopes"][:, None, None] * torch.arange(s.shape[-1])) / math.sqrt(16)
    ),
)
def falcon_alibi(query, key, value, slopes, seen):
    alibi = slopes[:, None, None] * torch.arange(key.shape[-2])
    attention_scores = query @ key.transpose(-1, -2)
    attention_logits = attention_scores + alibi[None]
    attention_logits *= 1.0 / math.sqrt(query.shape[-1])
    mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -1e9)
    attention_probs = F.softmax(attention_logits + mask, dim=-1, dtype=query.dtype)
    return (attention_probs @ value).flatten(0, 1).unflatten(0, query.shape[:2])


@spelling(
    score=lambda s, given: (
        s / 4 + given["slopes"][:, None, None] * torch.arange(1 - s.shape[-1], 1)
    ),
    dtype=torch.bfloat16,
)
def mpt_alibi(query_states, key_states, value_states, slopes, seen):
    length = key_states.shape[2]
    position_bias = torch.arange(1 - length, 1, dtype=torch.int32).view(1, 1, length)
    position_bias = position_bias * slopes.view(-1, 1, 1)
    attention_scores = torch.matmul(query_states, key_states.transpose(-1, -2)) * 0.25
    attention_scores = attention_scores + position_bias
    attention_scores = attention_scores.masked_fill(~seen, torch.finfo(query_states.dtype).min)
    attn_weights = F.softmax(attention_scores.float(), dim=-1).to(value_states.dtype)
    return torch.matmul(attn_weights, value_states)


@spelling(
    kv_heads=2,
    output="b t h d",
    score=lambda s, given: 50 * torch.tanh(s / 4 / 50),
)
def gemma2_soft_cap(query, key, value, seen):
    softcap, scaling = 50.0, query.shape[-1] ** -0.5
    key_states, value_states = repeat_kv(key, 2), repeat_kv(value, 2)
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    attn_weights = attn_weights / softcap
    attn_weights = torch.tanh(attn_weights)
    attn_weights = attn_weights * softcap
    mask = torch.full(seen.shape, torch.finfo(torch.float32).min).masked_fill(seen, 0.0)
    attn_weights = attn_weights + mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(attn_weights, value_states).transpose(1, 2).contiguous()


@spelling(kv_heads=2, output="b t h d", sink="sinks")
def gpt_oss_sinks(query, key, value, sinks, seen):
    key_states, value_states = repeat_kv(key, 2), repeat_kv(value, 2)
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * 0.25
    attn_weights = attn_weights + torch.where(seen, 0.0, torch.finfo(query.dtype).min)
    sinks = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    combined_logits = torch.cat([attn_weights, sinks], dim=-1)
    combined_logits = combined_logits - combined_logits.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)
    scores = probs[..., :-1]
    attn_weights = F.dropout(scores, p=0.0, training=False).to(value_states.dtype)
    return torch.matmul(attn_weights, value_states).transpose(1, 2).contiguous()


@spelling(dtype=torch.float16)
def phi_upcast(query_states, key_states, value_states, seen):
    mask = torch.zeros(seen.shape, dtype=torch.float32).masked_fill(~seen, -math.inf)
    attn_weights = torch.matmul(
        query_states.to(torch.float32), key_states.to(torch.float32).transpose(2, 3)
    ) / math.sqrt(16)
    attn_weights = attn_weights + mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32)
    attn_weights = attn_weights.to(value_states.dtype)
    return torch.matmul(attn_weights, value_states)


@spelling(layout="b t h d", output="b t (h d)")
def megatron(query, key, value, seen):
    # [sq, b, np, hn]: tokens come first.
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    sq, b, np, hn = query.shape
    sk = key.shape[0]
    query, key = query.reshape(sq, b * np, hn), key.reshape(sk, b * np, hn)
    buffer = torch.empty(b * np, sq, sk, dtype=query.dtype)
    scores = torch.baddbmm(
        buffer, query.transpose(0, 1), key.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=0.25
    )
    scores = scores.view(b, np, sq, sk)
    scores = scores.masked_fill(~seen, -10000.0)
    probs = nn.Softmax(dim=-1)(scores).view(b * np, sq, sk)
    context = torch.bmm(probs, value.reshape(sk, b * np, hn).transpose(0, 1))
    context = context.view(b, np, sq, hn).permute(2, 0, 1, 3).contiguous()
    return context.view(sq, b, np * hn).transpose(0, 1)


@spelling(layout="b t h d", output="b t (h d)", dtype=torch.float16)
def fairseq(q, k, v, positions):
    bsz, tgt_len, heads, dim = q.shape
    src_len = k.shape[1]
    q = (q * dim**-0.5).transpose(1, 2).reshape(bsz * heads, tgt_len, dim)
    k = k.transpose(1, 2).reshape(bsz * heads, src_len, dim)
    v = v.transpose(1, 2).reshape(bsz * heads, src_len, dim)
    attn_weights = torch.bmm(q, k.transpose(1, 2))
    attn_mask = torch.triu(torch.full((src_len, src_len), float("-inf")), 1)
    attn_mask = attn_mask[positions].to(q.dtype)
    attn_weights += attn_mask.unsqueeze(0)
    attn_weights_float = F.softmax(attn_weights, dim=-1, dtype=torch.float32)
    attn_probs = _drop(attn_weights_float.type_as(attn_weights))
    attn = torch.bmm(attn_probs, v)
    return attn.view(bsz, heads, tgt_len, dim).transpose(1, 2).reshape(bsz, tgt_len, -1)


@spelling()
def x_transformers(q, k, v, seen):
    scale = q.shape[-1] ** -0.5
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * scale
    mask_value = -torch.finfo(dots.dtype).max
    dots = dots.masked_fill(~seen, mask_value)
    attn = dots.softmax(dim=-1, dtype=torch.float32)
    attn = attn.type(dots.dtype)
    return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


@spelling(
    kv_heads=2,
    output="b t (h d)",
    score=lambda s, given: 30 * torch.tanh(s / 4 / 30),
)
def litgpt(q, k, v, positions):
    size = k.size(-2)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    mask = torch.ones(size, size, dtype=q.dtype).triu(diagonal=1)
    mask.masked_fill_(mask.bool(), float("-inf"))
    atten = q @ k.mT * (1.0 / math.sqrt(q.size(-1)))
    atten = torch.tanh(atten / 30.0) * 30.0
    atten = atten + mask.index_select(0, positions)
    scores = F.softmax(atten, dim=-1, dtype=torch.float)
    y = scores @ v
    return y.transpose(1, 2).reshape(q.size(0), q.size(2), -1)


@spelling()
def annotated_transformer(query, key, value, seen):
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    scores = scores.masked_fill(seen.unsqueeze(0).unsqueeze(0) == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    return torch.matmul(p_attn, value)


@spelling(
    layout="b t h d",
    output="b t h d",
    kv_heads=2,
    sees=lambda given: given["seen"] & padded(given),
)
def flash_attention_reference(q, k, v, padding, seen):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q / math.sqrt(q.shape[-1]), k)
    scores.masked_fill_(~padding.bool()[:, None, None, :], float("-inf"))
    scores.masked_fill_(~seen, float("-inf"))
    attention = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", attention, v)


@spelling(layout="b t h d", output="b t h d")
def flax_transcribed(query, key, value, seen):
    query = query / math.sqrt(query.shape[-1])
    attn_weights = torch.einsum("...qhd,...khd->...hqk", query, key)
    attn_weights = torch.where(seen, attn_weights, torch.finfo(attn_weights.dtype).min)
    attn_weights = torch.softmax(attn_weights, -1).to(value.dtype)
    return torch.einsum("...hqk,...khd->...qhd", attn_weights, value)


@spelling(
    cross=True,
    sees=padded,
    mask="padding",
)
def bart_cross_attention(hidden, key, value, padding):
    bsz, heads, tgt_len, dim = hidden.shape
    inverted = 1.0 - padding[:, None, None, :].to(hidden.dtype)
    mask = inverted.masked_fill(inverted.bool(), torch.finfo(hidden.dtype).min)
    query = (hidden * dim**-0.5).reshape(bsz * heads, tgt_len, dim)
    key, value = key.reshape(bsz * heads, -1, dim), value.reshape(bsz * heads, -1, dim)
    weights = torch.bmm(query, key.transpose(1, 2)).view(bsz, heads, tgt_len, -1) + mask
    weights = F.softmax(weights.view(bsz * heads, tgt_len, -1), dim=-1)
    return torch.bmm(weights, value).view(bsz, heads, tgt_len, dim)
