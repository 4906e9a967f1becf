"""Policies for prefill: what each chooses, worked out again by plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefill_problems import Whole, prefill_config, wholes
from strategies import greedy_chunks
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.policies.prefill import compact, dhsa, lychee, s2o
from lychee_compile.kernels.policies.prefill.positions import places
from lychee_compile.kernels.reference.chunking import similarity_strengths
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import prefill_attention
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion, as_drawn
from lychee_compile.kernels.reference.tiles import Sight, tile_sight
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

POLICIES = registry.prefill_policy_names()


def question_of(whole: Whole, room: int, sinks: int = 2, recent: int = 3) -> PrefillQuestion:
    """Return the question to a policy about all tiles of a prefill, with the same room in each."""
    batch, heads, query_len, _ = whole.query.shape
    device, kv_len = whole.query.device, whole.key.shape[2]
    sight = Sight(whole.mask, whole.causal, batch, query_len, kv_len, device, whole.order)
    query = whole.query if whole.order is None else whole.query.index_select(2, whole.order)
    tiles = tile_sight(sight, 0, query_len, sinks, recent)
    rooms = torch.full((batch, heads, -(-query_len // QUERY_TILE)), room)
    key = whole.key.float()
    return PrefillQuestion(query.float(), key, whole.scale, whole.softcap, tiles, rooms)


questions = st.builds(question_of, wholes(), st.integers(0, 200))
"""Questions with every mask and distribution."""
plain_questions = st.builds(
    question_of,
    wholes(dtypes=(torch.float32,), kinds=("gaussian", "topics"), longest=260),
    st.integers(1, 120),
)
"""Questions about keys among which no rounding decides."""


def answer(policy: str, question: PrefillQuestion) -> Tensor:
    """Return the keys that a policy chooses, none of them by chance: bool [B, Hq, tiles, L]."""
    return as_drawn(registry.prefill_choice(policy)(question)).read


@pytest.mark.parametrize("policy", POLICIES)
@given(question=questions)
def test_candidates_are_chosen_at_most_the_room(policy: str, question: PrefillQuestion):
    chosen = answer(policy, question)
    assert chosen.shape == question.candidates.shape
    assert chosen.dtype == torch.bool
    assert not bool((chosen & ~question.candidates).any())
    count, there = chosen.sum(-1), question.candidates.sum(-1)
    assert bool((count <= question.room).all())
    if policy != "s2o":
        assert torch.equal(count, torch.minimum(question.room, there))
    assert bool((count == there)[question.room >= there].all())
    assert torch.equal(chosen, answer(policy, question))


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_keys_are_taken_in_their_order(policy: str):
    key = torch.zeros(1, 1, 300, 4)
    query = torch.randn(1, 2, 130, 4, generator=torch.Generator().manual_seed(0))
    sight = tile_sight(Sight(None, False, 1, 130, 300, key.device), 0, 130, 2, 5)
    question = PrefillQuestion(query, key, 1.0, None, sight, torch.full((1, 2, 2), 70))
    chosen = answer(policy, question)
    expected = range(225, 295) if policy == "streaming" else range(2, 72)
    for row in chosen.flatten(0, 2):
        assert row.nonzero().flatten().tolist() == list(expected)


def each_tile(question: PrefillQuestion) -> list[tuple[int, int, int]]:
    """Return row, query head and tile, one after another."""
    return list(itertools.product(*map(range, question.room.shape)))


def queries_of(question: PrefillQuestion, row: int, head: int, tile: int) -> Tensor:
    """Return the queries of one tile, float64 [T, D]."""
    return question.query[row, head, tile * QUERY_TILE : (tile + 1) * QUERY_TILE].double()


def keys_of(question: PrefillQuestion, row: int, head: int) -> Tensor:
    """Return the keys of one query head, float64 [L, D]."""
    group = question.query.shape[1] // question.key.shape[1]
    return question.key[row, head // group].double()


def score_of(question: PrefillQuestion, row: int, head: int, tile: int, vector: Tensor) -> Tensor:
    """Return scores of one vector [D] as the softmax sees them, float64 [L]."""
    score = question.scale * keys_of(question, row, head) @ vector
    if question.softcap is not None:
        score = question.softcap * torch.tanh(score / question.softcap)
    sight, heads = question.sight, question.query.shape[1]
    if sight.bias is not None:
        score = score + sight.bias.expand(len(question.query), heads, -1, -1)[row, head, tile]
    some = sight.some.expand(len(question.query), heads, -1, -1)[row, head, tile]
    return score.masked_fill(~some, -torch.inf)


def best(question: PrefillQuestion, row: int, head: int, tile: int, rank: list[float]) -> list[int]:
    """Return the candidates of highest rank that there is room for, the first of equals."""
    there = question.candidates[row, head, tile].nonzero().flatten().tolist()
    there.sort(key=lambda n: (-rank[n], n))
    return sorted(there[: int(question.room[row, head, tile])])


@given(question=plain_questions)
def test_lychee_ranks_by_the_largest_log_share(question: PrefillQuestion):
    got = lychee.log_shares(question)
    for row, head, tile in each_tile(question):
        queries = queries_of(question, row, head, tile)
        expected = torch.full((question.key.shape[2],), -torch.inf, dtype=torch.float64)
        there = question.candidates[row, head, tile]
        for part in queries.split(QUERY_TILE // lychee.CENTRES_PER_TILE):
            score = score_of(question, row, head, tile, part.mean(0))
            total = math.log(16) + score[::16][there[::16]].logsumexp(-1)
            share = score - total if total > -torch.inf else score
            expected = torch.maximum(expected, share)
        torch.testing.assert_close(got[row, head, tile].double(), expected, rtol=1e-3, atol=1e-3)


@given(question=plain_questions)
def test_streaming_takes_the_last(question: PrefillQuestion):
    chosen = registry.prefill_choice("streaming")(question)
    for row, head, tile in each_tile(question):
        wanted = best(question, row, head, tile, [float(n) for n in range(chosen.shape[-1])])
        assert chosen[row, head, tile].nonzero().flatten().tolist() == wanted


def chunks_of(vectors: Tensor) -> list[range]:
    """Return chunks of vectors [H, T, D] by the definition, cut where neighbours differ most."""
    strength = [*similarity_strengths(vectors[None])[0].tolist(), 0]
    decided, tail = greedy_chunks(strength, 0, len(strength), dhsa.CHUNK)
    spans = [range(start, start + length) for start, length in decided]
    return [*spans, range(tail, len(strength))]


def union_rank(lists: list[list[range]], there: list[bool], length: int) -> list[float]:
    """Rank of each key where askers have lists of groups, the best first."""
    place = [math.inf] * length
    for groups in lists:
        ahead = 0
        for group in groups:
            for n in group:
                place[n] = min(place[n], ahead)
            ahead += sum(there[n] for n in group)
    return [-p for p in place]


@given(question=plain_questions)
def test_dhsa_takes_the_most_similar_chunks(question: PrefillQuestion):
    chosen = dhsa.choose_by_chunks(question)
    for row, head, tile in each_tile(question):
        keys, there = keys_of(question, row, head), question.candidates[row, head, tile].tolist()
        groups = chunks_of(question.key[row])
        of_all_heads = question.query[row, :, tile * QUERY_TILE : (tile + 1) * QUERY_TILE]
        lists = []
        for asker in chunks_of(of_all_heads):
            query = of_all_heads[head, asker].double().sum(0) / len(asker) ** 0.5
            similar = [
                question.scale * float(query @ keys[group].sum(0)) / len(group) ** 0.5
                for group in groups
            ]
            order = sorted(range(len(groups)), key=lambda n: -similar[n])
            lists.append([groups[n] for n in order])
        rank = union_rank(lists, there, len(keys))
        assert chosen[row, head, tile].nonzero().flatten().tolist() == best(
            question, row, head, tile, rank
        )


@given(question=plain_questions)
def test_compact_takes_the_union_of_a_group(question: PrefillQuestion):
    chosen = compact.choose_block_union(question)
    group = question.query.shape[1] // question.key.shape[1]
    for row, head, tile in each_tile(question):
        first = head // group * group
        keys = keys_of(question, row, head)
        blocks = [
            range(begin, min(begin + compact.BLOCK, len(keys)))
            for begin in range(0, len(keys), compact.BLOCK)
        ]
        together = question.candidates[row, first : first + group, tile].any(0).tolist()
        lists = []
        for other in range(first, first + group):
            queries = queries_of(question, row, other, tile)
            for part in queries.split(QUERY_TILE // compact.QUERY_BLOCKS_PER_TILE):
                mean = question.scale * part.mean(0)
                score = [float(mean @ keys[block].mean(0)) for block in blocks]
                order = sorted(range(len(blocks)), key=lambda n: -score[n])
                lists.append([blocks[n] for n in order])
        rank = union_rank(lists, together, len(keys))
        assert chosen[row, head, tile].nonzero().flatten().tolist() == best(
            question, row, head, tile, rank
        )


def test_compact_reads_one_table_of_blocks_for_a_group():
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 900, 8), torch.randn(1, 2, 900, 8)
    config = prefill_config("compact", 0.4)
    read = prefill_attention(Operands(query, key, key, None, 0.5), config, causal=True).read
    for head in range(0, 4, 2):
        assert torch.equal(read[:, head], read[:, head + 1])
    assert not torch.equal(read[:, 0], read[:, 2])


@given(question=plain_questions)
def test_s2o_stops_where_the_next_block_adds_little(question: PrefillQuestion):
    chosen = s2o.choose_until_it_wanes(question)
    for row, head, tile in each_tile(question):
        there = question.candidates[row, head, tile].nonzero().flatten().tolist()
        mean = queries_of(question, row, head, tile).mean(0)
        score = score_of(question, row, head, tile, mean)
        order = sorted(there, key=lambda n: (-float(score[n]), n))
        room = int(question.room[row, head, tile])
        always = question.sight.always.expand_as(question.candidates)[row, head, tile]
        total = float(score[always].logsumexp(0))
        read: list[int] = []
        for begin in range(0, len(order), s2o.BLOCK):
            block = order[begin : begin + s2o.BLOCK]
            adds = float(score[block].logsumexp(0))
            if adds < total + math.log(s2o.LEAST_SHARE):
                break
            read, total = [*read, *block], float(np.logaddexp(total, adds))
        wanted = order[:room] if room >= len(there) else read[:room]
        assert chosen[row, head, tile].nonzero().flatten().tolist() == sorted(wanted)


def test_s2o_reads_less_than_its_budget_where_few_keys_matter():
    torch.manual_seed(0)
    key = torch.randn(1, 1, 1000, 8)
    key[:, :, 100:110] += 8
    query = torch.ones(1, 1, 1000, 8) + 0.1 * torch.randn(1, 1, 1000, 8)
    mask = torch.ones(1000, 1000, dtype=torch.bool)
    operands = Operands(query, key, key, mask, 1.0)
    result = prefill_attention(operands, prefill_config("s2o", 0.8))
    assert result.read.sum(-1).max() <= 16 + 64 + (64 + QUERY_TILE + 64) + s2o.BLOCK
    assert bool(result.read[..., 100:110].all())


def test_places_take_equally_many_from_every_list():
    rank = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [-torch.inf] * 4])
    counts = torch.tensor([5, 1, 7, 2])
    assert places(rank, counts).tolist() == [0, 5, 2, 0]


@given(question=questions)
def test_pages_left_out_hold_next_to_nothing(question: PrefillQuestion):
    check_negligible(question)


def check_negligible(question: PrefillQuestion) -> int:
    """Check that such candidates together hold less than promised of any softmax; count them."""
    small = lychee._negligible(question) & question.candidates
    for row, head, tile in each_tile(question):
        queries, keys = queries_of(question, row, head, tile), keys_of(question, row, head)
        # What is not a candidate only adds to the sum that the promise is a share of.
        there = question.candidates[row, head, tile]
        score = question.scale * queries @ keys.transpose(0, 1)
        held = score.masked_fill(~there, -torch.inf).softmax(-1).nan_to_num()
        missed = held.masked_fill(~small[row, head, tile], 0).sum(-1)
        assert missed.max() <= lychee.NEGLIGIBLE_SHARE
    return int(small.sum())


def test_far_pages_are_left_out():
    torch.manual_seed(0)
    about = torch.nn.functional.normalize(torch.randn(16), dim=-1)
    side = 1 - 2 * (torch.arange(1000) // PAGE % 2)
    key = 0.1 * torch.randn(1, 1, 1000, 16) + 3 * side[:, None] * about
    query = 0.2 * torch.randn(1, 2, 256, 16) + 8 * about
    sight = tile_sight(Sight(None, False, 1, 256, 1000, key.device), 0, 256, 16, 64)
    question = PrefillQuestion(query, key, 1.0, None, sight, torch.full((1, 2, 2), 100))
    assert check_negligible(question) > 0.4 * question.candidates.sum()


def test_a_policy_for_whole_sequences_alone_is_an_option_but_cannot_decode():
    for name in ("s2o", "compact"):
        assert lychee_compile.Options(policy=name).policy == name
        assert not registry.has_index(name)
        with pytest.raises(ValueError, match=f"policy '{name}' is for prefill alone"):
            registry.index_class(name)
    assert registry.has_index("lychee")
    with pytest.raises(ValueError, match="policy 'quest' has no form for prefill"):
        registry.prefill_choice("quest")


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the registered policies when the test is over."""
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))


def choose_first(question: PrefillQuestion) -> Tensor:
    """Return the first keys a tile sees."""
    slot = torch.arange(question.key.shape[2])
    return question.take(-slot.float().expand_as(question.candidates))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("index", [registry.index_class("quest"), None])
def test_a_policy_of_ones_own_chooses_for_whole_sequences(index: type[KVIndex] | None):
    lychee_compile.register_policy("first", index, tiles=choose_first)
    assert lychee_compile.Options(policy="first").policy == "first"
    assert registry.has_index("first") == (index is not None)
    query = torch.randn(1, 1, 100, 4)
    operands = Operands(query, torch.randn(1, 1, 500, 4), torch.randn(1, 1, 500, 4), None, 1.0)
    read = prefill_attention(operands, prefill_config("first", 100, 0, 10)).read
    assert read.nonzero()[:, -1].tolist() == [*range(90), *range(490, 500)]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("name", "index", "tiles", "error", "message"),
    [
        ("mine", None, None, TypeError, "a policy is a LevelStack or a .* KVIndex, got None"),
        ("mine", None, "first", TypeError, "chooses for prefill by a function"),
        ("mine", dict, choose_first, TypeError, "a policy is a LevelStack or a"),
        ("lychee", None, choose_first, ValueError, "policy 'lychee' for prefill already"),
        (
            "lychee",
            registry.index_class("oracle"),
            choose_first,
            ValueError,
            "there is a policy 'lychee' already",
        ),
    ],
)
def test_what_is_no_policy_is_refused_whole(
    name: str, index: type | None, tiles: Callable | None, error: type[Exception], message: str
):
    before = registry.policy_names(), registry.prefill_policy_names()
    with pytest.raises(error, match=message):
        lychee_compile.register_policy(name, index, tiles=tiles)
    assert (registry.policy_names(), registry.prefill_policy_names()) == before
