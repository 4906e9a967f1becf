"""Tokens of small shares that are drawn by chance, and stand for others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lychee_compile import functional
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.attention import attend, dense_attention
from lychee_compile.kernels.reference.decode_drawing import draw, luck_at, salt_of
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.sizes import LUCKIEST
from lychee_compile.options import OptionError, Options

CONFIG = IndexConfig(budget=64, sinks=2, recent=16, chunk=(4, 8), draw=True)


def shares(count, seed=0):
    """Return logarithms of shares that differ by orders of magnitude, [1, 1, 1, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, 1, count, generator=generator).mul(2).log_softmax(-1)


def drawn(rank, room, step):
    """Return what `draw` says of all tokens as candidates at one step."""
    slot = torch.arange(rank.shape[-1]).expand_as(rank)
    everything = torch.ones_like(rank, dtype=torch.bool)
    salt = salt_of(torch.tensor([step]), 1)
    return draw(rank, slot, everything, torch.full((1, 1, 1), room), salt)


def test_sums_over_what_is_drawn_are_those_over_all_on_average():
    rank, counts = shares(400), torch.zeros(400)
    wanted = torch.rand(400, generator=torch.Generator().manual_seed(1)) > 0.2
    sums = []
    for step in range(300):
        place, log_weight, taken = drawn(rank, 60, step)
        assert int(taken.sum()) == 60
        slot, weight = place[taken], log_weight[taken].exp()
        counts[slot] += 1
        sums.append((rank.flatten()[slot].exp() * weight * wanted[slot]).sum())
    true = rank.flatten().exp()[wanted].sum()
    assert abs(torch.stack(sums).mean() / true - 1) < 0.02
    largest = rank.flatten().argsort(descending=True)
    assert (counts[largest[:15]] == 300).all(), "large shares are always read"
    assert (counts[largest[60:120]] > 0).all(), "small ones are read now and then"


@pytest.mark.parametrize("slope", [0.5, 4])
def test_a_steep_softmax_is_read_from_the_top_and_fills_the_room(slope):
    rank = -slope * torch.arange(200.0)[None, None, None]
    for step in range(20):
        place, log_weight, taken = drawn(rank, 100, step)
        assert int(taken.sum()) == 100
        assert set(range(80)) <= set(place[taken].tolist())
        assert not log_weight[place < 80].any()


def test_each_luck_is_as_frequent_as_it_is_probable():
    luck = luck_at(torch.arange(2**16) + 12345).long()
    for bins in range(LUCKIEST + 1):
        frequency = (luck >= bins).float().mean()
        assert abs(frequency - 2 ** (-bins / 8)) < 2**-15
    other = luck_at(torch.arange(2**16) + 12346 + 5).long()
    together = ((luck >= 8) & (other >= 8)).float().mean()
    assert abs(together - 0.25) < 0.01, "neighbours are lucky apart"


def test_what_fits_is_read_as_it_is():
    place, log_weight, taken = drawn(shares(50), 60, 0)
    assert set(place[taken].tolist()) == set(range(50))
    assert not log_weight.any()


def step_of(length, config=CONFIG, seed=0):
    """Return an index over random keys, and the operands of one step."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 1, 2, length, 16, generator=generator).unbind(0)
    query = 2 * torch.randn(1, 4, 1, 16, generator=generator)
    index = make_index(1, 2, 16, config, torch.device("cpu"))
    index.extend(key, torch.tensor([length]))
    return index, Operands(query, key, value, None, 0.25, None)


def test_the_same_step_reads_the_same_and_another_reads_others():
    index, operands = step_of(400)
    first, again = (select(index, operands.score_inputs, 64).tokens() for _ in range(2))
    assert torch.equal(first, again)
    index.step = torch.tensor([7])
    assert not torch.equal(first, select(index, operands.score_inputs, 64).tokens())


def test_a_budget_for_everything_is_dense():
    index, operands = step_of(300)
    output, _ = attend(operands, select(index, operands.score_inputs, 300))
    assert torch.allclose(output, dense_attention(operands), atol=1e-5)


def test_steps_are_dense_on_average():
    """The mean over many steps is nearer to dense attention than what the largest shares give."""
    index, operands = step_of(400)
    dense, outputs = dense_attention(operands), []
    for step in range(200):
        index.step = torch.tensor([step])
        outputs.append(attend(operands, select(index, operands.score_inputs, 64))[0])
    plain = step_of(400, replace(CONFIG, draw=False))[0]
    largest, _ = attend(operands, select(plain, operands.score_inputs, 64))
    assert (torch.stack(outputs).mean(0) - dense).norm() < 0.6 * (largest - dense).norm()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"policy": "quest"}, 'draw=True needs policy="lychee"'),
        ({"coverage": 0.9}, "draw=True and coverage=0.9 contradict"),
        ({"epsilon": 0.1}, "draw=True and epsilon=0.1 contradict"),
        ({"draw": 1}, "draw"),
    ],
)
def test_options_that_contradict_drawing_are_named(given, words):
    with pytest.raises(OptionError, match=words):
        Options(**{"draw": True, **given})


def test_a_certificate_counts_what_is_read_once():
    """Tokens that a drawn one stands for are not read: no certificate gets smaller by them."""
    options = {"budget": 64, "sinks": 2, "recent": 16, "draw": True}
    _, operands = step_of(400)
    query, key, value = operands.query, operands.key, operands.value
    selection = functional.select(functional.build_index(key, options=options), query)
    assert (selection.log_weight > 0).any()
    _, log_read = attend(operands, selection)
    score = (query.unflatten(1, (2, 2)) @ key[:, :, None].mT * operands.scale).flatten(1, 2)
    share = (
        score.softmax(-1).masked_fill(~selection.token_mask().repeat_interleave(2, 1), 0).sum(-1)
    )
    assert torch.allclose((log_read - score.logsumexp(-1)).exp(), share, atol=1e-5)
    _, certificate = functional.sparse_attention(
        query, key, value, selection, return_certificate=True
    )
    assert (certificate >= 1 - share - 1e-6).all()


def test_tokens_that_a_kv_head_does_not_see_are_never_drawn():
    """They have no share, and kernels do not draw them either."""
    index, operands = step_of(400)
    hidden = torch.zeros(1, 4, 1, 400, dtype=torch.bool)
    hidden[:, :2, :, 100:300] = True  # KV head 0 sees half of what KV head 1 sees
    seen = replace(operands, mask=~hidden)
    read = select(index, seen.score_inputs, 300).token_mask()[0, :, 0]
    assert read[0].nonzero().flatten().tolist() == [*range(100), *range(300, 400)]
    assert int(read[1].sum()) == 300


def test_weights_survive_a_cache_that_wraps():
    """The newest tokens, which `around` cuts out of the choice, stand for themselves."""
    index, operands = step_of(400)
    index.newest = torch.tensor([[200]])
    selection = select(index, operands.score_inputs, 64)
    token, weight = selection.tokens()[0, 0, 0], selection.token_log_weight()[0, 0, 0]
    assert (token >= 0).all()
    assert len(token.unique()) == len(token) == 64
    newest = (token > 184) & (token <= 200)
    assert int(newest.sum()) == 16
    assert not weight[newest | (token < 2)].any()
    assert (weight[~newest & (token >= 2)] > 0).any()
