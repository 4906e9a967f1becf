"""Replayed policies: what is measured is what dense attention says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from synthetic_capture import synthetic_capture

from lychee_compile.evaluate.drift import ANEW, FOLLOWED, checkpoint_positions, drift
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.fidelity import fidelity
from lychee_compile.evaluate.replay import Replay, dense_truths
from lychee_compile.evaluate.variants import Variant, parse_variants
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select
from lychee_compile.options import OptionError

BUDGETS = (128, 256)


class RankedByFirstKey(GroupedIndex):
    """The chunks of others, ranked by their first key alone, with bounds that are wrong."""

    def summarise(self, keys, valid):
        return {"first": keys[:, :, :, 0]}

    def log_estimate(self, query, scale):
        return scale * (query @ self.summaries["first"].transpose(-1, -2))

    def group_bound(self, query, scale):
        return self.log_estimate(query, scale) - 20

    def bytes_per_step(self, tokens, budget):
        return 0


@pytest.fixture
def first_key(monkeypatch):
    monkeypatch.setitem(
        registry._policies, "first-key", registry.Policy("first-key", "", RankedByFirstKey)
    )


def test_the_truth_is_dense_attention():
    taken = synthetic_capture(200, 3)
    (site,) = taken.sites
    for truth in dense_truths(site, taken):
        length = int(taken.lengths[truth.step])
        expected = F.scaled_dot_product_attention(
            site.query[:, :, truth.step : truth.step + 1],
            site.key[:, :, :length],
            site.value[:, :, :length],
            enable_gqa=True,
        )
        torch.testing.assert_close(truth.output.float(), expected[0, :, 0])
        torch.testing.assert_close(truth.share.sum(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("policy", registry.policy_names())
def test_a_budget_for_everything_loses_nothing(policy, softcap):
    taken = synthetic_capture(300, 2, softcap=softcap)
    row = fidelity(taken, [Variant(policy)], [1000]).row(policy, 1000)
    assert row.mass == 1.0
    assert row.error < 1e-5
    assert row.certified == 1.0
    assert row.violations == 0


def test_measures_are_those_of_the_selection():
    taken = synthetic_capture(500, 1)
    (site,), variant = taken.sites, Variant("quest")
    replay = Replay(site, taken, variant.config(128))
    (truth,) = dense_truths(site, taken)
    replay.follow(500)
    measured = replay.measure(truth, 128)
    inputs = ScoreInputs(site.query, site.key, 500, None, site.scale)
    read = select(replay.index, inputs, 128).token_mask()
    score = site.scale * site.query @ site.key.repeat_interleave(2, 1).transpose(-1, -2)
    share = score.softmax(-1)[0, :, 0]
    wide = read[0, :, 0].repeat_interleave(2, 0)
    torch.testing.assert_close(measured.mass[0].float(), (share * wide).sum(-1))
    output = F.scaled_dot_product_attention(
        site.query, site.key, site.value, wide[None, :, None], enable_gqa=True
    )[0, :, 0]
    error = (output - truth.output).norm(dim=-1) / truth.output.norm(dim=-1)
    torch.testing.assert_close(measured.error[0], error, rtol=1e-4, atol=1e-5)
    tokens = read[0, :, 0].sum(-1)
    assert measured.error.min() > 1e-3
    assert measured.tokens[0].tolist() == tokens.tolist()
    assert measured.attended_bytes[0].tolist() == (2 * 2 * 16 * tokens).tolist()


@pytest.mark.parametrize("policy", ["quest", "tokenselect", "hisa", "streaming"])
@pytest.mark.parametrize("length", [495, 496, 497])
def test_a_replay_reads_what_a_step_of_decoding_does(policy, length):
    """A step has just written the token of its query, which may have filled a page."""
    taken, budget = synthetic_capture(500, 1), 128
    (site,), variant = taken.sites, Variant(policy)
    replay = Replay(site, taken, variant.config(budget))
    replay.follow(length)
    cache = CacheIndex(site.key, variant.config(budget))
    first, position = torch.zeros(1, dtype=torch.int64), torch.tensor([[length - 1]])
    cache.update(site.key, CacheWrite(first, position, None), build=True)
    inputs = ScoreInputs(site.query, site.key[:, :, :length], length, None, site.scale)
    read = [select(each, inputs, budget).token_mask() for each in (replay.index, cache.index)]
    assert torch.equal(*read)


@pytest.mark.usefixtures("first_key")
def test_the_oracle_beats_another_ranking_of_the_same_chunks():
    taken = synthetic_capture(600, 6, sites=2)
    settings = "boundaries=fixed:chunk=(8,8)"
    oracle, other = parse_variants(f"oracle:{settings},first-key:{settings}")
    result = fidelity(taken, [oracle, other], BUDGETS)
    for budget in BUDGETS:
        best, ours = (result.row(each.label, budget) for each in (oracle, other))
        assert best.tokens == pytest.approx(ours.tokens, abs=1)
        assert best.mass > ours.mass + 0.01
        assert best.error < ours.error


def test_more_budget_captures_more_and_rows_cover_every_site():
    taken = synthetic_capture(600, 3, sites=2)
    result = fidelity(taken, parse_variants("lychee,quest"), BUDGETS)
    for policy in ("lychee", "quest"):
        small, large = (result.row(policy, budget) for budget in BUDGETS)
        assert small.mass < large.mass < 1
        assert small.error > large.error > 0
        assert small.tokens <= 128
        assert small.bytes == pytest.approx(small.index_bytes + 2 * 2 * 16 * small.tokens)
        sites = [result.row(policy, 128, f"layers.{number}") for number in range(2)]
        assert small.mass == pytest.approx(sum(site.mass for site in sites) / 2)
        assert small.mass_worst_head <= small.mass
        assert small.mass_p10 <= small.mass
        assert small.choices == 2 * 3 * 4
    assert result.configs["quest"]["policy"] == "quest"
    assert len(result.to_dict()["rows"]) == 2 * 2 * 3


@pytest.mark.usefixtures("first_key")
def test_a_certificate_that_does_not_hold_is_found_out():
    taken = synthetic_capture(600, 2)
    result = fidelity(taken, parse_variants("first-key,lychee"), [128])
    assert result.row("first-key", 128).violations > 0
    assert result.row("lychee", 128).violations == 0


def test_epsilon_certifies_every_choice():
    taken = synthetic_capture(600, 2)
    label = "lychee:epsilon=0.1"
    row = fidelity(taken, parse_variants(label), [128]).row(label, 128)
    assert row.certified == 1.0
    assert row.mass >= 0.9
    assert row.violations == 0


def test_tokens_that_are_drawn_are_measured_as_they_are_read():
    """Their certificates hold: what a token stands for is not read."""
    taken = synthetic_capture(600, 2)
    result = fidelity(taken, parse_variants("lychee,lychee:draw=True"), [128])
    largest, drawn = (result.row(label, 128) for label in ("lychee", "lychee:draw=True"))
    assert drawn.tokens == largest.tokens
    assert drawn.mass < largest.mass
    assert drawn.violations == 0


def test_a_share_to_cover_reads_fewer_tokens():
    taken = synthetic_capture(600, 2)
    labels = ["lychee:coverage=0.5", "lychee:coverage=0.8", "lychee"]
    result = fidelity(taken, parse_variants(",".join(labels)), [300])
    few, more, most = (result.row(label, 300) for label in labels)
    assert few.tokens < more.tokens < most.tokens == 300
    assert few.mass < more.mass < most.mass
    assert few.mass > 0.45


def test_boundaries_come_from_the_capture():
    taken = synthetic_capture(400, 1)
    noted = Replay(taken.sites[0], taken, Variant("lychee", {"boundaries": "tokens"}).config(128))
    blind = replace(taken, strengths=None)
    fixed = Replay(taken.sites[0], blind, Variant("lychee", {"boundaries": "fixed"}).config(128))
    for replay in (noted, fixed):
        replay.follow(400)
    starts, lengths = noted.index.partition()
    inner = ((starts + lengths) < 380) & (lengths > 0) & (lengths < 16)
    ends = (starts + lengths)[inner] - 1
    assert len(ends) > 5
    assert bool((taken.strengths[ends] > 0).all())
    assert not torch.equal(starts, fixed.index.partition()[0])


def test_drift_begins_where_an_index_built_anew_is_and_follows():
    positions = checkpoint_positions(300, 1200, 400, 2)
    assert positions == [300, 301, 700, 701, 1100, 1101]
    whole = synthetic_capture(1200, 1200)
    at = torch.tensor(positions)
    (site,) = whole.sites
    sampled = replace(site, query=site.query[:, :, at])
    taken = replace(whole, sites=(sampled,), positions=at)
    seen = []
    result = drift(taken, parse_variants("lychee,quest"), 128, seen.append)
    assert len(seen) == 3
    for policy in ("lychee", "quest"):
        followed, anew = result.curve(policy), result.curve(policy, ANEW)
        assert [point.generated for point in followed] == [0, 400, 800]
        assert followed[0] == replace(anew[0], index=followed[0].index)
        assert all(point.error > 0 and point.violations == 0 for point in followed)
        assert result.ratio(policy, 800, 400) == followed[2].error / followed[1].error
        assert result.ratio(policy, 8000) is None
    errors = [[point.error for point in result.curve("quest", index)] for index in (FOLLOWED, ANEW)]
    assert errors[0] == errors[1]  # pages are the same whenever they are summarised


def test_drift_needs_checkpoints_apart():
    with pytest.raises(EvaluationError, match="neighbouring positions alone"):
        drift(synthetic_capture(300, 4), [Variant("lychee")], 128)
    with pytest.raises(EvaluationError, match="leaves nothing of 100"):
        checkpoint_positions(100, 100, 10, 1)
    with pytest.raises(EvaluationError, match="11 queries every 10 tokens"):
        checkpoint_positions(50, 100, 10, 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lichee", "did you mean 'lychee'"),
        ("lychee:recent", "expected NAME or NAME:option=value, got 'recent'"),
        ("lychee:recnt=3", "unknown option 'recnt'"),
        ("lychee:recent=1", "recent=1 must be at least"),
        ("lychee,lychee", "named twice"),
        (" ,", "expected policies separated by commas"),
    ],
)
def test_wrong_policies_are_refused(text, message):
    with pytest.raises(OptionError, match=message):
        parse_variants(text)


def test_a_policy_with_options_keeps_its_label():
    text = "lychee:chunk=(4, 8):boundaries=fixed"
    (variant,) = parse_variants(text)
    assert variant.label == text
    config = variant.config(500)
    assert (config.chunk, config.boundaries, config.budget) == ((4, 8), "fixed", 500)
    with pytest.raises(OptionError, match="budget=50 is too small"):
        fidelity(synthetic_capture(200, 1), [variant], [50])
