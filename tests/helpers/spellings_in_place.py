"""Scores and weights that are written in place, whole or in part, and through views."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import Given, spelling
from torch import Tensor


def biased(s: Tensor, given: Given) -> Tensor:
    """Return scores with a bias for each query and key."""
    return s / 4 + given["bias"][:, given["positions"]]


def biased_but_first(s: Tensor, given: Given) -> Tensor:
    """Return scores with a bias for each key but the first."""
    bias = given["bias"][0, -1].double().clone()
    bias[0] = 0
    return s / 4 + bias


def hide(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, -math.inf)


@spelling()
def dropout_in_place(q, k, v, seen):
    return F.dropout(hide(q @ k.mT / 4, seen).softmax(-1), 0.5, False, inplace=True) @ v


@spelling()
def weights_written_in_place(q, k, v, seen):
    weights = hide(q @ k.mT / 4, seen).softmax(-1)
    F.dropout(weights, 0.1, training=False, inplace=True)
    weights.nan_to_num_()
    return weights @ v


@spelling(score=biased)
def bias_set_on_a_slice_of_all(q, k, v, bias, positions, seen):
    scores = q @ k.mT / 4
    scores[:, :, 0:, 0:] = scores[:, :, 0:, 0:] + bias[:, positions]
    return hide(scores, seen).softmax(-1) @ v


@spelling(score=biased)
def bias_added_to_a_slice_of_all(q, k, v, bias, positions, seen):
    scores = q @ k.mT / 4
    scores[:, :, :, 0:] += bias[:, positions]
    return hide(scores, seen).softmax(-1) @ v


@spelling(score=biased)
def bias_added_through_a_view(q, k, v, bias, positions, seen):
    scores = q @ k.mT / 4
    scores.view(q.shape[0], q.shape[1], -1).add_(bias[:, positions].flatten(1))
    return hide(scores, seen).softmax(-1) @ v


@spelling(score=biased)
def bias_set_through_views(q, k, v, bias, positions, seen):
    scores = q @ k.mT / 4
    rows, columns = scores.shape[-2:]
    wide = scores[:, :, 0:].view(q.shape[0], -1, rows, 1, columns)
    scores[:, :, 0:] = (wide + bias[:, positions, None]).view(q.shape[0], -1, rows, columns)
    return hide(scores, seen).softmax(-1) @ v


@spelling(score=biased_but_first, opaque=True)
def bias_past_a_class_token(q, k, v, bias, seen):
    scores = q @ k.mT / 4
    scores[:, :, :, 1:] += bias[0, -1, 1:]
    return hide(scores, seen).softmax(-1) @ v


@spelling(score=biased_but_first, opaque=True)
def bias_set_past_a_class_token(q, k, v, bias, seen):
    scores = q @ k.mT / 4
    scores[..., 1:] = scores[..., 1:] + bias[0, -1, 1:]
    return hide(scores, seen).softmax(-1) @ v


@spelling()
def masked_through_a_transpose(q, k, v, seen):
    scores = q @ k.mT / 4
    scores.mT.masked_fill_(~seen.T, -math.inf)
    return scores.softmax(-1) @ v


@spelling(sees=lambda given: given["seen"] & (torch.arange(given["seen"].shape[-1]) < 20))
def keys_hidden_by_a_slice(q, k, v, seen):
    scores = hide(q @ k.mT / 4, seen)
    scores[..., 20:] = -math.inf
    return scores.softmax(-1) @ v


@spelling()
def scores_copied_to_a_buffer(q, k, v, seen):
    buffer = torch.empty(*q.shape[:3], k.shape[2])
    buffer.copy_(q @ k.mT).mul_(0.25)
    return hide(buffer, seen).softmax(-1) @ v


@spelling()
def product_and_softmax_to_a_buffer(q, k, v, seen):
    buffer = torch.empty(*q.shape[:3], k.shape[2])
    torch.matmul(q * 0.25, k.mT, out=buffer)
    buffer.masked_fill_(~seen, -math.inf)
    torch.softmax(buffer.clone(), -1, out=buffer)
    return buffer @ v


@spelling()
def shifted_through_an_alias(q, k, v, seen):
    scores = hide(q @ k.mT / 4, seen)
    alias = scores.detach()
    alias.sub_(scores.amax(-1, keepdim=True))
    return scores.softmax(-1) @ v
