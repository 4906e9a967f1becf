"""The examples, each run in small: what it returns, and what it shows."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._dynamo.utils import counters

from lychee_compile.kernels.policies import registry

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTEXT, BUDGET, NEW_TOKENS, LAYERS = 160, 96, 6, 2
ALL = CONTEXT + NEW_TOKENS - 1  # tokens that the last step sees

pytestmark = pytest.mark.usefixtures("without_inductor")


def example(name: str) -> ModuleType:
    return importlib.import_module(f"examples.{name}")


def decode(name, budget, *more):
    """Return what an example generates in steps that read `budget` tokens."""
    sizes = ("--context", CONTEXT, "--new-tokens", NEW_TOKENS, "--budget", budget)
    return example(name).main([*map(str, sizes), "--device", "cpu", *more])


def words(capsys):
    """Return the printed text as one line."""
    return " ".join(capsys.readouterr().out.split())


# transformers' cache has no room to spare, and one within the budget would not be read sparsely.
@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("generate_llama", ALL - 1),
        ("gpt_fast", ALL),
        pytest.param("nanogpt", ALL, marks=pytest.mark.thorough),
    ],
)
def test_sparse_steps_that_read_all_decode_the_same_tokens(name, budget, capsys):
    decoded = decode(name, budget)
    assert counters["lychee"]["sparse"] == LAYERS
    assert torch.equal(decoded.dense, decoded.sparse)
    assert all(
        call.tokens_read.eq(min(call.kv_len, budget)).all() for call in decoded.recorder.calls
    )
    assert min(call.mass.min() for call in decoded.recorder.calls) > 0.99
    assert f"The first {NEW_TOKENS} of {NEW_TOKENS} tokens are the same." in words(capsys)


def check_reading(decoded, site):
    """Check that each step reads the budget, and more of the softmax than as many of any tokens."""
    assert {call.site for call in decoded.recorder.calls} == {site.format(n) for n in range(LAYERS)}
    assert [call.kv_len for call in decoded.recorder.calls[::LAYERS]] == [
        *range(CONTEXT + 1, ALL + 1)
    ]
    assert all(call.tokens_read.eq(BUDGET).all() for call in decoded.recorder.calls)
    assert min(call.mass.mean() for call in decoded.recorder.calls) > BUDGET / CONTEXT
    assert decoded.dense[0, 0] == decoded.sparse[0, 0]  # of the prefill


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("generate_llama", "model.layers.{}.self_attn"),
        ("gpt_fast", "model.layers.{}.attention"),
    ],
)
def test_steps_over_a_static_cache_read_the_budget(name, site, capsys):
    decoded = decode(name, BUDGET)
    assert [report.counts()["sparse"] for report in decoded.reports] == [LAYERS]
    check_reading(decoded, site)
    printed = words(capsys)
    reading = f"{NEW_TOKENS - 1} steps read {BUDGET} of {CONTEXT + 3} tokens, which hold 0\\."
    assert re.search(rf"layers\.0\.\w+: {reading}", printed)
    assert f"budget {BUDGET} of up to" in printed


def test_nanogpt_prefills_by_one_operator_and_decodes_sparsely(capsys):
    decoded = decode("nanogpt", BUDGET)
    prefill, *steps = decoded.reports
    assert {(site.form, site.decision) for site in prefill.sites} == {("eager", "exact")}
    assert {site.query_len for site in prefill.sites} == {CONTEXT}
    # Dynamo compiles a second time once it sees the cache grow, for all lengths.
    assert [report.counts()["sparse"] for report in steps] == [LAYERS, LAYERS]
    check_reading(decoded, "blocks.{}.attention")
    error = re.search(r"Prefill, logits: largest difference (\S+)", words(capsys))
    assert float(error[1]) < 1e-5


def test_bert_keeps_the_bits_of_sdpa_and_fuses_what_is_written_out(capsys):
    sizes = ["--context", "40", "--device", "cpu", "--against", "aot_eager"]
    compared = example("bert_encoder").main(sizes)
    sdpa, eager = compared["sdpa"], compared["eager"]
    assert sdpa.same_bits
    assert sdpa.report.counts() == {"found": LAYERS, "sparse": 0, "exact": 0, "kept": LAYERS}
    assert all(site.by_design for site in sdpa.report.sites)
    assert eager.report.counts() == {"found": LAYERS, "sparse": 0, "exact": LAYERS, "kept": 0}
    assert max(sdpa.error, eager.error) < 1e-5
    assert {site.mask for site in eager.report.sites} == {"padding attention_mask"}
    printed = words(capsys)
    assert "2 attentions: 2 kept" in printed
    assert "2 attentions: 2 exact" in printed
    assert "sdpa: the same bits as aot_eager" in printed


def test_vit_makes_no_score_matrix(capsys):
    compared = example("vit").main(["--image", "32", "--patch", "8", "--device", "cpu"])
    assert compared.report.counts() == {"found": LAYERS, "sparse": 0, "exact": LAYERS, "kept": 0}
    assert {site.query_len for site in compared.report.sites} == {17}
    assert compared.error < 1e-5
    assert "2 attentions: 2 exact" in words(capsys)


SPARSE = ["--from", "64", "--device", "cpu"]
"""Arguments for a sparse prefill from 64 tokens on; shares below 1 may still be all keys."""


@pytest.mark.parametrize(("share", "error"), [("0.2", 0.5), ("0.999999", 1e-5)])
def test_vit_reads_blocks_of_patches(share, error, capsys):
    sizes = ["--image", "160", "--patch", "8", "--batch", "1"]
    compared = example("vit").main([*sizes, "--sparse", share, *SPARSE])
    assert compared.report.counts() == {"found": LAYERS, "sparse": LAYERS, "exact": 0, "kept": 0}
    assert {site.query_len for site in compared.report.sites} == {401}
    assert (compared.relative_error > 1e-5) == (share == "0.2")
    assert compared.relative_error < error
    printed = words(capsys)
    assert "2 attentions: 2 sparse" in printed
    assert "Logits: largest difference" in printed
    assert "in blocks of 16 x 8 patches" in compared.report.sites[0].reads


@pytest.mark.parametrize(("share", "error"), [("0.2", 0.1), ("0.999999", 1e-5)])
def test_bert_reads_what_matters(share, error, capsys):
    sizes = ["--context", "400", "--sparse", share]
    (compared,) = example("bert_encoder").main([*sizes, *SPARSE]).values()
    assert compared.report.counts() == {"found": LAYERS, "sparse": LAYERS, "exact": 0, "kept": 0}
    assert {site.mask for site in compared.report.sites} == {"padding attention_mask"}
    assert (compared.relative_error > 1e-5) == (share == "0.2")
    assert compared.relative_error < error
    printed = words(capsys)
    assert "2 attentions: 2 sparse" in printed
    assert f"{compared.relative_error:.1e}" in printed


def test_whisper_reads_few_frames_of_sound(capsys):
    decoded = decode("whisper", BUDGET)
    decoder = decoded.reports[-1]
    decisions = {site.name.rpartition(".")[2]: site.decision for site in decoder.sites}
    assert decisions == {"self_attn": "kept", "encoder_attn": "sparse"}
    assert decoder.counts() == {"found": 2 * LAYERS, "sparse": LAYERS, "exact": 0, "kept": LAYERS}
    # The encoder's keys are only read, and indexed when they come a second time.
    assert len(decoded.recorder.calls) == LAYERS * (NEW_TOKENS - 2)
    assert {call.kv_len for call in decoded.recorder.calls} == {CONTEXT}
    assert all(call.tokens_read.eq(BUDGET).all() for call in decoded.recorder.calls)
    assert min(call.mass.mean() for call in decoded.recorder.calls) > BUDGET / CONTEXT
    assert torch.equal(decoded.dense, decoded.sparse)
    printed = words(capsys)
    assert "2 attentions: 2 kept" in printed  # the encoder
    assert "4 attentions: 2 sparse, 2 kept" in printed


@pytest.mark.thorough
def test_custom_policy_takes_sizes(monkeypatch, capsys):
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    sizes = ["--context", "200", "--budget", "120", "--device", "cpu"]
    errors = example("custom_policy").main(sizes)
    assert errors["streaming"] > errors["gaussian"] > 0
    assert "budget 120 of up to 210 tokens, policy gaussian" in words(capsys)


def test_the_table_has_every_example():
    page = (EXAMPLES / "README.md").read_text("utf-8")
    named = set(re.findall(r"^\| \[([\w/]+\.py)\]", page, re.MULTILINE))
    scripts = {*EXAMPLES.glob("*.py"), *EXAMPLES.glob("models/*.py")}
    scripts = {path for path in scripts if "__main__" in path.read_text("utf-8")}
    assert named == {path.relative_to(EXAMPLES).as_posix() for path in scripts}
    for command in re.findall(r"`python (examples/\S+\.py)", page):
        assert (EXAMPLES.parent / command).is_file()


@pytest.mark.parametrize(
    "path", [*EXAMPLES.glob("[a-z]*.py"), *EXAMPLES.glob("models/*.py")], ids=lambda path: path.stem
)
def test_an_example_can_be_copied_alone(path):
    """It imports no other file of the examples, the tests or the benchmarks."""
    here = {each.stem for each in EXAMPLES.rglob("*.py")} | {"examples", "tests", "benchmarks"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.partition(".")[0] not in here
        elif isinstance(node, ast.Import):
            assert not {name.name.partition(".")[0] for name in node.names} & here


def test_a_server_gives_each_request_the_tokens_that_it_gets_alone(capsys):
    """Rows are taken over by other requests, a prefix is shared, and the budget holds all."""
    sizes = {"rows": 2, "requests": 4, "prefix": 32, "context": 90, "new-tokens": 5, "width": 64}
    given = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    compared = example("serving").main([*given, "--budget", "95", "--device", "cpu", "--no-dense"])
    assert compared.decisions == ["sparse"] * 2
    assert compared.served["lychee"].said == compared.alone
    assert [len(each) for each in compared.alone] == [5, 4, 3, 5]
    assert "4 of 4 answers are those of dense decoding" in words(capsys)


def test_a_server_needs_prompts_that_are_longer_than_the_prefix(capsys):
    with pytest.raises(SystemExit):
        example("serving").main(["--prefix", "600", "--context", "700"])
    assert "--context 700: at least 800 for --prefix 600" in capsys.readouterr().err
