"""Attention whose weights or sums are changed is listed and kept; what only looks alike is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import lychee_compile
from lychee_compile.backend import StrictError
from lychee_compile.passes import reasons
from lychee_compile.passes.reasons import Reason
from lychee_compile.report.report import Report

HEADS, QUERIES, KEYS, DIM = 2, 20, 24, 8

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def operands(keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(1, HEADS, QUERIES, DIM)
    return query, torch.randn(1, HEADS, keys, DIM), torch.randn(1, HEADS, keys, DIM)


@torch.no_grad()
def explained(function, *inputs: Tensor) -> Report:
    """Return the report, after a check that the compiled function gives what eager gives."""
    compiled = torch.compile(function, backend="lychee")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=1e-5, rtol=1e-5)
    return lychee_compile.explain(function, *inputs)


class Mixed(nn.Module):
    """Attention whose weights are mixed over heads before they meet the values."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))
        self.conv, self.linear = nn.Conv2d(HEADS, HEADS, 1), nn.Linear(HEADS, HEADS)
        self.wide, self.norm = nn.Conv2d(HEADS, HEADS, 3, padding=1), nn.LayerNorm(HEADS)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT).softmax(-1)
        by_head = weights.permute(0, 2, 3, 1)
        forms = {
            "einsum": lambda: torch.einsum("bhij,hg->bgij", weights, self.mix),
            "conv2d": lambda: self.conv(weights),
            "conv2d of neighbours": lambda: self.wide(weights),
            "linear": lambda: self.linear(by_head).permute(0, 3, 1, 2),
            "bmm": lambda: torch.bmm(self.mix[None], weights.flatten(2)).view_as(weights),
            "einsum, then a norm": lambda: self.norm(by_head @ self.mix).permute(0, 3, 1, 2),
            "matmul with what is no parameter": lambda: (
                by_head @ query.mean((0, 2, 3)).diag()
            ).permute(0, 3, 1, 2),
        }
        return forms[self.form]() @ value


FORMS = {
    "einsum": "einsum",
    "conv2d": "conv2d",
    "conv2d of neighbours": "conv2d",
    "linear": "linear",
    "bmm": "bmm",
    "einsum, then a norm": "layer_norm",
    "matmul with what is no parameter": "matmul",
}


@pytest.mark.parametrize(("form", "operator"), FORMS.items())
def test_heads_mixed_after_the_softmax(form: str, operator: str) -> None:
    report = explained(Mixed(form), *operands())
    (site,) = report.sites
    assert report.rejected == []
    assert (site.form, site.decision, site.by_design) == ("eager", "kept", False)
    assert site.reason == reasons.WEIGHTS_CHANGED(operator=operator)
    sizes = (site.query_heads, site.query_len, site.kv_len, site.head_dim)
    assert sizes == (HEADS, QUERIES, KEYS, DIM)


@torch.no_grad()
@pytest.mark.parametrize("form", ["linear", "conv2d"])
def test_strict_refuses_mixed_heads(form: str) -> None:
    compiled = torch.compile(Mixed(form), backend="lychee", options={"strict": True})
    with pytest.raises(BackendCompilerFailed, match="changed after the softmax") as caught:
        compiled(*operands())
    assert isinstance(caught.value.inner_exception, StrictError)


# Online softmax: over chunks of keys, joined by their sums.


def running(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, top, total = torch.zeros_like(query), query.new_full((1, HEADS, QUERIES, 1), -1e9), 0.0
    for keys, values in zip(key.split(8, 2), value.split(8, 2), strict=True):
        scores = query @ keys.mT
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, old = (scores - new).exp(), (top - new).exp()
        out, total, top = out * old + weights @ values, total * old + weights.sum(-1, True), new
    return out / total


def divided_at_each_chunk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, total = torch.zeros_like(query), torch.zeros(1, HEADS, QUERIES, 1)
    for keys, values in zip(key.split(8, 2), value.split(8, 2), strict=True):
        weights = (query @ keys.mT / 4).exp()
        new = total + weights.sum(-1, keepdim=True)
        out, total = (out * total + weights @ values) / new, new
    return out


def stacked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = []
    for keys, values in zip(key.split(8, 2), value.split(8, 2), strict=True):
        scores = torch.einsum("bhid,bhjd->bhij", query, keys)
        top = scores.amax(-1)
        weights = (scores - top[..., None]).exp()
        parts.append((weights @ values, weights.sum(-1), top))
    values, totals, tops = (torch.stack(each) for each in zip(*parts, strict=True))
    times = (tops - tops.amax(0)).exp()
    return (values * times[..., None]).sum(0) / (totals * times).sum(0)[..., None]


def unshifted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    halves = [(query @ keys.mT / 4).exp() for keys in key.split(8, 2)]
    values = [weights @ part for weights, part in zip(halves, value.split(8, 2), strict=True)]
    return sum(values) * sum(weights.sum(-1, keepdim=True) for weights in halves).reciprocal()


@pytest.mark.parametrize("attend", [running, divided_at_each_chunk, stacked, unshifted])
def test_chunks_of_keys_are_one_attention(attend) -> None:
    report = explained(attend, *operands())
    (site,) = report.sites
    assert report.rejected == []
    assert (site.decision, site.query_len, site.kv_len) == ("kept", QUERIES, KEYS)
    assert site.reason == reasons.SUM_IN_CHUNKS(count=3)
    assert site.source.startswith("test_changed_weights.py:")


@torch.no_grad()
def test_strict_refuses_chunks_of_keys() -> None:
    compiled = torch.compile(running, backend="lychee", options={"strict": True})
    with pytest.raises(BackendCompilerFailed, match="3 chunks of keys") as caught:
        compiled(*operands())
    assert isinstance(caught.value.inner_exception, StrictError)


def exponentials(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    weights = (query @ key.mT / 4).exp()
    return weights, weights.sum(-1, keepdim=True)


def a_small_number_in_the_sum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights, total = exponentials(query, key)
    return (weights / (total + 1e-6)) @ value


def a_small_number_in_the_sum_after(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights, total = exponentials(query, key)
    return (weights @ value) / (total + 1e-6)


def off_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights, total = exponentials(query, key)
    return weights / (1 + total) @ value


def off_by_one_below_a_maximum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT / 4
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    return weights / (weights.sum(-1, keepdim=True) + (-top).exp()) @ value


def one_beside_shifted_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT / 4
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / (weights.sum(-1, keepdim=True) + 1) @ value


def times_what_is_no_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (query @ key.mT / 4).exp() * value.mean(-1).square()[:, :, None]
    return weights / weights.sum(-1, keepdim=True) @ value


SUMS = [
    (a_small_number_in_the_sum, reasons.SUM_CHANGED()),
    (a_small_number_in_the_sum_after, reasons.SUM_CHANGED()),
    (off_by_one, reasons.EXTRA_LOGIT_NUMBER()),
    (off_by_one_below_a_maximum, reasons.EXTRA_LOGIT_NUMBER()),
    (one_beside_shifted_scores, reasons.EXTRA_LOGIT_NUMBER()),
    (times_what_is_no_mask, reasons.WEIGHTS_CHANGED(operator="mul")),
]


@pytest.mark.parametrize(("attend", "reason"), SUMS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_sum_that_is_changed_has_its_reason(attend, reason: Reason) -> None:
    (site,) = explained(attend, *operands()).sites
    assert (site.decision, site.reason) == ("kept", reason)


# No attention.


def performer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    directions = torch.eye(DIM) * 2
    left, right = (query @ directions).exp(), (key @ directions).exp()
    total = (left * right.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return (left @ (right.mT @ value)) / total


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    right = key.exp()
    return query.softmax(-1) @ ((right / right.sum(-2, keepdim=True)).mT @ value)


def gated_mean(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Tokens are pooled in two chunks by weights of each, which no query asks for."""
    weights = [part.mean(-1, keepdim=True).exp() for part in key.split(12, 2)]
    parts = [(w * part).sum(2) for w, part in zip(weights, value.split(12, 2), strict=True)]
    return sum(parts) / sum(w.sum(2) for w in weights)


def mixed_over_features(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A softmax over features, mixed over heads, gates features."""
    gates = torch.einsum("bhid,hg->bgid", query.softmax(-1), torch.ones(HEADS, HEADS))
    return gates @ key.mT @ value


@pytest.mark.parametrize("model", [performer, linear_attention, gated_mean, mixed_over_features])
def test_what_only_resembles_it_is_no_attention(model) -> None:
    assert explained(model, *operands()).sites == []


def test_weights_that_average_weights_are_one_attention() -> None:
    """The inner weights are values of the outer ones, and no heads are mixed."""

    def rolled_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inner = (key @ key.mT).softmax(-1)
        return ((query @ key.mT).softmax(-1) @ inner) @ value

    report = explained(rolled_out, *operands())
    assert all("mixed" not in str(site.reason) for site in report.sites)
    assert len(report.sites) == 1


def test_a_single_key() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value

    report = explained(attend, *operands(keys=1))
    assert report.sites == []
    assert [each.reason for each in report.rejected] == [reasons.ONE_KEY()]


@pytest.mark.parametrize("training", [False, True])
def test_dropout_in_place(training: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT).softmax(-1)
        return F.dropout(weights, 0.25, training, inplace=True) @ value

    (site,) = lychee_compile.explain(attend, *operands()).sites
    dropped = site.reason == reasons.DROPOUT(probability=0.25)
    assert (site.decision, dropped) == (("kept", True) if training else ("exact", False))


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
