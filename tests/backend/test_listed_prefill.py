"""Prefill policies other than "lychee", through the backend where kernels run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prefill_cases import GROUPED, compiled, only_site, sdpa
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("kernels_on_cpu"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = [each[:1, :, :200] for each in GROUPED]


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the registered policies when the test is over."""
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


POLICIES = ("streaming", "dhsa", "s2o", "compact")


@pytest.mark.parametrize(
    "policy",
    [pytest.param(each, marks=() if each == "dhsa" else pytest.mark.thorough) for each in POLICIES],
)
def test_pytorch_chooses_the_same_if_a_mask_has_holes(policy: str) -> None:
    holes = torch.rand(1, 1, 1, 200, generator=torch.Generator().manual_seed(0)) < 0.9
    given = (*SMALL, holes & torch.ones(200, 200, dtype=torch.bool).tril())
    got = compiled(masked, policy=policy, prefill_budget=0.5)(*given)
    site = only_site()
    assert (site.decision, site.reason) == ("sparse", None)
    assert "def see_tiles(" in lychee_compile.reports()[-1].sources()[site.kernel]
    torch._dynamo.reset()
    options = {"policy": policy, "prefill_budget": 0.5, "reference": True}
    torch.testing.assert_close(got, compiled(masked, **options)(*given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_choose_nearly_what_the_plain_form_chooses(policy: str) -> None:
    """Keys that kernels count as equal can change places."""
    got = compiled(causal, policy=policy, prefill_budget=0.5)(*SMALL)
    site = only_site()
    assert (site.decision, site.reason) == ("sparse", None)
    assert site.kernel.startswith(f"prefill_{policy}_f32_g2_d16_")
    assert f"policy {policy}" in site.reads
    assert "def see_tiles(" not in lychee_compile.reports()[-1].sources()[site.kernel]
    torch._dynamo.reset()
    options = {"policy": policy, "prefill_budget": 0.5, "reference": True}
    plain, dense = compiled(causal, **options)(*SMALL), causal(*SMALL)
    if policy == "streaming":
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)
    assert (got - dense).norm() > 1e-3 * dense.norm()
    assert (got - dense).norm() < 1.3 * (plain - dense).norm()


def choose_even(question: PrefillQuestion) -> Tensor:
    """Return the candidates in even slots, as many as there is room for."""
    slot = torch.arange(question.key.shape[2], device=question.key.device)
    return question.take((-(slot % 2)).float().expand_as(question.candidates))


@pytest.mark.usefixtures("registries")
def test_a_policy_of_ones_own_runs_kernels() -> None:
    lychee_compile.register_policy("even", None, tiles=choose_even)
    got = compiled(sdpa, policy="even", prefill_budget=0.4)(*SMALL)
    assert only_site().kernel.startswith("prefill_even_f32_")
    torch._dynamo.reset()
    options = {"policy": "even", "prefill_budget": 0.4, "reference": True}
    torch.testing.assert_close(got, compiled(sdpa, **options)(*SMALL), atol=1e-5, rtol=1e-4)


def fail(question: PrefillQuestion) -> Tensor:
    raise ArithmeticError(f"no choice for {question.tiles} tiles")


@pytest.mark.usefixtures("registries")
def test_a_choice_that_fails_leaves_the_attention_dense() -> None:
    lychee_compile.register_policy("failing", None, tiles=fail)
    got = compiled(sdpa, policy="failing")(*SMALL)
    assert torch.equal(got, sdpa(*SMALL))
    assert only_site().decision == "kept"
    assert "no choice for 2 tiles" in str(only_site().reason)


def test_prompts_of_any_length_are_served_by_one_graph() -> None:
    """Short prompts go to PyTorch's own kernel."""
    run = compiled(causal, policy="compact", prefill_budget=10**9, prefill_from=140)
    for length in (180, 130, 199):
        given = [each[:1, :, :length] for each in GROUPED]
        for each in given:
            torch._dynamo.mark_dynamic(each, 2)
        torch.testing.assert_close(run(*given), causal(*given), atol=1e-5, rtol=1e-4)
    assert only_site().kernel.startswith("prefill_compact_f32_g2_")
