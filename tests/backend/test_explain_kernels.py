"""Without kernels asked for, `explain` writes no files and launches nothing on the device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import DIM, GROUP, KV_HEADS, SIZE, SMALL
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.gpu import trial_run
from lychee_compile.passes.lower import kernel_modules
from lychee_compile.report.report import Report

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

PREFILL = {**SMALL, "prefill": "sparse", "prefill_budget": 0.5, "prefill_from": 64}


@pytest.fixture(autouse=True)
def nothing_stored():
    kernel_modules._stored.cache_clear()
    trial_run._tried.clear()
    yield
    kernel_modules._stored.cache_clear()


def attend(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **given)


def operands(query_len: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and value cache that the graph only reads."""
    query = torch.randn(1, KV_HEADS * GROUP, query_len, DIM)
    key, value = torch.randn(2, 1, KV_HEADS, SIZE, DIM)
    return query, key, value


def explain(query_len: int, options: dict[str, Any], **given: Any) -> Report:
    return lychee_compile.explain(attend, *operands(query_len), options=options, **given)


def kernel_files() -> list[str]:
    folder = Path(os.environ["LYCHEE_CACHE_DIR"])
    return sorted(each.stem for each in folder.rglob("*.py"))


CASES = pytest.mark.parametrize(
    ("query_len", "options", "decision", "kernel"),
    [
        (1, SMALL, "sparse", "decode_lychee"),
        (1, {**SMALL, "budget": None}, "exact", "decode_exact"),
        (SIZE, PREFILL, "sparse", "prefill_lychee"),
    ],
    ids=["sparse decode", "exact decode", "prefill"],
)


@CASES
def test_without_kernels_nothing_is_written_and_nothing_runs(
    query_len: int,
    options: dict[str, Any],
    decision: str,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*given: Any) -> Any:
        raise AssertionError("nobody asked for kernels")

    for name in ("emit_module", "store", "try_kernels"):
        monkeypatch.setattr(kernel_modules, name, forbidden)
    report = explain(query_len, options)
    (site,) = report.sites
    assert (site.decision, site.kernel) == (decision, f"{kernel} kernel (not generated yet)")
    assert any("kernels=True" in note for note in report.notes)
    assert report.sources() == {}
    assert kernel_files() == []
    assert not trial_run._tried


@CASES
def test_with_kernels_they_are_generated_stored_and_tried(
    query_len: int, options: dict[str, Any], decision: str, kernel: str
) -> None:
    report = explain(query_len, options, kernels=True)
    (site,) = report.sites
    assert site.decision == decision
    assert site.kernel.startswith(f"{kernel}_f32_g2_d16_")
    assert not any("kernels=True" in note for note in report.notes)
    assert kernel_files() == [site.kernel]
    assert set(report.sources()) == {site.kernel}
    assert {each.kernel for each in trial_run._tried} == {site.kernel}


def test_a_kernel_that_fails_is_seen_only_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(trial_run, "new_index", broken)
    (site,) = explain(1, SMALL).sites
    assert site.decision == "sparse"
    (site,) = explain(1, SMALL, kernels=True).sites
    assert (site.decision, site.kernel[:13]) == ("exact", "decode_exact_")
    assert "out of shared memory" in str(site.reason)


def test_it_is_the_kernel_that_a_compilation_runs() -> None:
    (told,) = explain(1, SMALL, kernels=True).sites
    torch.compile(attend, backend="lychee", options=SMALL)(*operands())
    (site,) = lychee_compile.reports()[-1].sites
    assert site.kernel == told.kernel
    assert (site.decision, site.reason) == (told.decision, told.reason)
