"""Keys of a prefill that are drawn by chance: how often, and what they count."""

from __future__ import annotations

import math

import pytest
import torch
from prefill_problems import prefill_config
from torch import Tensor

from lychee_compile.kernels.reference.drawing import (
    LEAST,
    UNSEEN,
    covering_bin,
    draws_keys,
    log_weight,
    luck_of,
    share_bins,
)
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import prefill_attention
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import Sight, tile_sight
from lychee_compile.kernels.sizes import BINS, LUCKIEST, WHOLE_SHARE

SLOTS = 1 << 20


def question_of(log_share: Tensor, room: int, **more: object) -> PrefillQuestion:
    """Return a question about one tile of keys whose shares are given, float32 [L]."""
    kv_len = len(log_share)
    sight = tile_sight(Sight(None, False, 1, 128, kv_len, log_share.device), 0, 128, 0, 0)
    query, key = torch.zeros(1, 1, 128, 4), torch.zeros(1, 1, kv_len, 4)
    rooms = torch.tensor([[[room]]])
    return PrefillQuestion(query, key, 1.0, None, sight, rooms, draws=True, **more)


def shares(kv_len: int, spread: float, seed: int = 0) -> Tensor:
    """Return logarithms of shares that add up to 1, float32 [L]."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(kv_len, generator=generator)).log_softmax(-1)


def test_small_budgets_draw_no_keys():
    assert [draws_keys(*each) for each in ((0.2, 2559), (0.2, 2560), (600, 9000), (600, 500))] == [
        False, True, True, False,
    ]  # fmt: skip
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 1300, 8) for _ in range(3))
    operands = Operands(query, key, value, None, 1.0)
    few, many = (
        prefill_attention(operands, prefill_config(budget=keys), causal=True) for keys in (500, 520)
    )
    assert torch.equal(few.log_sum, few.log_read)
    assert bool((many.log_sum >= many.log_read).all())
    assert not torch.equal(many.log_sum, many.log_read)


def test_luck_is_as_likely_as_weights_assume():
    luck = luck_of(torch.arange(SLOTS))
    assert (int(luck.min()), int(luck.max())) == (0, LUCKIEST)
    for least in range(1, LUCKIEST + 1):
        chance = 2.0 ** (-least / 8)
        seen = (luck >= least).double().mean().item()
        assert abs(seen - chance) < 5 * math.sqrt(chance / SLOTS) + 2**-16


def test_bins_of_shares_leave_room_for_luck():
    log_share = torch.tensor([0.0, 3.0, math.log(0.5), -90.0, -torch.inf, torch.nan, torch.inf])
    bins = share_bins(log_share).tolist()
    whole = WHOLE_SHARE
    assert bins == [whole, whole + 7, whole - 8, LEAST, UNSEEN, whole, whole]
    assert max(bins) + LUCKIEST < BINS - 1


@pytest.mark.parametrize(("spread", "room"), [(0.5, 400), (2.0, 400), (2.0, 2500), (6.0, 100)])
def test_sums_over_drawn_keys_are_those_over_all(spread: float, room: int):
    """Sums of values, weighed by shares and by other shares than those estimated."""
    kv_len = 4000
    log_share = shares(kv_len, spread)
    drawn = question_of(log_share, room).draw(log_share.expand(1, 1, 1, -1))
    assert int(drawn.read.sum()) == room
    read, weight = drawn.read[0, 0, 0], drawn.log_weight[0, 0, 0].exp()
    assert bool((weight[read] >= 1).all())
    off = (0.3 * torch.randn(kv_len, generator=torch.Generator().manual_seed(1))).exp()
    for each in (log_share.exp(), log_share.exp() * off):
        estimate = (each * weight)[read].sum() / each.sum()
        assert abs(estimate - 1) < 4 / math.sqrt(room)
    top = log_share.exp().topk(room).values.sum()
    assert top < 1 - 1e-3 or spread > 5  # the largest alone hold less


def test_keys_count_once_if_there_is_room_for_all_that_are_seen():
    log_share = shares(300, 3.0)
    log_share[100:120] = -torch.inf
    for room, unseen in ((280, 0), (285, 5), (300, 20), (400, 20)):
        drawn = question_of(log_share, room).draw(log_share.expand(1, 1, 1, -1))
        assert bool((drawn.log_weight == 0).all())
        assert int(drawn.read[..., 100:120].sum()) == unseen
        assert int(drawn.read.sum()) == min(room, 300)


def test_an_important_key_is_read_whatever_its_luck():
    log_share = torch.full((1000,), math.log(1e-5))
    unlucky = int(luck_of(torch.arange(1000)).argmin())
    log_share[unlucky] = math.log(0.5)
    drawn = question_of(log_share, 50).draw(log_share.expand(1, 1, 1, -1))
    assert bool(drawn.read[..., unlucky])
    assert float(drawn.log_weight[..., unlucky]) == 0


def test_without_chance_the_best_are_taken():
    log_share = shares(500, 2.0)
    question = question_of(log_share, 60)
    plain = PrefillQuestion(
        question.query, question.key, 1.0, None, question.sight, question.room
    ).draw(log_share.expand(1, 1, 1, -1))
    assert plain.log_weight is None
    assert set(plain.read.flatten().nonzero().flatten().tolist()) == set(
        log_share.topk(60).indices.tolist()
    )


@pytest.mark.parametrize("coverage", [0.3, 0.8, 0.97])
def test_a_coverage_ends_the_choice_and_keeps_sums(coverage: float):
    log_share = shares(4000, 3.0)
    wide = log_share.expand(1, 1, 1, -1)
    all_room = question_of(log_share, 2000).draw(wide)
    ended = question_of(log_share, 2000, coverage=coverage).draw(wide)
    assert bool((ended.read <= all_room.read).all())
    assert int(ended.read.sum()) < 1900
    sure = ended.read & (ended.log_weight == 0)
    assert (log_share.exp() * sure[0, 0, 0]).sum() >= coverage - 0.02
    total = (log_share.exp() * ended.log_weight[0, 0, 0].exp() * ended.read[0, 0, 0]).sum()
    assert abs(total - 1) < 0.2
    whole = question_of(log_share, 4000, coverage=coverage).draw(wide)
    assert bool(whole.read.all())
    tight = question_of(log_share, 20, coverage=coverage).draw(wide)
    assert int(tight.read.sum()) <= 20


def test_the_covering_bin_by_a_plain_loop():
    log_share = torch.stack([shares(200, 2.0, seed) for seed in range(4)])
    candidates = torch.rand(4, 200, generator=torch.Generator().manual_seed(0)) > 0.3
    bins = share_bins(log_share)
    got = covering_bin(bins, candidates, 0.7)[:, 0].tolist()
    for row, each in enumerate(got):
        mass = torch.exp2((bins[row].double() - WHOLE_SHARE + 0.5) / 8) * candidates[row]
        above = [float(mass[bins[row] > level].sum()) for level in range(LEAST, BINS)]
        enough = [level for level, held in enumerate(above, LEAST) if held >= 0.7 * mass.sum()]
        assert each == max(enough, default=0)


def test_weights_of_the_first_octaves():
    weight = log_weight(torch.tensor(50), torch.tensor([51, 50, 42, 34, UNSEEN]))
    expected = torch.tensor([0, 0.5, 8.5, 16.5, 0]) / 8 * math.log(2)
    torch.testing.assert_close(weight, expected)
