"""Prefill through the backend: every tile of queries reads what matters to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prefill_cases import (
    CASES,
    DIM,
    GROUPED,
    KERNEL,
    KV_HEADS,
    LENGTH,
    RECENT,
    SCALE,
    SINKS,
    SPARSE,
    Case,
    Function,
    causal_by_places,
    compiled,
    eager,
    eager_causal,
    only_site,
    operands,
    recorded,
    sdpa,
    sdpa_causal,
)
from prefill_problems import prefill_config
from tiny_models import LAYERS, VOCABULARY, StaticKV, TinyDecoder
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.boundaries import BoundaryTable
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig, prefill_attention
from lychee_compile.kernels.sizes import QUERY_TILE
from lychee_compile.passes import reasons

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
def test_a_tile_reads_what_the_specification_says(case: Case) -> None:
    with recorded() as calls:
        got = compiled(case.function)(*case.inputs)
    expected = case.sparse(prefill_config(sinks=SINKS, recent=RECENT))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, case.dense(), atol=1e-3)
    (call,) = calls
    assert call.causal == case.given.get("causal", False)
    assert (call.operands.mask is None) == ("mask" not in case.given)
    site = only_site()
    assert (site.form, site.decision, site.kernel) == (case.form, "sparse", KERNEL)
    assert site.reads == "each tile of 128 queries reads 20 % of the keys it sees"
    assert site.reason is None
    assert case.mask in site.mask
    assert counters["lychee"] == {"found": 1, "sparse": 1}


@each_case
@pytest.mark.parametrize("everything", [10**9, 1.0])
def test_all_that_is_there_is_dense(everything: float, case: Case) -> None:
    with recorded() as calls:
        got = compiled(case.function, prefill_budget=everything)(*case.inputs)
    torch.testing.assert_close(got, case.dense(), atol=1e-5, rtol=1e-5)
    assert len(calls) == 1
    assert only_site().decision == "sparse"
    assert "reads all keys it sees" in only_site().reads


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({"prefill_budget": 96}, prefill_config(budget=96), "reads up to 96 keys"),
        (
            {"prefill_budget": 0.125},
            prefill_config(budget=0.125),
            "reads 12.5 % of the keys it sees",
        ),
        ({"policy": "streaming"}, prefill_config("streaming"), "it sees, policy streaming"),
        (
            {"epsilon": 0.3},
            prefill_config(epsilon=0.3),
            "more where over 0.3 of the softmax might",
        ),
        ({"sinks": 0, "recent": 40}, prefill_config(sinks=0, recent=40), "reads 20 %"),
    ],
)
def test_options_reach_the_operator(
    options: dict[str, Any], config: PrefillConfig, words: str
) -> None:
    given = {"sinks": 16, "recent": 64} | options
    got = compiled(sdpa, **given)(*GROUPED)
    expected = prefill_attention(Operands(*GROUPED, None, SCALE), config).output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert words in only_site().reads


@pytest.mark.parametrize(
    ("function", "decision"), [(sdpa, "kept"), (eager, "exact")], ids=["sdpa", "eager"]
)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefill_from": 401}, "key length 400 is below prefill_from=401"),
        (
            {"policy": "clusterkv", "dense_layers": 0},
            "policy='clusterkv' cannot choose keys",
        ),
        ({"budget": None}, "budget=None"),
        ({"prefill": "exact"}, "a prefill or an encoder, which stays exact"),
    ],
    ids=["short", "policy", "budget None", "not asked for"],
)
def test_what_stays_exact_says_why(
    options: dict[str, Any], words: str, function: Function, decision: str
) -> None:
    inputs = operands()
    got = compiled(function, **options)(*inputs)
    torch.testing.assert_close(got, function(*inputs), atol=1e-5, rtol=1e-5)
    site = only_site()
    assert (site.decision, site.by_design) == (decision, True)
    assert words in str(site.reason)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(sdpa, marks=pytest.mark.thorough, id="all"),
        pytest.param(eager_causal, id="causal"),
    ],
)
def test_where_kernels_run_they_are_generated_for_it(
    function: Function, kernels_on_cpu: None
) -> None:
    query, key, value = (each[:1, :, :200] for each in GROUPED)
    got = compiled(function, prefill_budget=10**9)(query, key, value)
    torch.testing.assert_close(got, function(query, key, value), atol=1e-5, rtol=1e-4)
    site = only_site()
    assert (site.decision, site.kernel[:26]) == ("sparse", "prefill_lychee_f32_g2_d16_")
    assert "def select_keys(" in lychee_compile.reports()[-1].sources()[site.kernel]
    torch._dynamo.reset()
    sparse = compiled(function, prefill_budget=0.4)(query, key, value)
    reference = compiled(function, prefill_budget=0.4, reference=True)(query, key, value)
    assert only_site().kernel == KERNEL
    off = (sparse - reference).norm() / reference.norm()
    assert off < (got - reference).norm() / reference.norm()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"policy": "quest"}, "policy='quest' cannot choose keys for prefill"),
        ({"epsilon": 0.1}, "no GPU kernel of a prefill supports epsilon (got 0.1)"),
        (
            {"epsilon": 0.1, "policy": "s2o"},
            "no GPU kernel of a prefill supports epsilon (got 0.1)",
        ),
    ],
)
def test_what_has_no_kernel_stays_exact_where_kernels_run(
    option: dict[str, Any], words: str, kernels_on_cpu: None
) -> None:
    got = compiled(sdpa, **option)(*GROUPED)
    assert torch.equal(got, sdpa(*GROUPED))
    assert only_site().decision == "kept"
    assert words in str(only_site().reason)


def test_gradients_asked_for_keep_it() -> None:
    query, key, value = operands()
    with torch.enable_grad():
        query.requires_grad_()
        got = compiled(eager_causal)(query, key[:, :2], value[:, :2])
        (gradient,) = torch.autograd.grad(got.square().sum(), query)
        output = eager_causal(query, key[:, :2], value[:, :2])
        (expected,) = torch.autograd.grad(output.square().sum(), query)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert (only_site().decision, only_site().by_design) == ("kept", False)
    assert only_site().reason == reasons.GRADIENTS()


def test_explain_shows_it() -> None:
    report = lychee_compile.explain(sdpa, *operands(), options=SPARSE)
    assert report.counts() == {"found": 1, "sparse": 1, "exact": 0, "kept": 0}
    words = " ".join(str(report).split())
    assert "sparse_prefill" in words
    assert "20 %" in words


@pytest.mark.parametrize("function", [sdpa, sdpa_causal, causal_by_places])
def test_lengths_that_only_a_call_tells(function: Function) -> None:
    run = compiled(lambda x: function(x, x * x, x + 1), prefill_budget=0.3)
    for length in (300, 333, 50):
        x = operands(length)[0]
        inputs = (x, x * x, x + 1)
        torch._dynamo.mark_dynamic(x, 2)
        with recorded() as calls:
            got = run(x)
        config = prefill_config(budget=0.3, sinks=SINKS, recent=RECENT)
        causal = function is not sdpa
        expected = prefill_attention(Operands(*inputs, None, SCALE), config, causal).output
        if length < 64:
            expected = function(*inputs)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert len(calls) == (length >= 64)
    assert counters["stats"]["unique_graphs"] == 1
    assert (only_site().decision, only_site().kernel) == ("sparse", KERNEL)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_short_prompts_are_pytorchs_own_where_lengths_are_symbolic(kernels_on_cpu: None) -> None:
    """One graph for prompts on both sides of `prefill_from`, of grouped heads."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    run = compiled(attend, prefill_budget=10**9, prefill_from=140)
    for length in (150, 100, 141):
        query, key, value = (each[:1] for each in operands(length, kv_heads=KV_HEADS))
        for each in (query, key, value):
            torch._dynamo.mark_dynamic(each, 2)
        expected = attend(query, key, value)
        torch.testing.assert_close(run(query, key, value), expected, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert only_site().kernel.startswith("prefill_lychee_f32_g2_")


class Cross(torch.nn.Module):
    """Attention to a memory whose keys the module makes."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.nn.Linear(DIM, DIM)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, self.keys(memory), memory)


def test_cross_attention_from_any_number_of_positions() -> None:
    model = Cross()
    run = compiled(model)
    memory = operands(500)[1]
    for length in (200, 170):
        query = operands(length)[0]
        torch._dynamo.mark_dynamic(query, 2)
        with recorded() as calls:
            got = run(query, memory)
        config = prefill_config(sinks=SINKS, recent=RECENT)
        tensors = query, model.keys(memory), memory
        result = prefill_attention(Operands(*tensors, None, SCALE), config)
        torch.testing.assert_close(got, result.output, atol=1e-5, rtol=1e-5)
        assert len(calls) == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_steps_of_any_length_over_a_cache_stay_decoding() -> None:
    """A graph with a symbolic number of queries is compiled for decoding."""
    query, key, value = operands(5, 300)
    torch._dynamo.mark_dynamic(query, 2)
    compiled(sdpa, budget=64)(query, key, value)
    site = only_site()
    assert isinstance(site.query_len, str)
    assert (site.decision, site.kernel) == ("sparse", "lychee::sparse_attention (reference)")


def ids(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (1, count), generator=generator)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_prefill_and_the_steps_after_it(kind: str) -> None:
    """A prefill in two chunks and the steps after it give dense logits if all keys are read."""
    model, size, prompt = TinyDecoder().eval(), 400, 300
    run = compiled(model, prefill_budget=10**9, budget=size - 1)
    given: list[dict[str, Any]] = [
        {"cache": StaticKV.empty(1, size)} if kind == "static" else {} for _ in range(2)
    ]
    words = ids(prompt + 4)
    chunks = slice(0, prompt // 2), slice(prompt // 2, prompt)
    for step in (*chunks, *(slice(at, at + 1) for at in range(prompt, prompt + 4))):
        outputs = [each(words[:, step], **of) for each, of in zip((model, run), given, strict=True)]
        if kind == "dynamic":
            given = [{"past": past} for _, past in outputs]
            outputs = [hidden for hidden, _ in outputs]
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    first, *later = [{site.kernel for site in each.sites} for each in lychee_compile.reports()]
    assert first == {KERNEL}
    kernels = set().union(*later)
    if kind == "dynamic":  # the first step knows that its few keys are within the budget
        kernels -= {"aten.scaled_dot_product_attention", KERNEL}
    assert kernels == {"lychee::sparse_attention (reference)"}


def chunks_of_a_step(**options: Any) -> list[Tensor]:
    """Return the starts of chunks in every layer, in the first step after a prefill."""
    model, prompt = TinyDecoder().eval(), 300
    with torch.no_grad():
        run = compiled(model, budget=64, chunk=(4, 8), dense_layers=0, **options)
        cache, words = StaticKV.empty(1, 400), ids(prompt + 1)
        run(words[:, :prompt], cache=cache)
        with lychee_compile.record() as recorder:
            run(words[:, prompt:], cache=cache)
    assert len(recorder.calls) == LAYERS
    return [call.chunk_starts for call in recorder.calls]


def test_a_sparse_prefill_notes_its_tokens() -> None:
    strengths = torch.zeros(VOCABULARY, dtype=torch.uint8)
    strengths[::7] = 3
    table = BoundaryTable(strengths)
    noted = chunks_of_a_step(tokenizer=table, boundaries="tokens")
    assert {site.kernel for site in lychee_compile.reports()[0].sites} == {KERNEL}
    torch._dynamo.reset()
    exact = chunks_of_a_step(tokenizer=table, boundaries="tokens", prefill="exact")
    assert all(torch.equal(*each) for each in zip(noted, exact, strict=True))
    torch._dynamo.reset()
    fixed = chunks_of_a_step(boundaries="fixed")
    assert noted[0].shape != fixed[0].shape or not torch.equal(noted[0], fixed[0])


def test_a_policy_for_whole_sequences_alone_decodes_exactly() -> None:
    model, prompt, words = TinyDecoder().eval(), 300, ids(301)
    table = BoundaryTable(torch.ones(VOCABULARY, dtype=torch.uint8))
    run = compiled(model, policy="s2o", budget=64, tokenizer=table)
    cache = StaticKV.empty(1, 400)
    run(words[:, :prompt], cache=cache)
    expected = model(words[:, prompt:], cache=cache.copy())
    torch.testing.assert_close(run(words[:, prompt:], cache=cache), expected, atol=1e-5, rtol=1e-5)
    prefill, step = lychee_compile.reports()
    assert all("policy s2o" in site.reads for site in prefill.sites)
    assert {site.decision for site in step.sites} == {"kept"}
    assert all("policy='s2o' cannot decode" in str(site.reason) for site in step.sites)


@dataclass(frozen=True)
class Prompts:
    """Two rows, the second padded on the left."""

    length: int = 300
    pad: int = 70

    def given(self) -> dict[str, Tensor]:
        words = torch.randint(1, 128, (2, self.length), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(words)
        words[1, : self.pad], mask[1, : self.pad] = 0, 0
        return {
            "input_ids": words,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }


@pytest.mark.parametrize(
    ("name", "attention", "padded"),
    [
        pytest.param("llama", "sdpa", False, marks=pytest.mark.thorough),
        pytest.param("llama", "eager", True, marks=pytest.mark.thorough),
        ("gemma2", "eager", False),
        pytest.param("gpt_oss", "eager", True, marks=pytest.mark.thorough),
    ],
)
def test_decoders_of_transformers_prefill(name: str, attention: str, padded: bool) -> None:
    pytest.importorskip("transformers")
    from small_decoders import model_of

    model = model_of(name, attention)
    given = Prompts().given()
    if not padded:
        given = {"input_ids": given["input_ids"][:1]}
    expected = model(**given).logits
    got = compiled(model, prefill_budget=10**9)(**given).logits
    (report,) = lychee_compile.reports()
    assert {(site.decision, site.kernel) for site in report.sites} == {("sparse", KERNEL)}
    if padded:  # what padding asks is nobody's concern
        kept = given["attention_mask"].bool()
        got, expected = got[kept], expected[kept]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_llama_prefills_and_decodes_sparsely() -> None:
    transformers = pytest.importorskip("transformers")
    from cache_names import CACHE
    from small_decoders import model_of

    model = model_of("llama")
    cache = transformers.StaticCache(model.config, max_cache_len=400)
    dense = transformers.StaticCache(model.config, max_cache_len=400)
    run = compiled(model, prefill_budget=0.9, budget=360)
    words = torch.randint(1, 128, (1, 304))
    for begin, end in [(0, 300), *((at, at + 1) for at in range(300, 304))]:
        got = run(words[:, begin:end], **{CACHE: cache}, use_cache=True).logits
        expected = model(words[:, begin:end], **{CACHE: dense}, use_cache=True).logits
        error = (got - expected).norm() / expected.norm()
        assert error < 0.05
    assert not counters["graph_break"]
    prefill, step = lychee_compile.reports()[:2]
    assert {site.kernel for site in prefill.sites} == {KERNEL}
    assert {site.kernel for site in step.sites} == {"lychee::sparse_attention (reference)"}


def test_a_recorder_tells_what_tiles_read() -> None:
    """A recorder tells the tokens read and their share of the softmax, as all scores give it."""
    query, key, value = operands()
    run = compiled(sdpa, prefill_budget=0.4)
    with recorded() as calls, lychee_compile.record(mass=True) as recorder:
        run(query, key, value)
    ((call,), (whole,)) = calls, recorder.whole
    assert (whole.query_len, whole.kv_len) == (LENGTH, LENGTH)
    assert torch.equal(whole.tokens_read, call.result.read.sum(-1))
    share = (SCALE * query @ key.mT).softmax(-1)
    read = call.result.read.repeat_interleave(QUERY_TILE, 2)[:, :, :LENGTH]
    torch.testing.assert_close(whole.mass, (share * read).sum(-1), atol=1e-5, rtol=1e-4)
    run(query, key, value)
    assert len(recorder.whole) == 1
