"""Decoding steps that use what is inside an attention, or write memory while it runs."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH, HEADS, SIZE, DIM = 1, 2, 160, 8


def masked(scores: Tensor, at: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) > at, -torch.inf)


def plain(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    v.index_copy_(2, at, v_new)
    return masked(q @ k.mT, at).softmax(-1) @ v


def key_written_after_the_scores(q, k, v, k_new, v_new, at):
    scores = masked(q @ k.mT, at)
    k.index_copy_(2, at, k_new)
    return scores.softmax(-1) @ v


def key_written_after_and_before(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    scores = masked(q @ k.mT, at)
    k.index_copy_(2, at - 1, -k_new)
    return scores.softmax(-1) @ v


def key_slice_written_after_the_scores(q, k, v, k_new, v_new, at):
    scores = masked(q @ k.mT, at)
    k[:, :, 3:4] = k_new
    return scores.softmax(-1) @ v


def value_written_between(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    weights = masked(q @ k.mT, at).softmax(-1)
    v.index_copy_(2, at, v_new)
    return weights @ v


def value_read_before_a_later_write(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    out = masked(q @ k.mT, at).softmax(-1) @ v
    v.index_copy_(2, at, v_new)
    return out


def value_view_taken_before_the_write(q, k, v, k_new, v_new, at):
    turned = v.mT
    k.index_copy_(2, at, k_new)
    v.index_copy_(2, at, v_new)
    return masked(q @ k.mT, at).softmax(-1) @ turned.mT


def clone_taken_before_the_write(q, k, v, k_new, v_new, at):
    before = k.clone()
    k.index_copy_(2, at, k_new)
    return masked(q @ before.mT, at).softmax(-1) @ v


def value_clone_taken_before_the_write(q, k, v, k_new, v_new, at):
    before = v.clone()
    k.index_copy_(2, at, k_new)
    v.index_copy_(2, at, v_new)
    return masked(q @ k.mT, at).softmax(-1) @ before


def scaled_copy_before_the_write(q, k, v, k_new, v_new, at):
    before = k * 0.5
    k.index_copy_(2, at, k_new)
    return masked(q @ before.mT, at).softmax(-1) @ v


def contiguous_copy_before_the_write(q, k, v, k_new, v_new, at):
    before = k.mT.contiguous()
    k.index_copy_(2, at, k_new)
    return masked(q @ before, at).softmax(-1) @ v


def repeated_before_the_write(q, k, v, k_new, v_new, at):
    before = k.repeat_interleave(1, 1).flatten(0, 1).mT.contiguous()
    k[:, :, 5] = k_new[:, :, 0]
    return (masked(torch.bmm(q[0], before), at).softmax(-1) @ v[0])[None]


def query_written_in_place_after(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    scores = q @ k.mT
    q.zero_()
    return masked(scores, at).softmax(-1) @ v


def query_scaled_in_place(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    q.mul_(0.5)
    return masked(q @ k.mT, at).softmax(-1) @ v


def mask_written_after_it_is_read(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    hidden = torch.arange(SIZE) > at
    scores = (q @ k.mT).masked_fill(hidden, -torch.inf)
    hidden.zero_()
    return scores.softmax(-1) @ v


def bias_view_written_after(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    bias = torch.arange(SIZE) * 0.01
    scores = masked(q @ k.mT + bias, at)
    bias[:50] = 9.0
    return scores.softmax(-1) @ v, bias


def written_through_reshape(q, k, v, k_new, v_new, at):
    k.reshape(BATCH * HEADS, SIZE, DIM).index_copy_(1, at, k_new.flatten(0, 1))
    return masked(q @ k.mT, at).softmax(-1) @ v


def written_through_flatten(q, k, v, k_new, v_new, at):
    k.flatten(0, 1)[:, at] = k_new.flatten(0, 1)
    v.flatten(0, 1)[:, at] = v_new.flatten(0, 1)
    return masked(q @ k.mT, at).softmax(-1) @ v


def written_through_a_chunk(q, k, v, k_new, v_new, at):
    first, second = k.chunk(2, 1)
    first.index_copy_(2, at, k_new[:, :1])
    second.index_copy_(2, at, k_new[:, 1:])
    return masked(q @ k.mT, at).softmax(-1) @ v


def written_through_strides(q, k, v, k_new, v_new, at):
    k.as_strided((HEADS, SIZE, DIM), (SIZE * DIM, DIM, 1)).index_copy_(1, at, k_new[0])
    return masked(q @ k.mT, at).softmax(-1) @ v


def written_by_out(q, k, v, k_new, v_new, at):
    torch.add(k, 0.125, out=k)
    return masked(q @ k.mT, at).softmax(-1) @ v


def weights_are_returned(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    weights = masked(q @ k.mT, at).softmax(-1)
    return weights @ v, weights


def scores_are_used(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    scores = masked(q @ k.mT, at)
    return scores.softmax(-1) @ v, scores[..., 0].sum()


def weights_are_written_to_a_buffer(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    weights = masked(q @ k.mT, at).softmax(-1)
    v[:, :, :1, :1] += weights.sum(-1, keepdim=True)
    return weights @ v


def weights_are_used_twice(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    weights = masked(q @ k.mT, at).softmax(-1)
    return weights @ v, weights @ k


def shape_of_scores_is_used(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    scores = masked(q @ k.mT, at)
    return scores.softmax(-1) @ v * scores.shape[-1]


def total_over_weights(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    powers = masked(q @ k.mT, at).exp()
    return (powers.sum(-1, keepdim=True) / (powers + 1)) @ v


def total_divided_by_the_product(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    powers = masked(q @ k.mT, at).exp()
    return powers.sum(-1, keepdim=True) / (powers @ v)


def largest_of_other_rows(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    powers = masked(q @ k.mT, at).exp()
    return (powers @ v) / powers.sum(-1, keepdim=True).flip(1)


def total_shifted(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    powers = masked(q @ k.mT, at).exp()
    return (powers / (powers.sum(-1, keepdim=True) + 1)) @ v


def bool_times_scores(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    scores = q @ k.mT
    visible = torch.arange(SIZE) <= at
    return (scores * visible - 1e9 * ~visible).softmax(-1) @ v


def bool_added(q, k, v, k_new, v_new, at):
    k.index_copy_(2, at, k_new)
    return masked(q @ k.mT + (torch.arange(SIZE) > 7), at).softmax(-1) @ v


SAME = [
    plain, key_written_after_the_scores, key_written_after_and_before,
    key_slice_written_after_the_scores, value_written_between, value_read_before_a_later_write,
    value_view_taken_before_the_write, clone_taken_before_the_write,
    value_clone_taken_before_the_write, scaled_copy_before_the_write,
    contiguous_copy_before_the_write, repeated_before_the_write, query_written_in_place_after,
    query_scaled_in_place, mask_written_after_it_is_read, bias_view_written_after,
    written_through_reshape, written_through_flatten, written_through_a_chunk,
    written_through_strides, written_by_out, weights_are_returned, scores_are_used,
    weights_are_written_to_a_buffer, weights_are_used_twice, shape_of_scores_is_used,
    total_over_weights, total_divided_by_the_product, largest_of_other_rows, total_shifted,
    bool_times_scores, bool_added,
]  # fmt: skip
SPARSE = {plain, value_read_before_a_later_write, shape_of_scores_is_used}
NOT_FOLLOWED = {
    written_through_reshape, written_through_flatten, written_through_a_chunk,
    written_through_strides, written_by_out,
}  # fmt: skip
"""Writes that the index would miss if the cache passed for one that is only read."""
