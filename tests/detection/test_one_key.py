"""A softmax over a single key is no attention, and the report says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile
from lychee_compile.passes import reasons
from lychee_compile.report.report import Report

HEADS, QUERIES, DIM = 2, 20, 8

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def operands(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(1, HEADS, QUERIES, DIM)
    return query, torch.randn(1, HEADS, keys, DIM), torch.randn(1, HEADS, keys, DIM)


@torch.no_grad()
def explained(function, *inputs: Tensor) -> Report:
    """Return the report, after a check that the compiled function gives what eager gives."""
    compiled = torch.compile(function, backend="lychee")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=1e-5, rtol=1e-5)
    return lychee_compile.explain(function, *inputs)


def one_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


def one_key_masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.arange(key.shape[2]) > torch.arange(query.shape[2])[:, None]
    return (query @ key.mT / 4).masked_fill(hidden, -1e9).softmax(-1) @ value


def one_key_by_einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", query, key).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, value)


def one_key_by_exponentials(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ value


def one_key_of_shared_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key[:, :1].mT).softmax(-1) @ value[:, :1]


def one_key_transposed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (key @ query.mT).softmax(-2)
    return weights.mT @ value


@pytest.mark.parametrize(
    "attend",
    [
        one_key, one_key_masked, one_key_by_einsum, one_key_by_exponentials,
        one_key_of_shared_heads, one_key_transposed,
    ],
)  # fmt: skip
def test_a_single_key(attend) -> None:
    """Two keys of the same spelling are an attention."""
    report = explained(attend, *operands(keys=1))
    assert report.sites == []
    assert [each.reason for each in report.rejected] == [reasons.ONE_KEY()]
    assert len(lychee_compile.explain(attend, *operands(keys=2)).sites) == 1


@pytest.mark.parametrize("queries", [1, QUERIES])
def test_a_single_key_of_one_operator_is_found(queries: int) -> None:
    query, key, value = operands(keys=1)
    (site,) = explained(F.scaled_dot_product_attention, query[:, :, :queries], key, value).sites
    assert (site.kv_len, site.by_design) == (1, True)
