"""Real models whose attention must stay as it is: it does, says why, and computes what it did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.passes import reasons
from lychee_compile.passes.site import Site

pytest.importorskip("transformers")

from benchmarks.coverage import calls as coverage_calls
from benchmarks.coverage import models as coverage_models

ARCHITECTURES = {each.name: each for each in coverage_models.ARCHITECTURES}
OPTIONS = {"budget": 16, "sinks": 2, "recent": 4, "chunk": (2, 4)}

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def built(name: str, implementation: str) -> Any:
    return ARCHITECTURES[name].build(implementation)


def inputs(name: str, model: Any, phase: str) -> dict[str, Any]:
    """Return the same tensors at every call, and a new cache."""
    return coverage_calls.arguments(model, ARCHITECTURES[name], phase)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="lychee", options=OPTIONS)


def sites() -> list[Site]:
    """Return the attentions that were found in all that has been compiled."""
    found = [site for report in lychee_compile.reports() for site in report.sites]
    assert counters["lychee"]["found"] == len(found) > 0
    return found


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt_oss",
        *(pytest.param(each, marks=pytest.mark.thorough) for each in ("gpt2", "gemma2", "t5")),
    ],
)
def test_attention_whose_weights_are_asked_for(name: str) -> None:
    model = built(name, "eager")
    expected = model(**inputs(name, model, "static"), output_attentions=True)
    given = inputs(name, model, "static")
    got = compiled(model)(**given, output_attentions=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    weights = "decoder_attentions" if "decoder_attentions" in expected else "attentions"
    assert got[weights][0].shape[-2] == 1
    torch.testing.assert_close(got[weights], expected[weights], atol=1e-5, rtol=1e-5)
    for site in sites():
        assert (site.form, site.decision, site.by_design) == ("eager", "kept", False)
        assert site.reason == reasons.WEIGHTS_RETURNED(what="weights")


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.thorough)])
def test_the_same_attention_is_sparse_where_they_are_not(name: str) -> None:
    model = built(name, "eager")
    compiled(model)(**inputs(name, model, "static"))
    assert {site.decision for site in sites()} == {"sparse"}


def test_weights_of_an_encoder() -> None:
    model = built("bert", "eager")
    given = inputs("bert", model, "forward")
    expected = model(**given, output_attentions=True)
    got = compiled(model)(**given, output_attentions=True)
    torch.testing.assert_close(got.attentions, expected.attentions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    for site in sites():
        assert site.decision == "kept"
        assert site.reason == reasons.WEIGHTS_RETURNED(what="weights")


@pytest.mark.parametrize(
    ("name", "implementation", "option"),
    [
        ("gpt2", "eager", "attn_pdrop"),
        ("gpt2", "sdpa", "attn_pdrop"),
        pytest.param("opt", "eager", "attention_dropout", marks=pytest.mark.thorough),
        pytest.param("t5", "eager", "dropout_rate", marks=pytest.mark.thorough),
    ],
)
def test_dropout_while_training(name: str, implementation: str, option: str) -> None:
    architecture = ARCHITECTURES[name]
    dropping = replace(architecture, config={**architecture.config, option: 0.3})
    model = dropping.build(implementation).train()
    outputs = []
    for forward in (model, compiled(model)):
        given = inputs(name, model, "static")
        torch.manual_seed(2)
        outputs.append(forward(**given).logits)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for site in sites():
        assert site.decision == "kept"
        assert site.reason == reasons.DROPOUT(probability=0.3)


def gradients(model: Any, forward: Any, given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Return a loss and its gradients by all parameters."""
    torch.manual_seed(2)
    with torch.enable_grad():
        loss = forward(**given)[0].square().mean()
        used = [each for each in model.parameters() if each.requires_grad]
        found = torch.autograd.grad(loss, used, allow_unused=True)
    pairs = zip(found, used, strict=True)
    return loss, [torch.zeros_like(like) if each is None else each for each, like in pairs]


@pytest.mark.parametrize(
    ("name", "implementation", "training"),
    [
        pytest.param("llama", "sdpa", False, marks=pytest.mark.thorough),
        ("llama", "eager", True),
        pytest.param("gpt2", "eager", True, marks=pytest.mark.thorough),
        pytest.param("gemma2", "eager", False, marks=pytest.mark.thorough),
        pytest.param("gpt_oss", "eager", False, marks=pytest.mark.thorough),
        pytest.param("bert", "sdpa", True, marks=pytest.mark.thorough),
        pytest.param("t5", "eager", True, marks=pytest.mark.thorough),
    ],
)
def test_gradients_are_those_of_eager(name: str, implementation: str, training: bool) -> None:
    model = built(name, implementation).train(training)
    expected_loss, expected = gradients(model, model, inputs(name, model, "forward"))
    loss, got = gradients(model, compiled(model), inputs(name, model, "forward"))
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for site in sites():
        assert (site.decision, site.by_design) == ("kept", False)
        assert site.reason == reasons.GRADIENTS()


def test_gradients_of_one_decoding_step() -> None:
    model = built("llama", "eager")
    results = []
    for forward in (model, compiled(model)):
        given = inputs("llama", model, "dynamic")
        results.append(gradients(model, forward, given))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert {site.decision for site in sites()} == {"kept"}
