"""Two processes that share a model by its heads: each indexes its own, and all agree."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed is built without gloo", allow_module_level=True)

from tensor_parallel_worker import (
    HEADS,
    KV_HEADS,
    RANKS,
    SMALL_BUDGET,
    STEPS,
    WIDTH,
    Outcome,
    compile_for,
    decode_attention,
    decode_llama,
    locked,
    run_on_ranks,
    seeded_attention,
)

LAYERS = 1
HEADS_PER_RANK = {(HEADS // RANKS, KV_HEADS // RANKS)}
WAYS = ("functional all_reduce", "all_reduce in place", "parallelize_module")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes that run these tests: what ranks come to is found once."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "ranks"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def llama_folder(shared_folder: Path) -> Path:
    """Save a small random Llama, and return its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
    )
    with locked(shared_folder):
        if not (shared_folder / "config.json").exists():
            transformers.LlamaForCausalLM(config).save_pretrained(shared_folder)
    return shared_folder


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Any:
    """The whole model in this process."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            each, marks=pytest.mark.thorough
        )  # CI decodes with the attention by hand alone
        for each in ("sharded_llama", "inductors_llama")
    ],
)
def llama_ranks(request: pytest.FixtureRequest, llama_folder: Path) -> list[dict[str, Outcome]]:
    """Return the outcomes of two ranks that decode with the saved model."""
    return run_on_ranks(request.param, llama_folder)


@pytest.fixture(scope="module")
def attention_ranks(shared_folder: Path) -> list[dict[str, Outcome]]:
    """Return the outcomes of two ranks that decode with an attention written by hand."""
    return run_on_ranks("sharded_attention", shared_folder)


def of(ranks: list[dict[str, Outcome]], name: str) -> list[Outcome]:
    return [rank[name] for rank in ranks]


def check_same(outcomes: list[Outcome], tokens: Tensor, logits: Tensor) -> None:
    """Check that every rank decodes the same tokens, with these logits."""
    for outcome in outcomes:
        torch.testing.assert_close(outcome["tokens"], tokens)
        torch.testing.assert_close(outcome["logits"], logits, atol=1e-4, rtol=1e-4)


def check_sparse(outcomes: list[Outcome], layers: int) -> None:
    """Check that every attention of every rank is sparse, over the rank's own heads alone."""
    for outcome in outcomes:
        counted = outcome["counted"]
        assert counted["sparse"] == counted["found"] >= layers
        assert outcome["decisions"] == {"sparse"}
        assert outcome["heads"] == HEADS_PER_RANK
        assert outcome["heads_read"] == {KV_HEADS // RANKS}
        assert outcome["calls"] == layers * STEPS


@pytest.mark.parametrize("name", ["dynamic", "static"])
@torch.no_grad()
def test_ranks_that_read_everything_decode_like_one_dense_process(
    name: str, llama: Any, llama_ranks: list[dict[str, Outcome]]
) -> None:
    outcomes = of(llama_ranks, name)
    check_sparse(outcomes, LAYERS)
    check_same(outcomes, *decode_llama(llama, llama, name))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_ranks_read_what_one_sparse_process_reads(
    kind: str, llama: Any, llama_ranks: list[dict[str, Outcome]], without_inductor: None
) -> None:
    outcomes = of(llama_ranks, f"{kind}, small budget")
    check_sparse(outcomes, LAYERS)
    assert {outcome["most_read"] for outcome in outcomes} == {SMALL_BUDGET["budget"]}
    compiled = compile_for(kind, llama, SMALL_BUDGET)
    tokens, logits = decode_llama(llama, compiled, kind)
    check_same(outcomes, tokens, logits)
    _, dense = decode_llama(llama, llama, kind)
    assert (logits - dense).abs().max() > 1e-3, "something was left out"


def test_the_backend_communicates_nothing(llama_ranks: list[dict[str, Outcome]]) -> None:
    for collectives in of(llama_ranks, "collectives"):
        assert collectives["eager"]["gloo:all_reduce"] >= 2 * LAYERS
        assert collectives["lychee"] == collectives["eager"]


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_attention_sharded_by_hand(
    way: str, attention_ranks: list[dict[str, Outcome]], without_inductor: None
) -> None:
    model = seeded_attention()
    outcomes = of(attention_ranks, way)
    check_sparse(outcomes, layers=1)
    check_same(outcomes, *decode_attention(model, model, KV_HEADS))

    outcomes = of(attention_ranks, f"{way}, small budget")
    check_sparse(outcomes, layers=1)
    compiled = torch.compile(model, backend="lychee", options=SMALL_BUDGET)
    check_same(outcomes, *decode_attention(model, compiled, KV_HEADS))
    assert {outcome["most_read"] for outcome in outcomes} == {SMALL_BUDGET["budget"]}
