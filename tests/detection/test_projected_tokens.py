"""Keys that a parameter makes from tokens are keys, and those that it makes of features are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile
from lychee_compile.passes import reasons
from lychee_compile.report.report import Report

TOKENS, WIDTH, HEADS, FEW = 24, 32, 4, 8
READ_ALL = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 2**30}

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


class Linformer(nn.Module):
    """Attention over keys and values that are sums over tokens, by a projection of some form."""

    def __init__(self, form: str, heads: int = HEADS) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.matrix = nn.Parameter(torch.randn(TOKENS, FEW) / 5)
        self.by_head = nn.Parameter(torch.randn(heads, TOKENS, FEW) / 5)
        self.linear, self.conv = nn.Linear(TOKENS, FEW), nn.Conv1d(TOKENS, FEW, 1)
        self.again = nn.Linear(FEW, FEW)

    def fewer(self, x: Tensor) -> Tensor:
        forms = {
            "einsum": lambda: torch.einsum("bnd,nk->bkd", x, self.matrix),
            "matmul": lambda: self.matrix.T @ x,
            "linear": lambda: self.linear(x.mT).mT,
            "conv1d": lambda: self.conv(x),
            "twice": lambda: self.again(F.relu(self.linear(x.mT))).mT,
            "by head": lambda: x,
        }
        return forms[self.form]()

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.fewer(self.key(x)), self.fewer(self.value(x))
        query, key, value = map(self.split, (query, key, value))
        if self.form == "by head":
            key, value = (
                torch.einsum("bhnd,hnk->bhkd", each, self.by_head) for each in (key, value)
            )
        return ((query @ key.mT / 3).softmax(-1) @ value).transpose(1, 2).flatten(2)


class SharedProjection(Linformer):
    """One head of keys, which are the values too, for all heads of queries."""

    def forward(self, x: Tensor) -> Tensor:
        key = self.fewer(self.key(x)[..., : WIDTH // HEADS])[:, None].expand(-1, HEADS, -1, -1)
        scores = self.split(self.query(x)) @ key.mT
        return (scores.softmax(-1) @ key).transpose(1, 2).flatten(2)


class ProjectedQueries(Linformer):
    """Queries are sums over tokens, as those of latents."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = map(self.split, (self.fewer(self.query(x)), self.key(x), self.value(x)))
        return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2)


class BetweenFeatures(Linformer):
    """Features attend to features, though a layer before them sums over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fewer(x)
        query, key, value = (self.split(each(x)).mT for each in (self.query, self.key, self.value))
        return (query @ key.mT).softmax(-1) @ value


@torch.no_grad()
def reported(model: nn.Module) -> Report:
    """Return the report, after a check that the compiled model gives what eager gives."""
    x = torch.randn(2, TOKENS, WIDTH)
    compiled = torch.compile(model, backend="lychee", options=READ_ALL)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    (report,) = lychee_compile.reports()
    return report


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("form", ["einsum", "matmul", "linear", "conv1d", "twice", "by head"])
def test_keys_projected_over_tokens(form: str, heads: int) -> None:
    (site,) = reported(Linformer(form, heads)).sites
    assert site.decision == "sparse"
    sizes = (site.query_heads, site.kv_heads, site.query_len, site.kv_len, site.head_dim)
    assert sizes == (heads, heads, TOKENS, FEW, WIDTH // heads)


def test_projected_keys_that_all_heads_share() -> None:
    (site,) = reported(SharedProjection("einsum")).sites
    assert (site.query_heads, site.query_len, site.kv_len) == (HEADS, TOKENS, FEW)


@pytest.mark.parametrize("form", ["einsum", "linear"])
def test_queries_projected_over_tokens(form: str) -> None:
    (site,) = reported(ProjectedQueries(form)).sites
    assert (site.query_heads, site.query_len, site.kv_len) == (HEADS, FEW, TOKENS)


@pytest.mark.parametrize("form", ["einsum", "linear"])
def test_features_that_attend_are_no_tokens(form: str) -> None:
    report = reported(BetweenFeatures(form))
    assert report.sites == []
    assert [each.reason for each in report.rejected] == [reasons.OVER_FEATURES()]
