"""Reports that `explain` makes of a model before anything is compiled through the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY, StaticKV, TinyDecoder
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.options import OptionError, Options
from lychee_compile.passes import reasons

SIZE = 160
SPARSE = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4)}

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_decoding_step(kind: str) -> None:
    model = TinyDecoder().eval()
    if kind == "static":
        given: dict[str, Any] = {"cache": StaticKV.empty(1, SIZE)}
    else:
        given = {"past": model(tokens(SIZE - 1))[1]}
    report = lychee_compile.explain(model, tokens(1), options=SPARSE, **given)
    assert len(report.sites) == LAYERS
    for site in report.sites:
        assert (site.form, site.cache, site.decision) == ("sdpa", kind, "sparse")
        assert (site.query_heads, site.kv_heads, site.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
        assert (site.query_len, site.kv_len) == (1, SIZE)
        offset = "length" if kind == "static" else SIZE - 1
        assert site.mask == f"causal, offset = {offset}"
        assert site.predicate == f"kv <= {offset}"
        assert site.key_range == ("[0, length + 1)" if kind == "static" else f"[0, {SIZE})")
        assert site.monotone
        assert site.source.startswith("tiny_models.py:")
        assert site.source.endswith("in _attend")
        assert "lychee::sparse_attention" in site.kernel


def test_a_prefill_and_the_cache_it_begins() -> None:
    sites = lychee_compile.explain(TinyDecoder().eval(), tokens(50), options=SPARSE).sites
    assert [(site.cache, site.decision, site.by_design) for site in sites] == [
        ("dynamic", "kept", True)
    ] * LAYERS
    assert all(site.reason == reasons.PREFILL(query_len=50) for site in sites)


class Attention(torch.nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "none"),
        ({"is_causal": True}, "causal"),
        ({"attn_mask": torch.zeros(1, 1, 5, 9)}, "additive float32 tensor [1, 1, 5, 9]"),
        ({"attn_mask": torch.ones(5, 9, dtype=torch.bool)}, "bool tensor [5, 9]"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_masks_in_words_and_sites_by_module_path(
    given: dict[str, Any], words: str, wrap: Any
) -> None:
    block = Block(Attention(**given))
    query, key, value = torch.randn(1, 2, 5, 8), *torch.randn(2, 1, 2, 9, 8)
    (site,) = lychee_compile.explain(wrap(block), query, key, value).sites
    assert site.mask == words
    assert site.name == "layers.0.attention"
    assert site.cache == "static"


class Block(torch.nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"attention": attention})])

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layers[0]["attention"](*inputs)


class Decorated(Block):
    """Its forward takes the module itself out of `*args`, as decorated methods do."""

    def forward(*args: Any) -> Tensor:
        self, *inputs = args
        return Block.forward(self, *inputs)


def test_a_decorated_forward_does_not_change_module_paths() -> None:
    query, key, value = torch.randn(1, 2, 5, 8), *torch.randn(2, 1, 2, 9, 8)
    for wrap in (lambda model: model, torch.compile):
        (site,) = lychee_compile.explain(wrap(Decorated(Attention())), query, key, value).sites
        assert site.name == "layers.0.attention"


def test_explaining_over_and_over_always_tells_and_leaves_no_trace() -> None:
    model = Attention()
    query = torch.randn(1, 2, 1, 8)
    for step in range(20):
        cache = torch.randn(2, 1, 2, SIZE + step, 8)
        (site,) = lychee_compile.explain(model, query, *cache, options=SPARSE).sites
        assert site.kv_len == SIZE + step
    assert lychee_compile.reports() == []
    compiled = torch.compile(model, backend="lychee", options=SPARSE)
    compiled(query, *torch.randn(2, 1, 2, SIZE, 8))
    assert counters["lychee"]["sparse"] == 1


def test_graph_breaks_are_pointed_out() -> None:
    def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(query, key, value)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(attended, key, value)

    report = lychee_compile.explain(broken, *torch.randn(3, 1, 2, 9, 8))
    assert len(report.sites) == 2
    assert any("breaks the graph" in note for note in report.notes)


def test_a_compiled_model_is_explained_beyond_a_graph_break() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(query, key, value)

    class Broken(torch.nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return attend(*operands)

    for broken in (attend, Broken()):
        compiled = torch.compile(broken, backend="lychee", options=SPARSE)
        report = lychee_compile.explain(compiled, *torch.randn(3, 1, 2, 9, 8))
        assert len(report.sites) == 1
        assert lychee_compile.reports() == []


def test_a_compiled_module_brings_its_options() -> None:
    compiled = torch.compile(TinyDecoder().eval(), backend="lychee", options=SPARSE)
    given = {"cache": StaticKV.empty(1, SIZE)}
    own = lychee_compile.explain(compiled, tokens(1), **given)
    assert [site.decision for site in own.sites] == ["sparse"] * LAYERS
    other = lychee_compile.explain(compiled, tokens(1), options={"budget": None}, **given)
    assert [site.decision for site in other.sites] == ["kept"] * LAYERS
    elsewhere = torch.compile(TinyDecoder().eval(), backend="eager")
    report = lychee_compile.explain(elsewhere, tokens(1), **given)
    assert report.sites[0].reason == reasons.WITHIN_BUDGET(kv_len=SIZE, budget=1024)


def test_the_policy_and_the_certificate_are_told() -> None:
    options = {**SPARSE, "policy": "quest", "dense_layers": 1, "epsilon": 0.1}
    given = {"cache": StaticKV.empty(1, SIZE)}
    sites = lychee_compile.explain(TinyDecoder().eval(), tokens(1), options=options, **given).sites
    assert sites[0].reason == reasons.DENSE_LAYERS(dense_layers=1)
    assert sites[1].reads == (
        f"budget 32 of up to {SIZE} tokens, policy quest, "
        "more where over 0.1 of the softmax might be missed"
    )


def test_the_share_to_cover_is_told() -> None:
    given = {"cache": StaticKV.empty(1, SIZE)}
    for policy, words in (
        ("lychee", ", fewer if they hold 0.95 of the softmax"),
        ("streaming", ""),
    ):
        options = {**SPARSE, "policy": policy, "coverage": 0.95}
        model = TinyDecoder().eval()
        (site, *_) = lychee_compile.explain(model, tokens(1), options=options, **given).sites
        assert site.reads.startswith(f"budget 32 of up to {SIZE} tokens{words}")
        assert ("fewer" in site.reads) == bool(words)


def test_options_are_the_backends() -> None:
    inputs = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, SIZE, 8)
    attend = F.scaled_dot_product_attention
    for options in (SPARSE, Options(**SPARSE)):
        (site,) = lychee_compile.explain(attend, *inputs, options=options).sites
        assert site.decision == "sparse"
    with pytest.raises(OptionError, match="budgett"):
        lychee_compile.explain(attend, *inputs, options={"budgett": 3})
