"""Attention whose weights or sums are changed is listed and kept; what only looks alike is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import lychee_compile
from lychee_compile.backend import StrictError
from lychee_compile.passes import reasons
from lychee_compile.passes.reasons import Reason
from lychee_compile.report.report import Report

HEADS, QUERIES, KEYS, DIM = 2, 20, 24, 8

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


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


class TalkingHeads(nn.Module):
    """Attention whose scores are mixed over heads before the softmax, and perhaps weights after."""

    def __init__(self, before: str, after: str = "") -> None:
        super().__init__()
        self.before, self.after = before, after
        self.mix, self.linear = nn.Parameter(torch.randn(HEADS, HEADS)), nn.Linear(HEADS, HEADS)
        self.conv, self.norm = nn.Conv2d(HEADS, HEADS, 1, bias=False), nn.BatchNorm2d(HEADS)
        self.register_buffer("matrix", torch.eye(HEADS) + 0.1)

    def mixed(self, form: str, maps: Tensor) -> Tensor:
        by_head = maps.permute(0, 2, 3, 1)
        forms = {
            "": lambda: maps,
            "linear": lambda: self.linear(by_head).permute(0, 3, 1, 2),
            "conv2d": lambda: self.conv(maps),
            "einsum": lambda: torch.einsum("hg,bhij->bgij", self.mix, maps),
            "matmul": lambda: (self.mix.softmax(-1) @ maps.flatten(2)).view_as(maps),
            "tensordot": lambda: torch.tensordot(maps, self.matrix, ([1], [0])).movedim(-1, 1),
            "batch_norm": lambda: self.norm(self.conv(maps)),
        }
        return forms[form]()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (self.mixed(self.before, query @ key.mT) / 4).softmax(-1)
        return self.mixed(self.after, weights) @ value


@pytest.mark.parametrize(
    "before", ["linear", "conv2d", "einsum", "matmul", "tensordot", "batch_norm"]
)
def test_heads_mixed_before_the_softmax(before: str) -> None:
    report = explained(TalkingHeads(before).eval(), *operands())
    (site,) = report.sites
    assert site.reason == reasons.SCORES_MIXED(operator=before)
    sizes = (site.query_heads, site.query_len, site.kv_len, site.head_dim)
    assert sizes == (HEADS, QUERIES, KEYS, DIM)


@pytest.mark.parametrize("after", ["linear", "conv2d", "einsum", "matmul"])
@pytest.mark.parametrize("before", ["linear", "conv2d", "tensordot"])
def test_heads_mixed_before_and_after_the_softmax(before: str, after: str) -> None:
    (site,) = lychee_compile.explain(TalkingHeads(before, after).eval(), *operands()).sites
    assert site.reason == reasons.WEIGHTS_CHANGED(operator=after)
    sizes = (site.query_heads, site.query_len, site.kv_len, site.head_dim)
    assert sizes == (HEADS, QUERIES, KEYS, DIM)


@pytest.mark.parametrize("after", ["", "linear"])
def test_one_query_whose_heads_are_mixed(after: str) -> None:
    query, key, value = operands()
    (site,) = explained(TalkingHeads("conv2d", after).eval(), query[:, :, :1], key, value).sites
    mixing = reasons.WEIGHTS_CHANGED(operator=after) if after else None
    assert site.reason == (mixing or reasons.SCORES_MIXED(operator="conv2d"))
    assert (site.query_heads, site.query_len, site.kv_len) == (HEADS, 1, KEYS)


def test_a_class_token_whose_heads_are_mixed() -> None:
    """CaiT: keys are a part of what a linear layer makes of the token and the patches."""

    class Pooled(TalkingHeads):
        def __init__(self) -> None:
            super().__init__("einsum", "linear")
            width = HEADS * DIM
            self.queries, self.keys = nn.Linear(width, width), nn.Linear(width, 2 * width)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            token, patches = query[:, :, :1].transpose(1, 2).flatten(2), key.transpose(1, 2)
            tokens = torch.cat((token, patches.flatten(2)), 1)
            made = (self.queries(token), *self.keys(tokens).chunk(2, -1))
            return super().forward(*(x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in made))

    (site,) = explained(Pooled(), *operands()).sites
    assert site.reason == reasons.WEIGHTS_CHANGED(operator="linear")
    assert (site.query_heads, site.query_len, site.kv_len) == (HEADS, 1, KEYS + 1)


@torch.no_grad()
def test_mixed_heads_of_dynamic_lengths() -> None:
    compiled = torch.compile(TalkingHeads("linear", "conv2d"), backend="lychee", dynamic=True)
    compiled(*operands())
    (report,) = lychee_compile.reports()
    (site,) = report.sites
    assert site.reason == reasons.WEIGHTS_CHANGED(operator="conv2d")


def test_query_heads_that_share_keys_are_mixed() -> None:
    class Shared(TalkingHeads):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = torch.einsum("bhid,bjd->bhij", query, key[:, 0])
            return self.mixed(self.before, scores).softmax(-1) @ value[:, :1]

    (site,) = explained(Shared("conv2d"), *operands()).sites
    assert site.reason == reasons.SCORES_MIXED(operator="conv2d")


def test_mixed_scores_that_are_added_to_scores() -> None:
    """A residual: a term of the scores is computed from them, so that all outputs are equal."""

    class Residual(TalkingHeads):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = query @ key.mT / 4
            weights = (scores + self.mixed(self.before, scores)).softmax(-1)
            return (self.mixed(self.after, weights) + weights) @ value

    assert len(explained(Residual("linear"), *operands()).sites) == 1
    (site,) = explained(Residual("linear", "conv2d"), *operands()).sites
    assert site.reason == reasons.WEIGHTS_CHANGED(operator="add")


def gate(query: Tensor) -> Tensor:
    return query.mean((2, 3), keepdim=True).sigmoid()


def biased(query: Tensor) -> Tensor:
    return (query.mean(-1, keepdim=True) * torch.linspace(-1, 1, KEYS)).softmax(-1)


def gated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """ConViT: the softmax of positions is added, and the sum is divided in place."""
    weights = (1 - gate(query)) * (query @ key.mT).softmax(-1) + gate(query) * biased(query)
    weights /= weights.sum(-1).unsqueeze(-1)
    return F.dropout(weights, 0.5, training=False) @ value


def interpolated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.lerp((query @ key.mT).softmax(-1), biased(query), gate(query)) @ value


def added_and_halved(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (biased(query) + (query @ key.mT).softmax(-1)).div(2) @ value


def squared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1).square() @ value


CHANGED = {gated: "mul", interpolated: "lerp", added_and_halved: "add", squared: "square"}


@pytest.mark.parametrize(("attend", "operator"), CHANGED.items())
def test_weights_with_those_of_another_softmax(attend, operator: str) -> None:
    (site,) = explained(attend, *operands()).sites
    assert site.reason == reasons.WEIGHTS_CHANGED(operator=operator)


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


def with_idle_dropout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, total = 0.0, 1e-8
    for keys, values in zip(key.split(8, 2), value.split(8, 2), strict=True):
        weights = F.dropout((query @ keys.mT / 4).exp(), 0.0)
        out, total = out + weights @ values, total + weights.sum(-1, keepdim=True)
    return out / total


@pytest.mark.parametrize(
    "attend", [running, divided_at_each_chunk, stacked, unshifted, with_idle_dropout]
)
def test_chunks_of_keys_are_one_attention(attend) -> None:
    report = explained(attend, *operands())
    (site,) = report.sites
    assert report.rejected == []
    assert (site.decision, site.query_len, site.kv_len) == ("kept", QUERIES, KEYS)
    assert site.reason == reasons.SUM_IN_CHUNKS(count=3)
    assert site.source.startswith("test_changed_weights.py:")


def test_chunks_in_checkpoints() -> None:
    def summed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.dropout((query @ key.mT / 4).exp(), 0.25)
        return weights @ value, weights.sum(-1, keepdim=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [
            checkpoint(summed, query, *each, use_reentrant=False)
            for each in zip(key.split(8, 2), value.split(8, 2), strict=True)
        ]
        values, totals = zip(*parts, strict=True)
        return sum(values) / (sum(totals) + 1e-8)

    query, key, value = operands()
    (site,) = lychee_compile.explain(attend, query.requires_grad_(), key, value).sites
    assert site.reason == reasons.SUM_IN_CHUNKS(count=3)


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


class PooledAfterAttention(nn.Module):
    """Tokens are pooled by a learned query: a linear layer follows an attention, no mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.latent = nn.Linear(DIM, DIM), nn.Parameter(torch.randn(1, DIM))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = F.scaled_dot_product_attention(key, query, query)
        return (self.latent @ self.key(tokens + (key @ query.mT) @ query).mT).softmax(-1) @ value


class ConvolvedCosts(nn.Module):
    """Stereo matching: a convolution over the channels of a feature map gives class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(QUERIES, QUERIES, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        costs = self.conv((query @ key.mT).transpose(1, 2))
        return (costs.softmax(-1) * torch.arange(KEYS)).sum(-1) + value.mean()


NO_ATTENTION = [performer, linear_attention, gated_mean, mixed_over_features, ConvolvedCosts()]


def test_a_learned_query_after_an_attention_is_no_attention() -> None:
    assert [site.form for site in explained(PooledAfterAttention(), *operands()).sites] == ["sdpa"]


@pytest.mark.parametrize("model", NO_ATTENTION)
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


@pytest.mark.parametrize("training", [False, True])
def test_dropout_in_place(training: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT).softmax(-1)
        return F.dropout(weights, 0.25, training, inplace=True) @ value

    (site,) = lychee_compile.explain(attend, *operands()).sites
    dropped = site.reason == reasons.DROPOUT(probability=0.25)
    assert (site.decision, dropped) == (("kept", True) if training else ("exact", False))
