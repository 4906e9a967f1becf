"""Decoders of transformers through generated kernels: with everything read, logits are dense."""

from __future__ import annotations

from typing import Any

import pytest
import small_decoders
import torch
import triton_interpreter
from small_decoders import EVERYTHING, PROMPT, decode, model_of, transformers
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.runtime.cache_registry import registry

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("name", "attention", "kind", "padding"),
    [
        ("llama of one layer", "sdpa", "static", [0, 13]),  # the mask is a tensor
        pytest.param("llama", "sdpa", "static", [0, 13], marks=pytest.mark.thorough),
        # An extra logit, and a window within the budget.
        pytest.param("gpt_oss", "eager", "static", [0], marks=pytest.mark.thorough),
        pytest.param("gemma2", "eager", "dynamic", [0], marks=pytest.mark.thorough),  # a soft-cap
        # A bias by position, in expressions.
        pytest.param("bloom", "eager", "dynamic", [0], marks=pytest.mark.thorough),
    ],
)
def test_everything_read_is_dense(
    name: str, attention: str, kind: str, padding: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_decoders, "STEPS", 3)
    model = model_of(name, attention)
    step = torch.compile(model, backend="lychee", options=EVERYTHING)
    got = decode(model, step, kind, padding)
    expected = decode(model, model, kind, padding)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert counters["lychee"]["sparse"] > 0
    assert not counters["graph_break"]
    sites = [site for report in lychee_compile.reports() for site in report.sites]
    for site in sites:
        assert site.decision == "sparse" or site.by_design


def generated(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0, **given)


@pytest.mark.thorough
def test_generate_gives_the_dense_tokens_from_one_cache_after_another() -> None:
    model = model_of("llama")
    config = transformers.CompileConfig(
        backend="lychee", mode=None, options={**EVERYTHING, "budget": PROMPT + 4}
    )
    config._compile_all_devices = True
    given: dict[str, Any] = {"cache_implementation": "static", "compile_config": config}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 128, (1, PROMPT), generator=generator)
        sparse = generated(model, ids, **given)
        assert torch.equal(sparse, generated(model, ids, disable_compile=True))
    assert counters["lychee"]["sparse"] == 2
    assert counters["stats"]["unique_graphs"] == 1
    assert len(registry) == model.config.num_hidden_layers
