"""The front door: what torch.compile(model, backend="lychee") does, keeps, reports and refuses."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, TinyDecoder, decode_beside
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import backend, torch_private
from lychee_compile.passes import pipeline, reasons
from lychee_compile.passes.site import Site

SIZE = 160
SPARSE = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4), "overfetch": 1}
EVERYTHING = {**SPARSE, "budget": SIZE - 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count))


def attend(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, **given)


def operands(
    query_len: int = 1, heads: int = 2, kv_heads: int = 2, **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and value cache that the graph only reads."""
    query = torch.randn(1, heads, query_len, 8, **given)
    key, value = torch.randn(2, 1, kv_heads, SIZE, 8, **given)
    return query, key, value


def test_listing_backends_is_light_and_compiling_needs_no_import() -> None:
    script = """
import sys, torch
assert "lychee" in torch.compiler.list_backends()
for heavy in ("lychee_compile", "transformers", "matplotlib"):
    assert heavy not in sys.modules, heavy
compiled = torch.compile(lambda x: x.sin(), backend="lychee")
x = torch.randn(5)
torch.testing.assert_close(compiled(x), x.sin())
assert "lychee_compile.backend" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_attention_the_result_is_inductors(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    x = torch.randn(4, 8)
    expected = torch.compile(model, backend="inductor")(x)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, logger="lychee_compile"):
        got = torch.compile(model, backend="lychee")(x)
    assert torch.equal(got, expected)
    (record,) = [each for each in caplog.records if each.name.startswith("lychee_compile")]
    assert record.levelno == logging.INFO
    assert "no attention" in record.message
    assert counters["lychee"]["found"] == 0
    assert [report.sites for report in lychee_compile.reports()] == [[]]


@pytest.mark.parametrize("growing", [False, pytest.param(True, marks=pytest.mark.thorough)])
@torch.no_grad()
def test_decoding_through_inductor_is_dense_when_all_is_read(growing: bool) -> None:
    model = TinyDecoder().eval()
    compiled = torch.compile(model, backend="lychee", options=EVERYTHING)
    for got, expected in decode_beside(model, compiled, tokens(104), 100, SIZE, growing):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert counters["lychee"]["sparse"] > 0
    assert not counters["graph_break"]


def test_gradients_are_eagers_and_wanted_ones_keep_attention(without_inductor: None) -> None:
    query, key, value = operands()
    query.requires_grad_()
    compiled = torch.compile(attend, backend="lychee", options=SPARSE)
    (expected,) = torch.autograd.grad(attend(query, key, value).square().sum(), query)
    (got,) = torch.autograd.grad(compiled(query, key, value).square().sum(), query)
    torch.testing.assert_close(got, expected)
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.by_design) == ("kept", False)
    assert site.reason == reasons.GRADIENTS()
    with torch.no_grad():
        compiled(query, key, value)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"


UNSUPPORTED = [
    pytest.param(operands(dtype=torch.float64), {}, "float64", id="float64"),
    pytest.param(operands(), {"dropout_p": 0.5}, "dropout 0.5", id="dropout"),
]
OTHER_SHAPES = [
    pytest.param(operands(heads=1), id="one query head, broadcast"),
    pytest.param([x[0] for x in operands()], id="3-D"),
    pytest.param([x[None] for x in operands()], id="5-D"),
]
BY_DESIGN = [
    pytest.param(operands(), {"is_causal": True}, SPARSE, "is_causal", id="is_causal"),
    pytest.param(operands(), {}, {**SPARSE, "budget": SIZE}, "length 160 is within", id="short"),
    pytest.param(operands(), {}, {**SPARSE, "budget": None}, "budget=None", id="budget None"),
    pytest.param(operands(40), {}, SPARSE, "length of 40 is a prefill", id="prefill"),
    pytest.param(operands(SIZE), {}, SPARSE, "prefill or an encoder", id="encoder"),
]


def only_site(inputs: Any, given: dict[str, Any], options: dict[str, Any]) -> Site:
    """Return the site of one attention that stays as it is, after checking its output."""
    compiled = torch.compile(attend, backend="lychee", options=options)
    with torch.random.fork_rng():
        expected = attend(*inputs, **given)
    assert torch.equal(compiled(*inputs, **given), expected)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "kept"
    assert counters["lychee"]["kept"] == counters["lychee"]["found"] == 1
    return site


@pytest.mark.parametrize(("inputs", "given", "reason"), UNSUPPORTED)
def test_what_is_not_supported_is_kept_and_refused_when_strict(
    inputs: Any, given: dict[str, Any], reason: str, without_inductor: None
) -> None:
    site = only_site(inputs, given, SPARSE)
    assert site.reason is not None
    assert reason in site.reason.words
    assert not site.by_design
    torch._dynamo.reset()
    strict = torch.compile(attend, backend="lychee", options={**SPARSE, "strict": True})
    with pytest.raises(BackendCompilerFailed) as caught:
        strict(*inputs, **given)
    why = site.reason.words, site.reason.remedy, f"[{site.reason.code}]"
    for part in ("options['strict']", site.name, site.source, *why):
        assert part in str(caught.value)
    assert isinstance(caught.value.inner_exception, backend.StrictError)


@pytest.mark.parametrize("inputs", OTHER_SHAPES)
@torch.no_grad()
def test_other_shapes_are_read_as_batch_heads_and_tokens(
    inputs: Any, without_inductor: None
) -> None:
    mask = torch.ones(1, SIZE, dtype=torch.bool)
    mask[0, 7] = False
    got = torch.compile(attend, backend="lychee", options=EVERYTHING)(*inputs, attn_mask=mask)
    torch.testing.assert_close(got, attend(*inputs, attn_mask=mask), atol=1e-5, rtol=1e-5)
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize(("inputs", "given", "options", "reason"), BY_DESIGN)
def test_what_is_meant_to_be_exact_is_kept_even_when_strict(
    inputs: Any,
    given: dict[str, Any],
    options: dict[str, Any],
    reason: str,
    without_inductor: None,
) -> None:
    site = only_site(inputs, given, {**options, "strict": True})
    assert reason in str(site.reason)
    assert site.by_design


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (pipeline, "find_attention"),
        (torch_private, "retrace"),
        (pipeline, "rewrite"),
        (pipeline, "check_graph"),
    ],
)
def test_a_failure_of_ours_leaves_the_graph_as_it_was(
    place: Any,
    name: str,
    without_inductor: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug of ours\nand a whole graph")

    monkeypatch.setattr(place, name, broken)
    inputs = operands()
    with caplog.at_level(logging.WARNING, logger="lychee_compile"):
        got = torch.compile(attend, backend="lychee", options=SPARSE)(*inputs)
    assert torch.equal(got, attend(*inputs))
    (record,) = [each for each in caplog.records if each.name.startswith("lychee_compile")]
    assert record.levelno == logging.WARNING
    assert record.message.endswith("ZeroDivisionError: a bug of ours")
    check_nothing_is_sparse(
        "ZeroDivisionError: a bug of ours" if name in ("rewrite", "check_graph") else None
    )
    torch._dynamo.reset()
    strict = torch.compile(attend, backend="lychee", options={**SPARSE, "strict": True})
    with pytest.raises(BackendCompilerFailed, match="a bug of ours"):
        strict(*inputs)


def check_nothing_is_sparse(reason: str | None) -> None:
    """Report and counters agree: one site kept for `reason`, or with None nothing was found."""
    sites = [site for report in lychee_compile.reports() for site in report.sites]
    assert counters["lychee"]["sparse"] == 0
    assert counters["lychee"]["found"] == counters["lychee"]["kept"] == len(sites)
    if reason is None:
        assert not sites
        return
    (site,) = sites
    assert site.decision == "kept"
    assert site.reason == reasons.REWRITE_FAILED(error=reason)
    assert "scaled_dot_product_attention" in site.kernel


def test_a_rewritten_graph_that_inductor_refuses_is_compiled_as_it_was(
    without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_graph = torch_private.inductor

    def refuse(gm: torch.fx.GraphModule, *args: Any) -> Any:
        if any("lychee" in str(node.target) for node in gm.graph.nodes):
            raise ValueError("no such lowering")
        return compile_graph(gm, *args)

    monkeypatch.setattr(torch_private, "inductor", refuse)
    inputs = operands()
    got = torch.compile(attend, backend="lychee", options=SPARSE)(*inputs)
    assert torch.equal(got, attend(*inputs))
    check_nothing_is_sparse("ValueError: no such lowering")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"budgett": 64}, ["'budgett'", "did you mean 'budget'"]),
        ({"budget": "many"}, ["budget='many'", "integer"]),
        ({"policy": "lyche"}, ["policy='lyche'", "did you mean 'lychee'"]),
        ({"mode": "fast"}, ["mode='fast'", "reduce-overhead"]),
        ({"inductor": {"max_autotun": True}}, ["'max_autotun'", "did you mean 'max_autotune'"]),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(attend, backend="lychee", options=options)(*operands())
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(
    ("given", "mode", "patches"),
    [
        ({}, None, {}),
        ({"mode": "default"}, None, {}),
        ({"mode": "reduce-overhead"}, "reduce-overhead", {}),
        ({"options": {**SPARSE, "mode": "max-autotune"}}, "max-autotune", {}),
        (
            {"options": {**SPARSE, "inductor": {"epilogue_fusion": False}}},
            None,
            {"epilogue_fusion": False},
        ),
    ],
)
def test_modes_and_options_reach_inductor(
    given: dict[str, Any],
    mode: str | None,
    patches: dict[str, Any],
    attention: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reached = []

    def capture(gm: torch.fx.GraphModule, inputs: Any, *settings: Any) -> Any:
        reached.append(settings)
        return gm.forward

    monkeypatch.setattr(torch_private, "inductor", capture)
    function = attend if attention else torch.mul
    torch.compile(function, backend="lychee", **given)(*operands()[: 3 if attention else 2])
    assert reached == [(mode, patches)]
