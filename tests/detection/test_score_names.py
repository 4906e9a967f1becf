"""Terms of a score have the names of their tensors, whatever is done to those on the way."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile

HEADS, QUERIES, KEYS, DIM = 2, 20, 24, 8

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def operands() -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(1, HEADS, QUERIES, DIM)
    return query, torch.randn(1, HEADS, KEYS, DIM), torch.randn(1, HEADS, KEYS, DIM)


class Named(nn.Module):
    """Scores with terms of tensors that steps have moved, picked from and cast."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_table = nn.Parameter(torch.randn(QUERIES + KEYS, HEADS))
        self.positions = nn.Parameter(torch.randn(HEADS, QUERIES, KEYS))
        distance = torch.arange(QUERIES)[:, None] - torch.arange(KEYS) + KEYS
        self.register_buffer("distance", distance)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT + self.positions.double().cpu().float()
        scores = scores + self.bias_table[self.distance].permute(2, 0, 1)
        return scores.softmax(-1) @ value


@torch.no_grad()
def test_terms_of_a_score_have_the_names_of_their_tensors() -> None:
    (site,) = lychee_compile.explain(Named(), *operands()).sites
    assert "positions[h, q, kv]" in site.score
    assert "bias_table[" in site.score
    assert "cpu" not in site.score
    assert "index[" not in site.score


def bias_cast_and_shaped(s: Tensor, bias: Tensor, distance: Tensor) -> Tensor:
    return s + bias.to(torch.float16).float()[None].contiguous().view(1, HEADS, QUERIES, KEYS)


def bias_of_a_part(s: Tensor, bias: Tensor, distance: Tensor) -> Tensor:
    return s + bias.repeat(1, 1, 2)[:, :, :KEYS].unsqueeze(0)


def bias_selected(s: Tensor, bias: Tensor, distance: Tensor) -> Tensor:
    return s + bias[:, 0].index_select(1, distance.flatten()).view(HEADS, QUERIES, KEYS)


def bias_gathered(s: Tensor, bias: Tensor, distance: Tensor) -> Tensor:
    return s + bias.gather(2, distance.expand(HEADS, -1, -1))


def bias_embedded(s: Tensor, bias: Tensor, distance: Tensor) -> Tensor:
    return s + F.embedding(distance, bias[:, 0].T).permute(2, 0, 1)


def bias_padded_and_moved(s: Tensor, bias: Tensor, distance: Tensor) -> Tensor:
    return s + F.pad(bias, (2, 0))[..., 2:].to("cpu", torch.float64).float()


@torch.no_grad()
@pytest.mark.parametrize(
    "term",
    [
        bias_cast_and_shaped, bias_of_a_part, bias_selected, bias_gathered, bias_embedded,
        bias_padded_and_moved,
    ],
)  # fmt: skip
def test_steps_on_the_way_to_a_score_have_no_names_of_their_own(term) -> None:
    """Tensors are an input, a parameter or a buffer; nothing else is named."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learnt_bias = nn.Parameter(torch.randn(HEADS, QUERIES, KEYS))
            distance = (torch.arange(QUERIES)[:, None] - torch.arange(KEYS)).abs() % KEYS
            self.register_buffer("distances", distance)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return term(query @ key.mT, self.learnt_bias, self.distances).softmax(-1) @ value

    (site,) = lychee_compile.explain(Biased(), *operands()).sites
    names = set(re.findall(r"([A-Za-z_]\w*)\[", site.score))
    assert "learnt_bias" in names
    assert names <= {"learnt_bias", "distances"}
