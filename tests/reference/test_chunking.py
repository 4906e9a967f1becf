"""Chunks: a partition, cut at the strongest boundary, the same however the tokens arrive."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CPU, DTYPES, KINDS, configs, greedy_chunks, heads, lengths, row_chunks, seeds

from lychee_compile.kernels.reference.chunking import cut_chunks, similarity_strengths
from lychee_compile.kernels.reference.strengths import StrengthTrack

chunk_ranges = st.integers(1, 9).flatmap(lambda low: st.tuples(st.just(low), st.integers(low, 16)))


@st.composite
def strength_rows(draw):
    """Draw strengths, uint8 [B, T], and the first and the end of each row."""
    batch, count = draw(st.integers(1, 3)), draw(st.integers(0, 90))
    top = draw(st.sampled_from([1, 3, 256]))
    row = st.lists(st.integers(0, top - 1), min_size=count, max_size=count)
    strength = draw(st.lists(row, min_size=batch, max_size=batch))
    end = draw(lengths(batch, count))
    first = torch.minimum(draw(lengths(batch, count)), end)
    return torch.tensor(strength, dtype=torch.uint8).view(batch, count), first, end


def pairs_of(starts, sizes, row):
    """Return [(start, length)], having checked that unused places come last and are zero."""
    pairs = list(zip(starts[row].tolist(), sizes[row].tolist(), strict=True))
    used = [pair for pair in pairs if pair[1] > 0]
    assert pairs == used + [(0, 0)] * (len(pairs) - len(used))
    return used


@given(strength_rows(), chunk_ranges)
def test_chunks_partition_the_sequence_at_its_strongest_boundaries(rows, chunk):
    strength, first, end = rows
    starts, sizes = cut_chunks(strength, first, end, chunk)
    for row in range(strength.shape[0]):
        found = pairs_of(starts, sizes, row)
        begin, stop = int(first[row]), int(end[row])
        expected, tail = greedy_chunks(strength[row].tolist(), begin, stop, chunk)
        assert found == expected
        covered = [token for start, size in found for token in range(start, start + size)]
        assert covered == list(range(begin, tail))
        assert all(chunk[0] <= size <= chunk[1] for _, size in found)
        assert stop - tail <= chunk[1]


@given(strength_rows(), chunk_ranges, st.data())
def test_cutting_as_tokens_arrive_is_cutting_at_once(rows, chunk, data):
    strength, first, end = rows
    arrivals = data.draw(st.lists(st.integers(0, 40), max_size=8).map(sorted), "arrivals")
    tail, found = first.clone(), [[] for _ in first]
    for arrived in [*arrivals, int(end.max())]:
        seen = torch.minimum(end, torch.tensor(arrived))
        known = strength[:, : int(seen.max())]
        starts, sizes = cut_chunks(known, torch.minimum(tail, seen), seen, chunk)
        for row, chunks in enumerate(found):
            chunks.extend(pairs_of(starts, sizes, row))
            if chunks:
                tail[row] = sum(chunks[-1])
    starts, sizes = cut_chunks(strength, first, end, chunk)
    assert found == [pairs_of(starts, sizes, row) for row in range(len(first))]


@given(heads, st.sampled_from(KINDS), st.sampled_from(DTYPES), seeds, st.integers(1, 40))
def test_similarity_strength_is_the_cosine_of_neighbours(shape, kind, dtype, seed, tokens):
    key = shape.keys(kind, seed, tokens, dtype)
    strength = similarity_strengths(key)
    assert strength.dtype == torch.uint8
    exact = key.double()
    cosine = torch.cosine_similarity(exact[:, :, :-1], exact[:, :, 1:], dim=-1, eps=1e-300)
    expected = (1 - cosine.mean(1)) * 127.5
    assert (strength.double() - expected).abs().le(0.51).all()


@given(heads, seeds, st.integers(3, 60), st.data())
def test_similarity_strength_depends_on_two_keys_alone(shape, seed, tokens, data):
    """Else chunks would depend on how the tokens arrived."""
    key = shape.keys("common", seed, tokens)
    begin = data.draw(st.integers(0, tokens - 2))
    end = data.draw(st.integers(begin + 2, tokens))
    part = similarity_strengths(key[:, :, begin:end])
    assert torch.equal(part, similarity_strengths(key)[:, begin : end - 1])


@given(heads, configs(), st.sampled_from(KINDS), seeds, st.data())
def test_an_index_grown_in_any_steps_has_the_chunks_of_one_built_at_once(
    shape, config, kind, seed, data
):
    tokens = data.draw(st.integers(1, 120))
    key, end = shape.keys(kind, seed, tokens), data.draw(lengths(shape.batch, tokens))
    noted = data.draw(st.booleans())
    strength = torch.randint(
        5, (shape.batch, tokens), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    grown, whole = shape.index(config), shape.index(config)
    if noted:
        for index in (grown, whole):
            index.strengths.note(torch.arange(tokens).expand(shape.batch, -1), strength)
    for arrived in data.draw(st.lists(lengths(shape.batch, 120), max_size=5)):
        # Rows go forward by different steps, or not at all.
        grown.extend(key, torch.maximum(grown.end, torch.minimum(arrived, end)))
    grown.extend(key, end)
    whole.extend(key, end)
    for row in range(shape.batch):
        assert row_chunks(grown, row) == row_chunks(whole, row)
        if config.boundaries == "fixed":
            strength.zero_()
        if noted or config.boundaries == "fixed":
            if config.boundaries == "similarity":
                continue
            stop = int(end[row])
            chunks, tail = greedy_chunks(strength[row].tolist(), 0, stop, config.chunk)
            rest = [(tail, stop - tail)] if stop > tail else []
            assert row_chunks(whole, row) == chunks + rest


def test_fixed_chunks_are_the_longest():
    starts, sizes = cut_chunks(
        torch.zeros(1, 40, dtype=torch.uint8), torch.tensor([3]), torch.tensor([40]), (2, 8)
    )
    assert starts.tolist() == [[3, 11, 19, 27]]
    assert sizes.tolist() == [[8, 8, 8, 8]]


def track(mode):
    """Return a track of 6 tokens, whose keys differ after token 2 alone."""
    key = torch.tensor([1.0, 1, 1, -1, -1, -1]).view(1, 1, 6, 1)
    strengths = StrengthTrack(1, mode, CPU)
    strengths.note(torch.tensor([[1, 4]]), torch.tensor([[3, 2]], dtype=torch.uint8))
    strengths.compare_keys(key, 0, 6)
    return strengths, key


def test_noted_strengths_go_before_those_of_keys():
    assert track("auto")[0].strength[0, :5].tolist() == [0, 3, 255, 0, 2]
    assert track("tokens")[0].strength[0, :5].tolist() == [0, 3, 0, 0, 2]
    assert track("similarity")[0].strength[0, :5].tolist() == [0, 0, 255, 0, 0]
    assert track("fixed")[0].strength[0, :5].tolist() == [0, 0, 0, 0, 0]


def test_what_was_noted_is_forgotten_from_a_position_on():
    for mode, expected in (("auto", [0, 3, 255, 0, 0]), ("tokens", [0, 3, 0, 0, 0])):
        strengths, key = track(mode)
        strengths.forget(torch.tensor([4]))
        strengths.compare_keys(key, 3, 6)
        assert strengths.strength[0, :5].tolist() == expected
