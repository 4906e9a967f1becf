"""Masks: which keys are hidden, and the many ways to hide them."""

from __future__ import annotations

import math

import torch
from spellings_base import PREFIX, WINDOW, Given, padded, spelling
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def distance(given: Given) -> Tensor:
    """Return the distance from each key to each query, int [Tq, L]."""
    return given["positions"][:, None] - torch.arange(given["seen"].shape[-1])


def seen_and_padded(given: Given) -> Tensor:
    return given["seen"] & padded(given)


def same_document(given: Given) -> Tensor:
    documents, positions = given["documents"], given["positions"]
    return (documents[:, positions, None] == documents[:, None]).unsqueeze(1) & given["seen"]


@spelling()
def masked_fill_not_seen(q, k, v, seen):
    return scores_of(q, k).masked_fill(~seen, -torch.inf).softmax(-1) @ v


@spelling()
def masked_fill_where_zero(q, k, v, seen):
    mask = seen.float()
    return scores_of(q, k).masked_fill(mask == 0, float("-inf")).softmax(-1) @ v


@spelling()
def masked_fill_in_place(q, k, v, seen):
    scores = scores_of(q, k)
    scores.masked_fill_(seen.logical_not(), -1e9)
    return scores.softmax(-1) @ v


@spelling()
def masked_fill_minus_ten_thousand(q, k, v, seen):
    return scores_of(q, k).masked_fill(~seen[None, None], -1e4).softmax(-1) @ v


@spelling(dtype=torch.float16)
def masked_fill_lowest_half(q, k, v, seen):
    scores = scores_of(q, k)
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) @ v


@spelling()
def masked_fill_of_a_comparison(q, k, v, positions):
    hidden = torch.arange(k.shape[2])[None, :] > positions[:, None]
    return scores_of(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling()
def where_infinity(q, k, v, seen):
    return torch.where(seen, scores_of(q, k), -math.inf).softmax(-1) @ v


@spelling()
def where_hidden_first(q, k, v, seen):
    hidden = torch.logical_not(seen)
    return torch.where(hidden, torch.tensor(LOWEST), scores_of(q, k)).softmax(-1) @ v


@spelling()
def where_full_like(q, k, v, seen):
    scores = scores_of(q, k)
    return torch.where(seen, scores, torch.full_like(scores, -1e30)).softmax(-1) @ v


@spelling()
def indices_assigned(q, k, v, seen):
    scores = scores_of(q, k)
    scores[(~seen).expand_as(scores)] = -math.inf
    return scores.softmax(-1) @ v


@spelling()
def added_zeros_and_infinities(q, k, v, seen):
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    return (scores_of(q, k) + mask).softmax(-1) @ v


@spelling()
def added_in_place(q, k, v, seen):
    scores = scores_of(q, k)
    scores += torch.where(seen, 0.0, -math.inf)
    return scores.softmax(-1) @ v


@spelling()
def mask_plus_scores(q, k, v, seen):
    mask = torch.full(seen.shape, LOWEST).masked_fill_(seen, 0)
    return torch.add(mask[None, None], scores_of(q, k)).softmax(-1) @ v


@spelling()
def one_minus_mask_times_lowest(q, k, v, seen):
    mask = (1.0 - seen[None, None].to(q.dtype)) * LOWEST
    return (scores_of(q, k) + mask).softmax(-1) @ v


@spelling()
def one_minus_mask_times_ten_thousand(q, k, v, seen):
    extended = (1.0 - seen.float()) * -10000.0
    return (scores_of(q, k) + extended).softmax(-1) @ v


@spelling()
def minus_hidden_times_large(q, k, v, seen):
    return (scores_of(q, k) - 1e9 * (~seen)).softmax(-1) @ v


@spelling()
def scores_times_mask_minus_large(q, k, v, seen):
    """The first GPT: w * b - 1e10 * (1 - b)."""
    b = seen.float()
    return (scores_of(q, k) * b - 1e10 * (1 - b)).softmax(-1) @ v


@spelling()
def log_of_the_mask(q, k, v, seen):
    return (scores_of(q, k) + seen.float().log()).softmax(-1) @ v


@spelling()
def tril_of_ones(q, k, v, positions):
    tril = torch.tril(torch.ones(k.shape[2], k.shape[2]))
    return scores_of(q, k).masked_fill(tril[positions] == 0, -math.inf).softmax(-1) @ v


@spelling()
def tril_of_bools(q, k, v, positions):
    allowed = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril(diagonal=0)
    return scores_of(q, k).masked_fill(~allowed[positions], LOWEST).softmax(-1) @ v


@spelling()
def triu_of_infinities(q, k, v, positions):
    mask = torch.triu(torch.full((k.shape[2], k.shape[2]), -math.inf), diagonal=1)
    return (scores_of(q, k) + mask[positions]).softmax(-1) @ v


@spelling()
def triu_of_bools(q, k, v, positions):
    hidden = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores_of(q, k).masked_fill(hidden.index_select(0, positions), -1e9).softmax(-1) @ v


@spelling()
def difference_of_positions(q, k, v, positions):
    relative = positions.unsqueeze(-1) - torch.arange(k.shape[2]).unsqueeze(0)
    return scores_of(q, k).masked_fill(relative < 0, -math.inf).softmax(-1) @ v


@spelling()
def greater_or_equal(q, k, v, positions):
    seen = torch.ge(positions.view(1, 1, -1, 1), torch.arange(k.shape[2]).view(1, 1, 1, -1))
    return torch.where(seen, scores_of(q, k), LOWEST).softmax(-1) @ v


@spelling(sees=seen_and_padded, mask="padding")
def padding_and_causal(q, k, v, padding, seen):
    allowed = seen[None, None] & padding[:, None, None, :].bool()
    return scores_of(q, k).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@spelling(sees=seen_and_padded, mask="padding")
def padding_filled_after_causal(q, k, v, padding, seen):
    scores = scores_of(q, k).masked_fill(~seen, -math.inf)
    scores = scores.masked_fill((padding == 0)[:, None, None], -math.inf)
    return scores.softmax(-1) @ v


@spelling(sees=seen_and_padded, mask="padding")
def padding_added_to_causal(q, k, v, padding, seen):
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    mask = mask + torch.where(padding.bool(), 0.0, -math.inf)[:, None, None]
    return (scores_of(q, k) + mask).softmax(-1) @ v


@spelling(sees=seen_and_padded, mask="padding")
def padding_expanded_and_inverted(q, k, v, padding, seen):
    bsz, src_len = padding.size()
    expanded = padding[:, None, None, :].expand(bsz, 1, q.shape[2], src_len).to(q.dtype)
    inverted = 1.0 - expanded
    padding_mask = inverted.masked_fill(inverted.to(torch.bool), LOWEST)
    causal_mask = torch.full(seen.shape, LOWEST).masked_fill(seen, 0.0)
    mask = causal_mask.masked_fill(padding_mask.bool(), LOWEST)
    return (scores_of(q, k) + mask).softmax(-1) @ v


@spelling(sees=same_document, mask="document")
def documents(q, k, v, documents, positions, seen):
    same = documents[:, positions].unsqueeze(-1) == documents.unsqueeze(1)
    return scores_of(q, k).masked_fill(~(same.unsqueeze(1) & seen), -math.inf).softmax(-1) @ v


@spelling(sees=same_document, mask="document", opaque=True)
def documents_told_by_their_starts(q, k, v, documents, positions, seen):
    starts = torch.zeros_like(documents)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    number = starts.cumsum(-1)
    same = number[:, positions][:, None, :, None] == number[:, None, None, :]
    return torch.where(same & seen, scores_of(q, k), LOWEST).softmax(-1) @ v


@spelling(sees=lambda given: given["seen"] & (distance(given) < WINDOW), mask="window")
def sliding_window(q, k, v, positions):
    slots = torch.arange(k.shape[2])
    near = (slots <= positions[:, None]) & (slots > positions[:, None] - WINDOW)
    return scores_of(q, k).masked_fill(~near, -math.inf).softmax(-1) @ v


@spelling(sees=lambda given: given["seen"] & (distance(given) < WINDOW), mask="window")
def sliding_window_of_triangles(q, k, v, positions):
    ones = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool)
    band = ones.tril().logical_and(ones.triu(1 - WINDOW))
    return scores_of(q, k).masked_fill(~band[positions], LOWEST).softmax(-1) @ v


@spelling(sees=lambda given: given["seen"] & (distance(given) < WINDOW), mask="window")
def sliding_window_added(q, k, v, positions, seen):
    far = positions[:, None] - torch.arange(k.shape[2])[None] >= WINDOW
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf).masked_fill(far, -math.inf)
    return (scores_of(q, k) + mask[None, None]).softmax(-1) @ v


@spelling(
    sees=lambda given: (
        given["seen"] & ((distance(given) < WINDOW) | (torch.arange(given["seen"].shape[-1]) < 4))
    ),
    mask="",
)
def window_with_first_tokens(q, k, v, positions, seen):
    slots = torch.arange(k.shape[2])
    near = (positions[:, None] - slots < WINDOW) | (slots < 4)
    return scores_of(q, k).masked_fill(~(near & seen), -math.inf).softmax(-1) @ v


@spelling(
    sees=lambda given: (
        given["seen"]
        & (given["positions"][:, None] // WINDOW == torch.arange(given["seen"].shape[-1]) // WINDOW)
    ),
    mask="",
)
def chunked(q, k, v, positions, seen):
    """Llama 4: a query sees its own chunk."""
    same = torch.arange(k.shape[2]) // WINDOW == (positions // WINDOW)[:, None]
    return scores_of(q, k).masked_fill(~(same & seen), LOWEST).softmax(-1) @ v


@spelling(
    sees=lambda given: given["seen"] | (torch.arange(given["seen"].shape[-1]) < PREFIX),
    mask="prefix",
)
def prefix_language_model(q, k, v, seen):
    allowed = seen | (torch.arange(k.shape[2]) < PREFIX)
    return scores_of(q, k).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@spelling(sees=lambda given: given["seen"] & (distance(given) % 3 == 0), mask="")
def strided(q, k, v, positions, seen):
    every_third = (positions[:, None] - torch.arange(k.shape[2])) % 3 == 0
    return scores_of(q, k).masked_fill(~(every_third & seen), -math.inf).softmax(-1) @ v


@spelling(
    sees=lambda given: torch.arange(given["seen"].shape[-1]) <= given["positions"][-1],
    mask="",
)
def by_length(q, k, v, positions):
    """All tokens so far, for every query, as a kernel that is told a length has it."""
    length = positions[-1] + 1
    valid = torch.arange(k.shape[2]) < length
    return scores_of(q, k).masked_fill(~valid, -math.inf).softmax(-1) @ v


@spelling(cross=True, sees=padded, mask="padding")
def padding_of_an_encoder(q, k, v, padding):
    return scores_of(q, k).masked_fill(padding[:, None, None] == 0, -1e9).softmax(-1) @ v


@spelling(cross=True, sees=padded, mask="padding")
def padding_by_length(q, k, v, padding):
    """Rows are told by their count of tokens; the rest, here the first, are hidden."""
    hidden = padding.logical_not().view(q.shape[0], 1, 1, -1)
    return scores_of(q, k).masked_fill(hidden.expand(-1, 4, q.shape[2], -1), -1e30).softmax(-1) @ v
