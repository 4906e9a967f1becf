"""The softmax: fused, written out, in another base, another precision, or after the product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import spelling
from torch import Tensor, nn


def scores_of(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)


@spelling()
def functional_softmax(q, k, v, seen):
    return F.softmax(scores_of(q, k, seen), dim=-1) @ v


@spelling()
def softmax_module(q, k, v, seen):
    return nn.Softmax(dim=3)(scores_of(q, k, seen)) @ v


@spelling()
def special_softmax(q, k, v, seen):
    return torch.special.softmax(scores_of(q, k, seen), -1) @ v


@spelling(may_stay=True)
def softmin_of_negative_scores(q, k, v, seen):
    return F.softmin(-scores_of(q, k, seen), dim=-1) @ v


@spelling(dtype=torch.bfloat16)
def upcast_by_argument(q, k, v, seen):
    return F.softmax(scores_of(q, k, seen), dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(dtype=torch.float16)
def upcast_by_method(q, k, v, seen):
    return scores_of(q, k, seen).float().softmax(-1).type_as(v) @ v


@spelling()
def upcast_to_double(q, k, v, seen):
    return scores_of(q, k, seen).double().softmax(-1).to(v) @ v


@spelling(dtype=torch.bfloat16)
def upcast_operands_and_result(q, k, v, seen):
    weights = scores_of(q.float(), k.float(), seen).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


@spelling()
def exp_amax_sum(q, k, v, seen):
    scores = scores_of(q, k, seen)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling()
def exp_of_max_values(q, k, v, seen):
    scores = scores_of(q, k, seen)
    weights = (scores - scores.max(dim=-1, keepdim=True)[0].detach()).exp()
    return weights.div(weights.sum(dim=-1, keepdim=True)) @ v


@spelling()
def exp_without_a_maximum(q, k, v, seen):
    weights = torch.exp(scores_of(q, k, seen))
    return (weights / torch.sum(weights, -1, keepdim=True)) @ v


@spelling()
def exp_then_masked(q, k, v, seen):
    """Hidden keys lose their weight after the exponential, not before."""
    scores = q @ k.mT / 4
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling()
def exp_in_place(q, k, v, seen):
    scores = scores_of(q, k, seen)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    scores.div_(scores.sum(-1, keepdim=True))
    return scores @ v


@spelling()
def exp_and_einsum_sum(q, k, v, seen):
    scores = scores_of(q, k, seen)
    weights = torch.exp(scores - torch.amax(scores, -1, True))
    total = torch.einsum("bhqk->bhq", weights)
    return weights / total[..., None] @ v


@spelling()
def minus_logsumexp(q, k, v, seen):
    scores = scores_of(q, k, seen)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


@spelling()
def minus_logsumexp_without_keepdim(q, k, v, seen):
    scores = scores_of(q, k, seen)
    return (scores - scores.logsumexp(-1).unsqueeze(-1)).exp() @ v


@spelling()
def minus_log_of_sum_of_exp(q, k, v, seen):
    scores = scores_of(q, k, seen)
    return torch.exp(scores - scores.exp().sum(-1, keepdim=True).log()) @ v


@spelling()
def log_softmax_then_exp(q, k, v, seen):
    return F.log_softmax(scores_of(q, k, seen), dim=-1).exp() @ v


@spelling()
def exp2_with_log2e(q, k, v, seen):
    scores = (q @ k.mT * (0.25 * math.log2(math.e))).masked_fill(~seen, -math.inf)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling()
def power_of_two(q, k, v, seen):
    scores = scores_of(q, k, seen) * 1.4426950408889634
    weights = 2 ** (scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling()
def normalised_after_the_product(q, k, v, seen):
    scores = scores_of(q, k, seen)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


@spelling()
def normalised_by_reciprocal(q, k, v, seen):
    scores = scores_of(q, k, seen)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights, v) * weights.sum(-1).reciprocal()[..., None]


@spelling()
def softmax_over_rows(q, k, v, seen):
    scores = (k @ q.mT / 4).masked_fill(~seen.T, -math.inf)
    return torch.softmax(scores, dim=-2).mT @ v


@spelling()
def nan_to_num_after_softmax(q, k, v, seen):
    return torch.nan_to_num(scores_of(q, k, seen).softmax(-1)) @ v


@spelling(may_stay=True)
def rows_that_see_nothing_filled(q, k, v, seen):
    weights = scores_of(q, k, seen).softmax(-1)
    nothing = ~seen.any(-1, keepdim=True)
    return weights.masked_fill(nothing, 0.0) @ v


@spelling(may_stay=True)
def hidden_weights_filled(q, k, v, seen):
    """Attend with a fill before the softmax and again after it, as fairseq and ESPnet do."""
    scores = (q @ k.mT / 4).masked_fill(~seen, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(~seen, 0.0) @ v


@spelling()
def dropout_of_nothing(q, k, v, seen):
    weights = F.dropout(scores_of(q, k, seen).softmax(-1), p=0.0, training=True)
    return weights @ v


@spelling()
def dropout_in_evaluation(q, k, v, seen):
    weights = nn.functional.dropout(scores_of(q, k, seen).softmax(-1), 0.5, False)
    return weights @ v


@spelling(dtype=torch.bfloat16)
def rounded_scores(q, k, v, seen):
    scores = (q.float() @ k.float().mT / 4).to(torch.bfloat16)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


@spelling(sink="sinks")
def one_more_logit(q, k, v, sinks, seen):
    """The sink joins the denominator alone, as kernels write it."""
    scores = scores_of(q, k, seen)
    sinks = sinks[None, :, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    weights = torch.exp(scores - top)
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(sinks - top))) @ v


@spelling(sink="sinks")
def one_more_logit_after_the_product(q, k, v, sinks, seen):
    scores = scores_of(q, k, seen)
    sinks = sinks.view(1, -1, 1)
    top = torch.maximum(scores.amax(-1), sinks)
    weights = (scores - top[..., None]).exp()
    return (weights @ v) / (weights.sum(-1) + (sinks - top).exp())[..., None]


@spelling(sink="sinks")
def one_more_logit_without_a_maximum(q, k, v, sinks, seen):
    weights = scores_of(q, k, seen).exp()
    return weights / (torch.exp(sinks)[:, None, None] + weights.sum(-1, keepdim=True)) @ v


@spelling()
def exp_then_filled(q, k, v, seen):
    weights = torch.exp(q @ k.mT / 4).masked_fill(~seen, 0.0)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling()
def exp_then_masked_after_the_product(q, k, v, seen):
    scores = q @ k.mT / 4
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen.to(q.dtype)
    return (weights @ v) / weights.sum(-1, keepdim=True)
