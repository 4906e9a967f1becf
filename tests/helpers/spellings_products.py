"""The two products and the layouts around them: the same attention said in other words."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import repeat_kv, spelling
from torch import Tensor


def weigh(scores: Tensor, seen: Tensor, dim: int = -1) -> Tensor:
    return (scores / 4).masked_fill(~seen, -math.inf).softmax(dim)


@spelling()
def matmul_transpose(q, k, v, seen):
    return torch.matmul(weigh(torch.matmul(q, k.transpose(-2, -1)), seen), v)


@spelling()
def at_with_mt(q, k, v, seen):
    return weigh(q @ k.mT, seen) @ v


@spelling()
def permuted_keys(q, k, v, seen):
    return weigh(q.matmul(k.permute(0, 1, 3, 2)), seen).matmul(v)


@spelling()
def swapped_axes(q, k, v, seen):
    return weigh(q @ torch.swapaxes(k, 2, 3), seen) @ v


@spelling()
def moved_axis(q, k, v, seen):
    return weigh(q @ k.movedim(-1, -2), seen) @ v


@spelling()
def contiguous_keys(q, k, v, seen):
    return weigh(q.contiguous() @ k.transpose(-1, -2).contiguous(), seen) @ v.contiguous()


@spelling()
def adjoint_keys(q, k, v, seen):
    return weigh(q @ k.adjoint(), seen) @ v


@spelling()
def einsum_heads_first(q, k, v, seen):
    weights = weigh(torch.einsum("bhqd,bhkd->bhqk", q, k), seen)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@spelling(layout="b t h d", output="b t h d")
def einsum_tokens_first(q, k, v, seen):
    weights = weigh(torch.einsum("bqhd,bkhd->bhqk", q, k), seen)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@spelling(layout="b t h d", output="b t h d")
def einsum_with_ellipsis(q, k, v, seen):
    weights = weigh(torch.einsum("...qhd,...khd->...hqk", q, k), seen)
    return torch.einsum("...hqk,...khd->...qhd", weights, v)


@spelling()
def einsum_keys_named_first(q, k, v, seen):
    weights = weigh(torch.einsum("bhjd,bhid->bhij", k, q), seen)
    return torch.einsum("bhjd,bhij->bhid", v, weights)


@spelling(layout="b t h d", output="b t h d")
def einsum_heads_last(q, k, v, seen):
    """Scores [b, q, k, h], as in the first PyTorch ports of XLNet."""
    scores = torch.einsum("bqhd,bkhd->bqkh", q, k) / 4
    weights = scores.masked_fill(~seen[None, :, :, None], -math.inf).softmax(2)
    return torch.einsum("bqkh,bkhd->bqhd", weights, v)


@spelling()
def einsum_of_a_list(q, k, v, seen):
    weights = weigh(torch.einsum("bhqd,bhkd->bhqk", [q, k]), seen)
    return torch.einsum("bhqk,bhkd->bhqd", [weights, v])


@spelling(output="b t h d")
def einsum_that_moves_heads(q, k, v, seen):
    weights = weigh(torch.einsum("bhqd,bhkd->bhqk", q, k), seen)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v)


@spelling(kv_heads=2)
def einsum_grouped(q, k, v, seen):
    grouped = q.unflatten(1, (k.shape[1], -1))
    weights = weigh(torch.einsum("bhgqd,bhkd->bhgqk", grouped, k), seen)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).flatten(1, 2)


@spelling(kv_heads=2, layout="b t h d", output="b t (h d)")
def einsum_grouped_tokens_first(q, k, v, seen):
    b, t, n, d = q.shape
    grouped = q.view(b, t, k.shape[2], n // k.shape[2], d)
    weights = weigh(torch.einsum("btkgh,bskh->bkgts", grouped, k), seen)
    return torch.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n * d)


@spelling(kv_heads=2, layout="b t h d", output="b t h d", folded=True)
def einsum_grouped_in_t5x_order(q, k, v, seen):
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhqgk", grouped, k) / 4
    weights = scores.masked_fill(~seen[:, None, :], -math.inf).softmax(-1)
    return torch.einsum("bhqgk,bkhd->bqhgd", weights, v).flatten(2, 3)


@spelling(kv_heads=1)
def multi_query_einsum(q, k, v, seen):
    weights = weigh(torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]), seen)
    return torch.einsum("bhqk,bkd->bhqd", weights, v[:, 0])


@spelling(kv_heads=1, layout="b t h d", output="b t h d")
def multi_query_tokens_first(q, k, v, seen):
    weights = weigh(torch.einsum("bqhd,bkd->bhqk", q, k.squeeze(2)), seen)
    return torch.einsum("bhqk,bkd->bqhd", weights, v.squeeze(2))


@spelling(kv_heads=1)
def multi_query_by_broadcasting(q, k, v, seen):
    return weigh(q @ k.transpose(-1, -2), seen) @ v


@spelling(kv_heads=2)
def grouped_by_broadcasting(q, k, v, seen):
    grouped = q.unflatten(1, (2, 2))
    weights = weigh(grouped @ k.unsqueeze(2).transpose(-1, -2), seen)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


@spelling(kv_heads=2)
def grouped_by_repeat_interleave(q, k, v, seen):
    k, v = torch.repeat_interleave(k, 2, 1), torch.repeat_interleave(v, 2, 1)
    return weigh(q @ k.transpose(-1, -2), seen) @ v


@spelling(kv_heads=2)
def grouped_by_expand(q, k, v, seen):
    return weigh(q @ repeat_kv(k, 2).transpose(-1, -2), seen) @ repeat_kv(v, 2)


@spelling(kv_heads=2)
def group_folded_into_tokens(q, k, v, seen):
    """The query heads of a KV head are rows of one product, as decode kernels have it."""
    b, _, t, d = q.shape
    rows = q.reshape(b, 2, 2 * t, d)
    scores = (rows @ k.transpose(-1, -2)).view(b, 2, 2, t, -1)
    weights = weigh(scores, seen).view(b, 2, 2 * t, -1)
    return (weights @ v).view(b, 4, t, d)


@spelling()
def heads_folded_by_reshape(q, k, v, seen):
    b, h, t, d = q.shape
    q, k, v = q.reshape(-1, t, d), k.reshape(b * h, -1, d), v.reshape(b * h, -1, d)
    return torch.bmm(weigh(torch.bmm(q, k.transpose(1, 2)), seen), v).reshape(b, h, t, d)


@spelling()
def heads_folded_by_flatten(q, k, v, seen):
    shape = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return weigh(q.bmm(k.mT), seen).bmm(v).unflatten(0, shape)


@spelling(kv_heads=2)
def heads_folded_after_repeat(q, k, v, seen):
    b, h, t, d = q.shape
    k, v = repeat_kv(k, 2).view(b * h, -1, d), repeat_kv(v, 2).view(b * h, -1, d)
    return torch.bmm(weigh(torch.bmm(q.reshape(-1, t, d), k.mT), seen), v).view(b, h, t, d)


@spelling()
def batch_and_heads_swapped(q, k, v, seen):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return (weigh(q @ k.mT, seen) @ v).transpose(0, 1)


@spelling(query_heads=1, kv_heads=1)
def single_head_three_axes(q, k, v, seen):
    weights = weigh(torch.bmm(q.squeeze(1), k.squeeze(1).transpose(1, 2)), seen)
    return torch.bmm(weights, v.squeeze(1)).unsqueeze(1)


@spelling()
def keys_times_queries(q, k, v, seen):
    """Scores [b, h, k, q]: the softmax runs over the rows."""
    scores = k @ q.transpose(-2, -1)
    weights = weigh(scores, seen.T, dim=-2)
    return weights.transpose(-2, -1) @ v


@spelling()
def keys_times_queries_values_transposed(q, k, v, seen):
    weights = weigh(torch.matmul(k, q.mT), seen.mT, dim=2)
    return torch.matmul(v.mT, weights).mT


@spelling()
def broadcast_multiply_and_sum(q, k, v, seen):
    scores = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1)
    weights = weigh(scores, seen)
    return (weights[..., None] * v[:, :, None]).sum(dim=-2)


@spelling()
def broadcast_product_then_matmul(q, k, v, seen):
    scores = torch.sum(q.unsqueeze(-2) * k.unsqueeze(-3), dim=-1)
    return weigh(scores, seen) @ v


@spelling(one_query=True, output="b h d")
def one_query_einsum(q, k, v, seen):
    weights = weigh(torch.einsum("bhd,bhld->bhl", q[:, :, 0], k), seen)
    return torch.einsum("bhl,bhld->bhd", weights, v)


@spelling(one_query=True, layout="b t h d", output="b h d")
def one_query_tokens_first(q, k, v, seen):
    weights = weigh(torch.einsum("bhd,blhd->bhl", q.squeeze(1), k), seen)
    return torch.einsum("bhl,blhd->bhd", weights, v)


@spelling(one_query=True, output="b h d")
def one_query_as_a_column(q, k, v, seen):
    scores = torch.matmul(k, q[:, :, 0, :, None]).squeeze(-1)
    weights = weigh(scores, seen)
    return torch.matmul(weights.unsqueeze(-2), v).squeeze(-2)


@spelling(one_query=True, kv_heads=2, output="b h d", folded=True, mask="")
def one_query_grouped(q, k, v, seen):
    """The query heads of a KV head take the place of the tokens."""
    rows = q.view(q.shape[0], 2, 2, -1)
    return (weigh(rows @ k.mT, seen) @ v).view(q.shape[0], 4, -1)


@spelling(value_head_dim=24)
def wider_values(q, k, v, seen):
    return weigh(q @ k.mT, seen) @ v


@spelling(value_head_dim=5, kv_heads=2, output="b t (h d)")
def narrow_values_grouped(q, k, v, seen):
    out = weigh(q @ repeat_kv(k, 2).mT, seen) @ repeat_kv(v, 2)
    return out.transpose(1, 2).flatten(2)


@spelling(head_dim=7, value_head_dim=7, kv_heads=2, scale=7**-0.5)
def odd_head_dim(q, k, v, seen):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    return F.softmax(scores.masked_fill(~seen, -math.inf), -1) @ v


@spelling(layout="b t h d", output="b t (h d)")
def joined_by_concatenation(q, k, v, seen):
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    out = weigh(q @ k, seen) @ v
    return torch.cat([head.squeeze(1) for head in out.split(1, dim=1)], dim=-1)


@spelling()
def four_axes_by_indexing_with_none(q, k, v, seen):
    q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
    return (weigh(q @ k.transpose(-1, -2), seen) @ v)[:, :, 0]


@spelling(may_stay=True)
def split_over_head_dim(q, k, v, seen):
    """The product in two halves of head_dim, as rotary and plain parts are kept apart."""
    q_nope, q_rope = q.split([10, 6], dim=-1)
    k_nope, k_rope = k.split([10, 6], dim=-1)
    q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1)
    return weigh(q @ k.mT, seen) @ v
