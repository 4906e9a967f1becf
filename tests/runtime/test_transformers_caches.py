"""Caches of transformers that hold other numbers than attention reads, or gather them by page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_names import CACHE
from small_decoders import model_of, transformers
from torch import Tensor

import lychee_compile
from lychee_compile.report.report import Report

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")
cache_utils = pytest.importorskip("transformers.cache_utils")
SHAPE = {"sinks": 2, "recent": 16, "chunk": (4, 8)}
PROMPT, END = 60, 64
RESIDUAL = END - PROMPT
"""The last of the steps quantises the tokens of all of them."""


def ids_of(count: int) -> Tensor:
    return torch.randint(1, 128, (1, count), generator=torch.Generator().manual_seed(1))


def beside_uncompiled(make: Any, budget: int, tolerance: float) -> tuple[Report, int]:
    """Decode over two new caches, compiled and not; return the last report and the sparse calls."""
    model, ids = model_of("llama"), ids_of(END)
    step = torch.compile(model, backend="lychee", options={"budget": budget, **SHAPE})
    ours, other = make(model), make(model)
    with torch.no_grad(), lychee_compile.record() as recorder:
        for cache in (ours, other):
            model(ids[:, :PROMPT], **{CACHE: cache})
        for place in range(PROMPT, END):
            got, want = (
                call(ids[:, place : place + 1], **{CACHE: held}).logits
                for call, held in ((step, ours), (model, other))
            )
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    return lychee_compile.reports()[-1], len(recorder.calls)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="not in this release")
def test_a_quantised_cache_of_8_bit_floats_is_sparse() -> None:
    """The budget holds all but one token of the first steps: so they are read sparsely."""
    report, calls = beside_uncompiled(
        lambda model: transformers.QuantizedCache("fp8", model.config), PROMPT, 0.05
    )
    assert [site.decision for site in report.sites] == ["sparse"] * 2
    assert "_quantized_keys" in report.sites[0].keys
    assert calls >= 2 * (END - PROMPT - 1)


class Rounded(cache_utils.QuantizedLayer):
    """A layer as those of quanto and hqq: a quantised past, and a residual as it is."""

    def __init__(self) -> None:
        super().__init__(residual_length=RESIDUAL)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        numbers, scale = q_tensor
        return numbers.float() * scale


@pytest.mark.thorough
def test_a_quantised_cache_with_a_residual_is_sparse_until_that_moves() -> None:
    """The budget holds all keys of the residual and most of the past."""

    def make(model: Any) -> Any:
        return transformers.Cache(layers=[Rounded() for _ in range(model.config.num_hidden_layers)])

    report, calls = beside_uncompiled(make, PROMPT - 1, 0.05)
    assert calls == 2 * (RESIDUAL - 1)
    last = [site.reason.code for site in report.sites if site.reason is not None]
    assert last == ["cache-tail-moves"] * 2
    before = lychee_compile.reports()[-2]
    assert [site.decision for site in before.sites] == ["sparse"] * 2


def test_a_static_cache_under_autocast_is_sparse() -> None:
    """Under autocast the keys that come first, and so the buffers, have the dtype of autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        report, calls = beside_uncompiled(
            lambda model: transformers.StaticCache(model.config, max_cache_len=160), 150, 0.05
        )
    assert [site.decision for site in report.sites] == ["sparse"] * 2
    assert calls == 2 * (END - PROMPT)


@pytest.mark.thorough
def test_generate_batch_gathers_keys_uncompiled_so_that_no_index_pays() -> None:
    """transformers keeps the update of its pages out of graphs: the tokens stay the same."""
    model = transformers.LlamaForCausalLM(model_of("llama").config).eval()
    prompts = [ids_of(60)[0].tolist(), ids_of(80)[0, 30:].tolist()]
    config = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
    )

    def answers() -> list[list[int]]:
        found = model.generate_batch(prompts, generation_config=config)
        return [found[name].generated_tokens for name in sorted(found)]

    expected = answers()
    options = {"budget": 1000, **SHAPE}
    model.forward = torch.compile(model.forward, backend="lychee", options=options)
    assert answers() == expected
    reports = [report for report in lychee_compile.reports() if report.sites]
    assert all(site.decision != "exact" for report in reports for site in report.sites)
