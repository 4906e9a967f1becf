"""A softmax that is no attention is left alone; attention whose weights are needed is kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from no_attention import CASES, Case
from spellings import SPELLINGS
from spellings_base import causal
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.passes import reasons
from lychee_compile.report.report import Report

SIZE, START, STEPS = 48, 30, 4
BATCH, HEADS, DIM = 2, 4, 16
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def the_report() -> Report:
    """Return the report of the one graph compiled."""
    assert not counters["graph_break"]
    (report,) = lychee_compile.reports()
    return report


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_softmax_that_is_no_attention(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    expected = model(*inputs)
    compiled = torch.compile(model, backend="lychee", options=EVERYTHING)
    torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=1e-5)
    report = the_report()
    assert report.sites == []
    assert len(report.rejected) == case.softmaxes
    for each in report.rejected:
        assert each.reason
        assert each.source.startswith("no_attention.py:")


@pytest.mark.parametrize("case", CASES[::8], ids=lambda case: case.name)
def test_explaining_rejects_what_compiling_rejects(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    torch.compile(model, backend="lychee", options=EVERYTHING)(*inputs)
    assert lychee_compile.explain(model, *inputs).rejected == the_report().rejected


class Mixture(nn.Module):
    """Attention, then a mixture of experts: one softmax of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.gate = nn.Linear(32, 8)
        self.experts = nn.Parameter(torch.randn(8, 32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        weights = self.gate(x).softmax(-1)
        return x + torch.einsum("bne,ecd,bnc->bnd", weights, self.experts, x)


def test_attention_beside_a_router() -> None:
    model, x = Mixture(), torch.randn(2, 24, 32)
    report = lychee_compile.explain(model, x)
    (site,), (router,) = report.sites, report.rejected
    assert (site.form, site.query_heads, site.head_dim) == ("eager", 4, 8)
    assert router.source != site.source


# Attention whose inside is needed outside. Each takes query, key, value and the causal mask.

Outputs = tuple[Tensor, ...] | Tensor
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Outputs]


def scores_of(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)


def weights_returned(q, k, v, seen):
    weights = scores_of(q, k, seen).softmax(-1)
    return weights @ v, weights


def weights_averaged_over_heads(q, k, v, seen):
    weights = F.softmax(scores_of(q, k, seen), dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights.mean(1)


def weights_in_two_products(q, k, v, seen):
    weights = scores_of(q, k, seen).softmax(-1)
    return weights @ v + torch.einsum("bhqk,bhkd->bhqd", weights, v.flip(-1))


def weights_with_relative_values(q, k, v, seen):
    """Shaw et al.: the weights also average embeddings of the distance."""
    weights = scores_of(q, k, seen).softmax(-1)
    distance = torch.linspace(0, 1, SIZE * DIM).view(SIZE, DIM)
    return weights @ v + weights @ distance


def weights_of_heads_masked(q, k, v, seen):
    head_mask = torch.tensor([1.0, 0.0, 1.0, 0.5]).view(1, -1, 1, 1)
    return (scores_of(q, k, seen).softmax(-1) * head_mask) @ v


def weights_renormalised_over_the_best(q, k, v, seen):
    weights = scores_of(q, k, seen).softmax(-1)
    weights = weights * (weights >= weights.topk(8, -1).values[..., -1:])
    return (weights / weights.sum(-1, keepdim=True)) @ v


def weights_with_entropy(q, k, v, seen):
    weights = scores_of(q, k, seen).softmax(-1)
    return weights @ v, -(weights * (weights + 1e-9).log()).sum(-1)


def scores_returned(q, k, v, seen):
    scores = scores_of(q, k, seen)
    return scores.softmax(-1) @ v, scores


def scores_with_a_loss(q, k, v, seen):
    """The z-loss keeps the normaliser near 1."""
    scores = scores_of(q, k, seen)
    return scores.softmax(-1) @ v, scores.logsumexp(-1).square().mean()


def scores_before_masking_returned(q, k, v, seen):
    raw = q @ k.mT
    scores = (raw / math.sqrt(DIM)).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v, raw.amax()


KEPT = [
    weights_returned,
    weights_averaged_over_heads,
    weights_in_two_products,
    weights_with_relative_values,
    weights_of_heads_masked,
    weights_renormalised_over_the_best,
    weights_with_entropy,
    scores_returned,
    scores_with_a_loss,
    scores_before_masking_returned,
]


def decode(attend: Attend) -> Report:
    """Decode compiled and uncompiled, which must give the same; the report."""

    def step(query, key, value, key_new, value_new, positions):
        key.index_copy_(2, positions, key_new)
        value.index_copy_(2, positions, value_new)
        return attend(query, key, value, causal(positions, SIZE))

    key, value = torch.randn(2, BATCH, HEADS, SIZE, DIM)
    key_eager, value_eager = key.clone(), value.clone()
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    for at in range(START, START + STEPS):
        query, *fresh = torch.randn(3, BATCH, HEADS, 1, DIM)
        positions = torch.tensor([at])
        got = compiled(query, key, value, *fresh, positions)
        expected = step(query, key_eager, value_eager, *fresh, positions)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    return the_report()


@pytest.mark.parametrize("attend", KEPT, ids=lambda attend: attend.__name__)
def test_attention_whose_inside_is_needed_is_kept(attend: Attend) -> None:
    (site,) = decode(attend).sites
    assert (site.form, site.decision, site.by_design) == ("eager", "kept", False)
    assert attend.__name__.split("_")[0] in str(site.reason)


def weights_mixed_over_heads(q, k, v, seen):
    """Talking heads."""
    mix = torch.eye(HEADS) + 0.1
    weights = torch.einsum("bhqk,hg->bgqk", scores_of(q, k, seen).softmax(-1), mix)
    return weights @ v


def scores_mixed_over_heads(q, k, v, seen):
    mix = torch.eye(HEADS) + 0.1
    scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT / math.sqrt(DIM), mix)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def weights_squared(q, k, v, seen):
    return scores_of(q, k, seen).softmax(-1).square() @ v


NEITHER = [weights_mixed_over_heads, scores_mixed_over_heads, weights_squared]
"""Near to attention, but no softmax of products of a query and a key gives these weights."""


@pytest.mark.parametrize("attend", NEITHER, ids=lambda attend: attend.__name__)
def test_what_only_resembles_attention_is_never_rewritten(attend: Attend) -> None:
    report = decode(attend)
    assert all(site.decision == "kept" and not site.by_design for site in report.sites)
    (each,) = (*report.sites, *report.rejected)
    assert each.reason


# Training: gradients, and dropout.


TRAINED = [
    "nanogpt",
    "hf_eager",
    "torch_documentation",
    "gpt_neox_baddbmm",
    "gemma2_soft_cap",
    "gpt_oss_sinks",
    "einsum_grouped",
    "exp_amax_sum",
    "normalised_after_the_product",
    "t5_relative_position_bias",
]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_eager(name: str) -> None:
    (spelling,) = (each for each in SPELLINGS if each.name == name)
    positions = torch.arange(24)

    def attend(query, key, value, held):
        return spelling(query, key, value, spelling.given(positions, 24, held))

    operands = [x.float() for x in spelling.operands(24, 24)]
    held = {name: x for name, x in spelling.held(24).items() if x.is_floating_point()}
    leaves = [x.requires_grad_() for x in (*operands, *held.values())]
    with torch.enable_grad():
        expected = attend(*operands, held)
        got = torch.compile(attend, backend="lychee", options=EVERYTHING)(*operands, held)
        direction = torch.randn_like(expected)
        gradients = torch.autograd.grad(got, leaves, direction)
        expected_gradients = torch.autograd.grad(expected, leaves, direction)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-5)
    (site,) = the_report().sites
    assert site.decision == "kept"
    assert site.reason == reasons.GRADIENTS()


class Attention(nn.Module):
    """Attention over a cache, by weights that may need gradients."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        query = self.project(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        weights = self.drop(scores_of(query, key, seen).softmax(-1))
        return (weights @ value).transpose(1, 2).flatten(2)


def cached(model: Attention) -> tuple[Tensor, ...]:
    key, value = torch.randn(2, BATCH, HEADS, SIZE, DIM)
    return torch.randn(BATCH, 1, HEADS * DIM), key, value, causal(torch.tensor([START]), SIZE)


def test_gradients_of_parameters_alone() -> None:
    model = Attention()
    given = cached(model)
    with torch.enable_grad():
        model(*given).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        torch.compile(model, backend="lychee", options=EVERYTHING)(*given).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)
    (site,) = the_report().sites
    assert site.decision == "kept"
    assert site.reason == reasons.GRADIENTS()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_kept_while_training(training: bool) -> None:
    model = Attention(dropout=0.5).train(training)
    given = cached(model)
    compiled = torch.compile(model, backend="lychee", options=EVERYTHING)
    torch.manual_seed(1)
    expected = model(*given)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(*given), expected, atol=1e-5, rtol=1e-5)
    (site,) = the_report().sites
    assert site.decision == ("kept" if training else "sparse")
    assert (site.reason == reasons.DROPOUT(probability=0.5)) == training


def test_dropout_and_gradients() -> None:
    model = Attention(dropout=0.5)
    given = cached(model)
    compiled = torch.compile(model, backend="lychee", options=EVERYTHING)
    with torch.enable_grad():
        torch.manual_seed(1)
        model(*given).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        torch.manual_seed(1)
        compiled(*given).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)
    (site,) = the_report().sites
    assert site.decision == "kept"
