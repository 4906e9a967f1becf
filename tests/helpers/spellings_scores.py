"""Scores: where the scale stands, and what is done to them besides masking."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import Given, spelling
from torch import Tensor


def attend(scores: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def distance(given: Given) -> Tensor:
    """Return the distance from each key to each query, int [Tq, L]."""
    return given["positions"][:, None] - torch.arange(given["seen"].shape[-1])


def relative_bias(given: Given) -> Tensor:
    """Return a number of the table for each distance, [Hq, Tq, L]."""
    return given["table"][distance(given).clamp(0, 31)].permute(2, 0, 1)


@spelling()
def scale_on_queries(q, k, v, seen):
    return attend((q * q.shape[-1] ** -0.5) @ k.mT, v, seen)


@spelling()
def scale_on_keys(q, k, v, seen):
    return attend(q @ (k / math.sqrt(k.shape[-1])).mT, v, seen)


@spelling()
def root_of_scale_on_both(q, k, v, seen):
    scale = math.sqrt(1 / math.sqrt(q.shape[-1]))
    return attend((q * scale) @ (k.transpose(-1, -2) * scale), v, seen)


@spelling()
def fourth_root_on_both(q, k, v, seen):
    root = q.shape[-1] ** 0.25
    return attend((q / root) @ (k / root).mT, v, seen)


@spelling()
def scale_on_scores(q, k, v, seen):
    return attend(torch.mul(q @ k.mT, 0.25), v, seen)


@spelling()
def scale_before_scores(q, k, v, seen):
    return attend(0.25 * (q @ k.mT), v, seen)


@spelling()
def scores_divided_in_place(q, k, v, seen):
    scores = q @ k.mT
    scores /= math.sqrt(k.size(-1))
    return attend(scores, v, seen)


@spelling()
def scores_divided_by_method(q, k, v, seen):
    return attend((q @ k.mT).div_(4.0), v, seen)


@spelling()
def scale_a_constant_tensor(q, k, v, seen):
    return attend(q @ k.mT / torch.tensor(4.0), v, seen)


@spelling()
def scale_root_of_a_tensor(q, k, v, seen):
    dim = torch.tensor(q.shape[-1], dtype=q.dtype)
    return attend(q @ k.mT * torch.rsqrt(dim), v, seen)


@spelling(scale=1.0)
def no_scale(q, k, v, seen):
    return attend(q @ k.mT, v, seen)


@spelling(scale=1 / 16)
def scale_of_width(q, k, v, seen):
    """muP: one over head_dim."""
    return attend(q @ k.mT / q.shape[-1], v, seen)


@spelling(scale=0.3)
def scale_in_three_places(q, k, v, seen):
    return attend(((q * 0.5) @ (k * 2.0).mT) * 0.6 / 2, v, seen)


@spelling(scale=-0.25, may_stay=True)
def negative_scale(q, k, v, seen):
    return attend(-(q @ k.mT) / 4, v, seen)


@spelling()
def scale_by_baddbmm(q, k, v, seen):
    b, h, t, _ = q.shape
    scores = torch.baddbmm(
        torch.zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.25
    )
    return attend(scores.view(b, h, t, -1), v, seen)


@spelling(score=lambda s, given: s / given["tau"].double())
def temperature_a_scalar_tensor(q, k, v, tau, seen):
    return attend(q @ k.mT / tau, v, seen)


@spelling(score=lambda s, given: s * given["tau"].double().exp())
def logit_scale_in_logarithms(q, k, v, tau, seen):
    return attend(q @ k.mT * tau.exp(), v, seen)


@spelling(score=lambda s, given: s * given["temperature"].double()[:, None, None])
def temperature_per_head(q, k, v, temperature, seen):
    return attend(q @ k.mT * temperature.view(1, -1, 1, 1), v, seen)


@spelling(score=lambda s, given: s / given["temperature"].double()[:, None, None], opaque=True)
def temperature_per_head_on_queries(q, k, v, temperature, seen):
    return attend((q / temperature[:, None, None]) @ k.mT, v, seen)


@spelling(
    score=lambda s, given: s / 4 * torch.log1p(given["positions"].double())[:, None],
    opaque=True,
)
def scale_by_log_of_length(q, k, v, positions, seen):
    """Scalable softmax: longer contexts get sharper scores."""
    return attend(q @ k.mT / 4 * torch.log1p(positions.float())[:, None], v, seen)


@spelling(score=lambda s, given: 20 * torch.tanh(s / 80))
def soft_cap(q, k, v, seen):
    return attend(torch.tanh(q @ k.mT * 0.25 / 20.0) * 20.0, v, seen)


@spelling(score=lambda s, given: 10 * torch.tanh(s / 40))
def soft_cap_in_place(q, k, v, seen):
    scores = (q * 0.25) @ k.mT
    scores.div_(10.0).tanh_().mul_(10.0)
    return attend(scores, v, seen)


@spelling(score=lambda s, given: (s / 4).clamp(-2, 2), may_stay=True)
def clamped(q, k, v, seen):
    return attend(torch.clamp(q @ k.mT / 4, -2.0, 2.0), v, seen)


@spelling(score=lambda s, given: (s / 4).clamp(min=torch.finfo(torch.float32).min))
def clamped_from_below(q, k, v, seen):
    lowest = torch.finfo(q.dtype).min
    scores = (q @ k.mT / 4).masked_fill(~seen, lowest).clamp(min=lowest)
    return scores.softmax(-1) @ v


@spelling(score=lambda s, given: s / 4 - given["slopes"][:, None, None] * distance(given).abs())
def alibi_of_distances(q, k, v, slopes, positions, seen):
    distances = (positions[:, None] - torch.arange(k.shape[2])).abs()
    return attend(q @ k.mT / 4 - slopes[:, None, None] * distances, v, seen)


@spelling(
    score=lambda s, given: s / 4 - 0.25 ** torch.arange(1, 5)[:, None, None] * distance(given),
    opaque=True,
)
def alibi_with_slopes_built_in_place(q, k, v, positions, seen):
    heads = q.shape[1]
    start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
    slopes = torch.tensor([start * start**i for i in range(heads)])
    relative = torch.arange(k.shape[2])[None, :] - positions[:, None]
    bias = slopes.unsqueeze(1).unsqueeze(1) * relative.unsqueeze(0)
    return attend(torch.matmul(q, k.transpose(2, 3)) * 0.25 + bias.unsqueeze(0), v, seen)


@spelling(score=lambda s, given: s + relative_bias(given), opaque=True)
def t5_relative_position_bias(query_states, key_states, value_states, table, positions, seen):
    scores = torch.matmul(query_states, key_states.transpose(3, 2))
    relative_position = torch.arange(key_states.shape[2])[None, :] - positions[:, None]
    relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    bucket = torch.min(relative_position, torch.full_like(relative_position, 31))
    position_bias = F.embedding(bucket, table).permute([2, 0, 1]).unsqueeze(0)
    mask = torch.where(seen, 0.0, torch.finfo(scores.dtype).min)
    scores += position_bias + mask[None, None]
    attn_weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(attn_weights, value_states)


@spelling(score=lambda s, given: s / 4 + given["bias"][:, given["positions"]])
def bias_a_given_tensor(q, k, v, bias, positions, seen):
    return attend(q @ k.mT / 4 + bias[:, positions], v, seen)


@spelling(score=lambda s, given: (s + given["bias"][:, given["positions"]]) / 4)
def bias_before_scale(q, k, v, bias, positions, seen):
    return attend((bias[None, :, positions] + q @ k.mT) * 0.25, v, seen)


@spelling(score=lambda s, given: s / 4 + given["bias"][0, -1])
def bias_of_each_key(q, k, v, bias, seen):
    """One number for each key, whoever asks."""
    return attend(q @ k.mT / 4 + bias[0, -1], v, seen)


@spelling(score=lambda s, given: s / 4 + given["temperature"][:, None, None])
def bias_of_each_head(q, k, v, temperature, seen):
    """It leaves the softmax as it is."""
    return attend(q @ k.mT / 4 + temperature[:, None, None], v, seen)


@spelling(
    score=lambda s, given: s / 4 + given["bias"][:, given["positions"]] * 0.5,
)
def bias_by_baddbmm(q, k, v, bias, positions, seen):
    b, h, t, d = q.shape
    added = bias[None, :, positions].expand(b, -1, -1, -1).reshape(b * h, t, -1)
    q, k = q.reshape(b * h, t, d), k.reshape(b * h, -1, d)
    scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=0.5, alpha=0.25)
    return attend(scores.view(b, h, t, -1), v, seen)


@spelling(sink="sinks")
def sink_last(q, k, v, sinks, seen):
    scores = (q @ k.mT / 4).masked_fill(~seen, -math.inf)
    sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1] @ v


@spelling(sink="sinks")
def sink_first(q, k, v, sinks, seen):
    scores = (q @ k.mT / 4).masked_fill(~seen, -math.inf)
    sink = sinks[:, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return F.softmax(torch.cat([sink, scores], -1), dim=-1)[:, :, :, 1:] @ v


@spelling(score=lambda s, given: 20 * torch.tanh(s / 80), sink="sinks")
def soft_cap_and_sink(q, k, v, sinks, seen):
    scores = (20 * torch.tanh(q @ k.mT / 80)).masked_fill(~seen, -math.inf)
    logits = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    logits = logits - logits.amax(-1, keepdim=True)
    return torch.split(torch.softmax(logits, -1), [k.shape[2], 1], -1)[0] @ v


@spelling(scale=0.25)
def values_and_result_scaled(q, k, v, seen):
    return attend(q @ k.mT / 4, v * 2.0, seen) * 0.5
