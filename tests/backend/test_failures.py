"""Rewrites that fail after they were planned, and graphs that Dynamo compiles anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import backend, torch_private
from lychee_compile.passes import reasons, rewrite
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.lower import canonical
from lychee_compile.runtime.cache_registry import registry

SIZE = 160
SPARSE = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4), "overfetch": 1}
EVERYTHING = {**SPARSE, "budget": SIZE - 1}

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Hides one key, so that a budget for all others is one for all."""
    visible = torch.arange(key.shape[2]) != 7
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible[None])


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and value cache that the graph only reads."""
    return torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, SIZE, 8)


RESISTS = RewriteError(reasons.REWRITE_FAILED(error="it resists"))


@pytest.mark.parametrize(
    "error", [RESISTS, ZeroDivisionError("it resists")], ids=["reasoned", "a bug"]
)
def test_an_attention_that_resists_is_kept_and_refused_when_strict(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resist(*given: Any) -> Any:
        raise error

    monkeypatch.setattr(canonical, "check_replacement", resist)
    inputs = operands()
    got = torch.compile(attend, backend="lychee", options=SPARSE)(*inputs)
    assert torch.equal(got, attend(*inputs))
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.by_design) == ("kept", False)
    assert "it resists" in str(site.reason)
    assert "scaled_dot_product_attention" in site.kernel
    assert counters["lychee"]["kept"] == counters["lychee"]["found"] == 1
    assert counters["lychee"]["sparse"] == len(registry) == 0
    torch._dynamo.reset()
    strict = torch.compile(attend, backend="lychee", options={**SPARSE, "strict": True})
    with pytest.raises(BackendCompilerFailed, match="it resists") as caught:
        strict(*inputs)
    assert isinstance(caught.value.inner_exception, backend.StrictError)


def test_the_others_are_rewritten_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of the attempt: no operator, and no input for an index."""

    def both(query: Tensor, key: Tensor, value: Tensor, other: Tensor) -> Tensor:
        return attend(query, key, value) + attend(query, other, value)

    check, graphs = canonical.check_replacement, []

    def resist(old: Any, new: torch.fx.Node) -> None:
        if not graphs:
            graphs.append(new.graph)
            raise RESISTS
        check(old, new)

    monkeypatch.setattr(canonical, "check_replacement", resist)
    inputs = *operands(), torch.randn(1, 2, SIZE, 8)
    compiled = torch.compile(both, backend="lychee", options=EVERYTHING)
    torch.testing.assert_close(compiled(*inputs), both(*inputs), atol=1e-5, rtol=1e-5)
    decisions = [site.decision for site in lychee_compile.reports()[-1].sites]
    assert decisions == ["kept", "sparse"]
    targets = [str(node.target) for node in graphs[0].nodes]
    assert sum("sparse_attention" in target for target in targets) == 1
    assert sum("update_index" in target for target in targets) == 1
    assert sum(target.startswith("lychee_index") for target in targets) == 1


def test_an_attention_over_the_output_of_another_is_rewritten_too() -> None:
    def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(attend(query, key, value), key, value)

    inputs = operands()
    compiled = torch.compile(twice, backend="lychee", options=EVERYTHING)
    torch.testing.assert_close(compiled(*inputs), twice(*inputs), atol=1e-5, rtol=1e-5)
    assert counters["lychee"]["sparse"] == 2
    assert len(registry) == 1


@pytest.mark.parametrize("options", [SPARSE, {**SPARSE, "budget": SIZE}], ids=["sparse", "kept"])
def test_a_graph_that_is_compiled_anew_counts_once(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_graph, attempts = torch_private.inductor, []

    def restart_once(*given: Any) -> Any:
        attempts.append(given)
        if len(attempts) == 1:
            raise TensorifyScalarRestartAnalysis("once more")
        return compile_graph(*given)

    monkeypatch.setattr(torch_private, "inductor", restart_once)
    torch.compile(attend, backend="lychee", options=options)(*operands())
    assert len(attempts) == 2
    decision = "sparse" if options is SPARSE else "kept"
    assert [site.decision for report in lychee_compile.reports() for site in report.sites] == [
        decision
    ]
    assert counters["lychee"]["found"] == counters["lychee"][decision] == 1


class OfFloats(nn.Module):
    """Attention of a module that keeps two floats, one of which becomes a constant at a restart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.scale, self.eps = kind, 0.3, 1e-5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = F.layer_norm(query, (16,), eps=self.eps)
        query, key, value = (
            each.unflatten(-1, (2, 8)).transpose(1, 2) for each in (query, key, value)
        )
        scores = query @ key.mT * self.scale
        if self.kind == "kept":
            scores = (scores / self.scale).tanh() * self.scale
        weights = scores.sigmoid() if self.kind == "none" else scores.softmax(-1)
        return weights @ value


@pytest.mark.parametrize(
    ("kind", "strict"), [("sparse", True), ("kept", False), ("kept", True), ("none", False)]
)
def test_a_restart_that_a_float_causes_counts_once(
    kind: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_graph, attempts = torch_private.inductor, []

    def counted(*given: Any) -> Any:
        attempts.append(given)
        return compile_graph(*given)

    monkeypatch.setattr(torch_private, "inductor", counted)
    options, model = {**SPARSE, "strict": strict}, OfFloats(kind)
    inputs = torch.randn(1, 1, 16), *torch.randn(2, 1, SIZE, 16)
    compiled = torch.compile(model, backend="lychee", dynamic=True, options=options)
    if kind == "kept" and strict:
        with pytest.raises(BackendCompilerFailed, match="scores"):
            compiled(*inputs)
        assert attempts == []
    else:
        compiled(*inputs)
        assert len(attempts) == 2, "a restart"
    (report,) = lychee_compile.reports()
    found = [] if kind == "none" else [kind]
    assert [site.decision for site in report.sites] == found
    assert counters["lychee"]["found"] == counters["lychee"][kind] == len(found)


def test_a_graph_without_a_report_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*given: Any) -> Any:
        raise ZeroDivisionError("no words for it")

    monkeypatch.setattr(backend, "without_effect", fail)
    inputs = operands()
    got = torch.compile(attend, backend="lychee", options=SPARSE)(*inputs)
    assert torch.equal(got, attend(*inputs))
    assert lychee_compile.reports() == []
    assert "no words for it" in caplog.text
    assert "there is no report" in caplog.text


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


def test_an_exact_attention_that_resists_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def resist(*given: Any) -> Any:
        raise RESISTS

    monkeypatch.setattr(canonical, "check_replacement", resist)
    inputs = torch.randn(3, 1, 2, 30, 8).unbind()
    torch.compile(written_out, backend="lychee", options=SPARSE)(*inputs)
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.by_design) == ("kept", False)
    assert site.reason == reasons.PREFILL(query_len=30).and_also(RESISTS.reason)
    torch._dynamo.reset()
    strict = torch.compile(written_out, backend="lychee", options={**SPARSE, "strict": True})
    with pytest.raises(BackendCompilerFailed, match="it resists") as caught:
        strict(*inputs)
    assert isinstance(caught.value.inner_exception, backend.StrictError)


def test_a_note_that_fails_leaves_the_prefill_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No operator and no input of the attempt is left, so that the graph compiles unchanged."""
    table, positions = torch.randn(9, 8), torch.arange(30)

    def prefill(ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        new = F.embedding(ids, table)[:, None]
        key = keys.index_copy_(2, positions, new)
        value = values.index_copy_(2, positions, new)
        return F.scaled_dot_product_attention(new, key, value)

    emit, tried = rewrite.emit_token_note, []

    def fail_afterwards(*given: Any) -> None:
        emit(*given)
        tried.append(given)
        raise ZeroDivisionError("no note")

    monkeypatch.setattr(rewrite, "emit_token_note", fail_afterwards)
    options = {**SPARSE, "tokenizer": torch.ones(9, dtype=torch.uint8), "boundaries": "tokens"}
    caches = torch.zeros(2, 1, 1, SIZE, 8).unbind()
    inputs = torch.randint(9, (1, 30)), *caches
    expected = prefill(inputs[0], *(each.clone() for each in caches))
    got = torch.compile(prefill, backend="lychee", options=options)(*inputs)
    torch.testing.assert_close(got, expected)
    assert len(tried) == 1
    assert len(registry) == 0
    assert "no note" in caplog.text
    assert "unchanged" not in caplog.text
