"""The models of the examples: found completely, and right when everything is read."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.passes.site import Site
from lychee_compile.report.report import Report

MODELS = Path(__file__).parents[2] / "examples" / "models"
LAYERS = 3
SPARSE = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4)}
PROMPT, STEPS = 60, 12

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def example(name: str) -> ModuleType:
    return importlib.import_module(f"examples.{name}")


def sites_of(model: nn.Module, *inputs: Any, options: dict[str, Any] = SPARSE) -> list[Site]:
    return all_found(lychee_compile.explain(model, *inputs, options=options))


def all_found(report: Report) -> list[Site]:
    """Return the sites, after checking that no softmax was left over."""
    assert report.rejected == []
    assert report.notes == []
    return report.sites


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.py")))
def test_it_runs_and_shows_what_was_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example(f"models.{name}").main()
    printed = capsys.readouterr().out
    found = {"encoder_decoder": 6, "window_attention": 2}.get(name, 3)
    assert f"{found} attentions: {found} " in printed


# Decoders.


def decoded(model: nn.Module, forward: Any, ids: Tensor) -> Tensor:
    """Return the logits of each step for given tokens, after a prompt that always runs eagerly."""
    if type(model).__name__ == "NanoGPT":
        _, past = model(ids[:, :PROMPT])
        logits = []
        for at in range(PROMPT, PROMPT + STEPS):
            step, past = forward(ids[:, at : at + 1], past)
            logits.append(step)
        return torch.stack(logits)
    model.setup_caches(len(ids), PROMPT + STEPS + 8)
    model(ids[:, :PROMPT], torch.arange(PROMPT))
    positions = range(PROMPT, PROMPT + STEPS)
    return torch.stack([forward(ids[:, at : at + 1], torch.tensor([at])) for at in positions])


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.thorough), 3])
@pytest.mark.parametrize("name", ["NanoGPT", "Transformer"])
def test_decoding_with_everything_read_is_dense(name: str, batch: int) -> None:
    model = getattr(example("nanogpt" if name == "NanoGPT" else "gpt_fast"), name)().eval()
    ids = torch.randint(0, 256, (batch, PROMPT + STEPS))
    expected = decoded(model, model, ids)
    options = {**SPARSE, "budget": PROMPT + STEPS}
    got = decoded(model, torch.compile(model, backend="lychee", options=options), ids)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert counters["lychee"]["sparse"] == LAYERS
    assert not counters["graph_break"]


def test_nano_gpt_decodes_over_a_growing_cache() -> None:
    model = example("nanogpt").NanoGPT().eval()
    ids = torch.randint(0, 256, (2, PROMPT))
    _, past = model(ids)
    sites = sites_of(model, ids[:, :1], past)
    assert [site.name for site in sites] == [f"blocks.{n}.attention" for n in range(LAYERS)]
    for site in sites:
        assert (site.form, site.cache, site.decision) == ("eager", "dynamic", "sparse")
        assert (site.query_heads, site.kv_heads, site.head_dim) == (4, 4, 16)
        assert (site.query_len, site.kv_len) == (1, PROMPT + 1)
        assert site.score == "0.25*s"
        assert "seen" in site.predicate


def test_nano_gpt_prefills_exactly() -> None:
    model = example("nanogpt").NanoGPT().eval()
    sites = sites_of(model, torch.randint(0, 256, (2, PROMPT)))
    assert all(site.by_design and site.decision in ("kept", "exact") for site in sites)
    assert len(sites) == LAYERS


def test_gpt_fast_decodes_over_its_own_buffers() -> None:
    model = example("gpt_fast").Transformer().eval()
    model.setup_caches(2, 160)
    sites = sites_of(model, torch.randint(0, 256, (2, 1)), torch.tensor([PROMPT]))
    assert [site.name for site in sites] == [f"layers.{n}.attention" for n in range(LAYERS)]
    for site in sites:
        assert (site.form, site.cache, site.decision) == ("sdpa", "static", "sparse")
        assert (site.query_heads, site.kv_heads, site.head_dim) == (4, 2, 16)
        assert (site.query_len, site.kv_len) == (1, 160)
        assert site.mask == "bool tensor [1, 1, 1, 160]"
        assert "causal_mask" in site.predicate


# Models that read everything at once.


def exact(model: nn.Module, *inputs: Tensor) -> list[Site]:
    """Check that the model computes what it did, and return the sites."""
    expected = model(*inputs)
    compiled = torch.compile(model, backend="lychee", options=SPARSE)
    torch.testing.assert_close(compiled(*inputs), expected)
    assert not counters["graph_break"]
    (report,) = lychee_compile.reports()
    sites = all_found(report)
    assert all(site.decision in ("kept", "exact") for site in sites)
    return sites


@pytest.mark.parametrize("qk_norm", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_vit(qk_norm: bool) -> None:
    model = example("vit").VisionTransformer(qk_norm=qk_norm).eval()
    sites = exact(model, torch.randn(2, 3, 32, 32))
    assert [site.name for site in sites] == [f"blocks.{n}.attention" for n in range(LAYERS)]
    for site in sites:
        assert (site.form, site.query_heads, site.kv_heads, site.head_dim) == ("eager", 4, 4, 16)
        assert (site.query_len, site.kv_len) == (65, 65)
        assert (site.mask, site.cache, site.by_design) == ("none", "none", True)
        assert site.score.endswith("*s")


def test_unet_attention() -> None:
    model = example("models.unet_attention").UNet().eval()
    single, prompt, multi = exact(model, torch.randn(2, 3, 16, 16), torch.randn(2, 7, 24))
    assert [single.name, prompt.name, multi.name] == ["single", "prompt", "multi"]
    assert {site.form for site in (single, prompt, multi)} == {"eager"}
    assert {site.mask for site in (single, prompt, multi)} == {"none"}
    assert (single.query_heads, single.head_dim, single.score) == (1, 64, "0.125*s")
    assert (multi.query_heads, multi.head_dim, multi.score) == (4, 16, "0.25*s")
    assert (prompt.query_heads, prompt.head_dim, prompt.score) == (4, 16, "0.25*s")
    assert [site.kv_len for site in (single, prompt, multi)] == [64, 7, 64]


def test_encoder_decoder() -> None:
    module = example("models.encoder_decoder")
    source, target = torch.randint(1, 100, (2, 20)), torch.randint(1, 100, (2, 12))
    source[1, 15:] = 0
    sites = exact(module.Translator().eval(), source, target)
    encoder, decoder = sites[:2], sites[2:]
    assert [site.form for site in encoder] == ["fused", "fused"]
    assert [site.form for site in decoder] == ["sdpa"] * 4
    assert [site.name.rpartition(".")[2] for site in decoder] == ["self_attn", "multihead_attn"] * 2
    assert [site.mask.split()[0] for site in decoder] == ["causal", "padding"] * 2
    assert [(site.query_len, site.kv_len) for site in decoder] == [(12, 12), (12, 20)] * 2


@pytest.mark.parametrize("window", [pytest.param(4, marks=pytest.mark.thorough), 7])
def test_window_attention(window: int) -> None:
    model = example("models.window_attention").Stage(window=window).eval()
    plain, shifted = exact(model, torch.randn(2, 3, 4 * window, 4 * window))
    for site in (plain, shifted):
        assert (site.form, site.query_heads, site.head_dim) == ("eager", 4, 8)
        assert (site.query_len, site.kv_len) == (window**2, window**2)
        assert "relative_position_bias_table" in site.score
    assert "100" in shifted.score
    assert "100" not in plain.score
