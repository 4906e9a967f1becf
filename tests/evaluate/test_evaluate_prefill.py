"""Prefill of a model: what is captured, and what is measured over it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from evaluated import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, saved_tiny_model, tiny_llama
from prefill_problems import prefill_config
from synthetic_capture import synthetic_capture
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lychee_compile.__main__ import main
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.prefill import dense_tiles, measure, prefill, tiles_of
from lychee_compile.evaluate.prefill_capture import (
    NAME,
    capture_prefill,
    causal_attention,
    tile_positions,
)
from lychee_compile.evaluate.variants import parse_variants
from lychee_compile.kernels.sizes import QUERY_TILE
from lychee_compile.options import OptionError

pytestmark = pytest.mark.usefixtures("seeded")
SHARES = [0.3, 0.6]
LENGTH = 900


def small(kind: type, **more):
    """Return a random model of two layers."""
    config = kind(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.5,
        pad_token_id=0,
        **more,
    )
    made = {Gemma2Config: Gemma2ForCausalLM, GptOssConfig: GptOssForCausalLM}[kind](config)
    return made.eval()


def some_ids(length: int = LENGTH) -> torch.Tensor:
    """Return ids, int64 [L]."""
    return torch.randint(1, 256, (length,))


def test_tiles_are_spread_over_the_later_two_thirds():
    positions = torch.tensor(tile_positions(12 * QUERY_TILE + 50, 5)).view(-1, QUERY_TILE)
    assert bool((positions.diff(dim=1) == 1).all())
    assert (positions[:, 0] // QUERY_TILE).tolist() == [5, 6, 8, 10, 11]
    assert len(tile_positions(12 * QUERY_TILE, 100)) == 8 * QUERY_TILE
    with pytest.raises(EvaluationError, match="--length 200: expected at least 256"):
        tile_positions(200, 3)


def test_what_is_captured_is_what_the_model_attends_to():
    model, ids = tiny_llama(), some_ids()
    expected = model(ids[None]).logits
    before = model.config._attn_implementation
    seen, positions = [], tile_positions(LENGTH, 2)
    taken = capture_prefill(model, ids, positions, name="tiny", text="noise", advance=seen.append)
    assert [site.name for site in taken.sites] == [
        f"model.layers.{number}.self_attn" for number in range(LAYERS)
    ]
    assert sum(seen) == LENGTH
    assert taken.positions.tolist() == positions
    assert model.config._attn_implementation == before
    assert NAME not in ALL_ATTENTION_FUNCTIONS
    torch.testing.assert_close(model(ids[None]).logits, expected)
    # The second layer's input went through the first one's attention.
    last = taken.sites[-1]
    assert last.query.shape == (1, QUERY_HEADS, 2 * QUERY_TILE, HEAD_DIM)
    assert last.key.shape == last.value.shape == (1, KV_HEADS, LENGTH, HEAD_DIM)
    outputs = []
    projection = model.model.layers[-1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    model(ids[None])
    hook.remove()
    for number, tile in enumerate(dense_tiles(last, tiles_of(taken))):
        place = taken.positions[number * QUERY_TILE : (number + 1) * QUERY_TILE]
        ours = tile.output.transpose(0, 1).flatten(1)
        torch.testing.assert_close(ours, outputs[0][0, place], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [None, 100, 513])
def test_dense_attention_in_blocks_is_pytorchs(window: int | None):
    query, key, value = (torch.randn(1, heads, 1100, 8) for heads in (4, 2, 2))
    slot = torch.arange(1100)
    seen = slot <= slot[:, None]
    if window is not None:
        seen &= slot > slot[:, None] - window
    expected = F.scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value, 0.3, window), expected)


def test_sliding_windows_are_left_out_and_soft_caps_kept():
    model, ids = (
        small(Gemma2Config, query_pre_attn_scalar=8, attn_logit_softcapping=4.0),
        some_ids(),
    )
    taken = capture_prefill(model, ids, tile_positions(LENGTH, 1))
    (site,) = taken.sites
    assert site.name == "model.layers.1.self_attn"
    assert site.softcap == 4.0
    outputs = []
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    model.set_attn_implementation("eager")
    model(ids[None])
    hook.remove()
    (tile,) = dense_tiles(site, tiles_of(taken))
    ours = tile.output.transpose(0, 1).flatten(1)
    torch.testing.assert_close(ours, outputs[0][0, taken.positions], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_captured_is_named():
    model = small(GptOssConfig, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(EvaluationError) as raised:
        capture_prefill(model, some_ids(), tile_positions(LENGTH, 1))
    assert "model.layers.0.self_attn: it does not see the whole sequence: a sl" in str(raised.value)
    assert "model.layers.1.self_attn: it has attention sinks" in str(raised.value)
    with pytest.raises(EvaluationError, match=r"among those named \*\.7\.\*"):
        capture_prefill(tiny_llama(), some_ids(), tile_positions(LENGTH, 1), sites=["*.7.*"])


def tiles_capture(tiles: int = 2, length: int = 1000, **more):
    """Return a synthetic capture of whole tiles, the last ones of a sequence."""
    taken = synthetic_capture(length, length, **more)
    at = taken.positions[length - tiles * QUERY_TILE :]
    sites = tuple(replace(site, query=site.query[:, :, at]) for site in taken.sites)
    return replace(taken, sites=sites, positions=at)


@pytest.mark.parametrize("policy", ["lychee", "streaming", "dhsa", "s2o", "compact"])
def test_reading_nearly_everything_loses_nothing(policy: str):
    taken = tiles_capture(softcap=5.0)
    (site,) = taken.sites
    for tile in dense_tiles(site, tiles_of(taken)):
        measured = measure(tile, site, prefill_config(policy, tile.key.shape[2]))
        assert bool((measured.mass == 1).all())
        assert measured.error.max() < 1e-5
        assert torch.equal(measured.pairs, measured.dense_pairs)


def test_measures_are_those_of_what_is_read():
    taken = tiles_capture(1)
    (site,) = taken.sites
    (tile,) = dense_tiles(site, tiles_of(taken))
    measured = measure(tile, site, prefill_config("streaming", 0.4, 8, 16))
    # Read: sinks, the own tile, and the last keys that fill the budget before it.
    slot, position = torch.arange(1000), taken.positions[:, None]
    kept = (slot < 8) | (slot >= 1000 - 400 + 8)
    seen = slot <= position
    key = site.key.repeat_interleave(2, 1)
    score = site.scale * site.query @ key.transpose(-1, -2)
    share = score.masked_fill(~seen, -torch.inf).softmax(-1)[0]
    torch.testing.assert_close(measured.mass[0].float(), (share * kept).sum(-1))
    pairs = (seen & kept).sum()
    assert measured.pairs.tolist() == [[pairs] * 4]
    assert measured.dense_pairs.tolist() == [[seen.sum()] * 4]
    output = F.scaled_dot_product_attention(
        site.query, key, site.value.repeat_interleave(2, 1), seen & kept, scale=site.scale
    )[0]
    error = (output - tile.output).norm(dim=-1) / tile.output.norm(dim=-1)
    torch.testing.assert_close(measured.error[0].float(), error, rtol=1e-3, atol=1e-5)


def test_a_larger_share_captures_more_and_rows_cover_every_site():
    taken = tiles_capture(sites=2)
    done = []
    result = prefill(taken, parse_variants("lychee,streaming:recent=32"), SHARES, done.append)
    assert len(done) == 2 * 2
    for policy in ("lychee", "streaming:recent=32"):
        less, more = (result.row(policy, share) for share in SHARES)
        assert less.mass < more.mass < 1
        assert less.error > more.error > 0
        assert less.pairs < SHARES[0] < more.pairs < SHARES[1] + 0.01
        sites = [result.row(policy, 0.3, f"layers.{number}") for number in range(2)]
        assert less.mass == pytest.approx(sum(site.mass for site in sites) / 2)
        assert less.error < less.error_p90
        assert less.mass_worst_head <= less.mass
        assert less.queries == 2 * 4 * 2 * QUERY_TILE
    best, floor = (result.row(policy, 0.3) for policy in ("lychee", "streaming:recent=32"))
    assert best.mass > floor.mass + 0.05
    assert result.configs["streaming:recent=32"]["recent"] == 32
    assert len(result.to_dict()["rows"]) == 2 * 2 * 3


def test_single_queries_are_no_tiles():
    with pytest.raises(EvaluationError, match="single queries, not whole tiles of 128"):
        prefill(synthetic_capture(300, 3), parse_variants("lychee"), SHARES)
    with pytest.raises(OptionError, match="'quest' has no form for prefill"):
        prefill(tiles_capture(), parse_variants("quest"), SHARES)


def evaluate(command: str) -> int:
    return main(["evaluate", *shlex.split(command)])


def test_the_command_measures_a_model(tmp_path: Path, capsys):
    folder = saved_tiny_model(tmp_path / "model")
    status = evaluate(
        f"prefill --model {folder} --out {tmp_path} --length 700 --tiles 2 --save-captures "
        "--policies lychee,s2o --shares 0.3,0.6 --sites *.layers.1.*"
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "Prefill: model, code, 640 tokens, 2 tiles of queries, 1 att" in printed.out
    assert (tmp_path / "error_against_pairs.png").read_bytes().startswith(b"\x89PNG")
    (result,) = json.loads((tmp_path / "results.json").read_text())["prefill"]
    assert len(result["rows"]) == 2 * 2 * 2
    assert all(0 < row["mass"] <= 1 and row["error"] > 0 for row in result["rows"])
    kept = tmp_path / "captures" / "code-640-prefill.safetensors"
    again = tmp_path / "again"
    assert (
        evaluate(f"prefill --capture {kept} --policies lychee,s2o --shares 0.6,0.3 --out {again}")
        == 0
    )
    (replayed,) = json.loads((again / "results.json").read_text())["prefill"]
    for ours, theirs in zip(replayed["rows"], result["rows"], strict=True):
        assert ours["error"] == pytest.approx(theirs["error"], abs=1e-6)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prefill", "--model is needed: a folder"),
        ("prefill --policies quest", "policy 'quest' has no form for prefill"),
        ("fidelity --policies s2o", "policy 's2o' is for prefill alone"),
        ("prefill --shares 0.1,2", "argument --shares: '2': expected a number between 0 and 1"),
        ("prefill --shares few", "argument --shares: 'few': expected a number between 0 and 1"),
        ("prefill --tiles 0", "argument --tiles: '0': expected an integer of at least 1"),
        ("prefill --length 100", "--length 100: expected at least 256, for whole tiles"),
    ],
)
@pytest.mark.usefixtures("in_a_folder")
def test_errors_are_one_line(command: str, message: str, capsys):
    assert evaluate(command) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m lychee_compile: error: ")
    assert message in line


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a test in a folder of its own, for results that the test does not look at."""
    monkeypatch.chdir(tmp_path)
