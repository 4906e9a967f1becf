"""The index of a cache stays true while the cache is written, rewound, reused and tampered with."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    KINDS,
    Heads,
    configs,
    greedy_chunks,
    heads,
    lengths,
    row_chunks,
    seeds,
)

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import SAMPLES, CacheIndex, CacheWrite
from lychee_compile.kernels.trust import Trust

CAPACITY = 320
"""More than the longest history writes."""
SHAPE = Heads(2, 2, 1, 4)
CONFIG = IndexConfig(sinks=2, recent=8, chunk=(2, 4), cluster_chunks=2, budget=20)
ORIGIN = torch.zeros(2, dtype=torch.int64)


def span(begin, end, batch):
    """Return positions [begin, end) of every row: int64 [B, T]."""
    return torch.arange(begin, end).expand(batch, -1)


def assert_describes(index, key, first, end):
    """Check that the chunks cover [first, end) of each row, and have the means of its keys now."""
    index.complete(key)
    for row in range(index.batch):
        chunks = row_chunks(index, row)
        covered = [token for start, size in chunks for token in range(start, start + size)]
        assert covered == list(range(int(first[row]), int(end[row])))
        mean = index.fields["chunk_mean"]
        for start, size in chunks:
            number = start // index.settings.chunk[0]
            if start >= int(index.tail[row]) or not index.span[row, number]:
                continue
            exact = key[row, :, start : start + size].double()
            expected, limit = exact.mean(1), 1e-5 * exact.abs().max()
            assert ((mean[row, :, number] - expected).abs() <= limit).all()


class Rig:
    """A static cache with its index, and every way to change it."""

    def __init__(self, shape, config, kind, dtype):
        self.shape, self.kind, self.dtype = shape, kind, dtype
        self.key = torch.zeros(shape.batch, shape.kv_heads, CAPACITY, shape.head_dim, dtype=dtype)
        self.cache = CacheIndex(self.key, config)
        self.first = torch.zeros(shape.batch, dtype=torch.int64)
        self.end = 0

    def write(self, begin, count, seed, build=True):
        """Write the tokens at [begin, begin + count), as a graph writes and reports them."""
        self.end = begin + count
        self.fill(begin, self.end, seed)
        positions = span(begin, self.end, self.shape.batch)
        self.cache.update(self.key, CacheWrite(self.first, positions, None), build)

    def wrap(self, begin, count, seed):
        """Write `count` slots from `begin` on, around the end, in a ring buffer that is full."""
        slots = (begin + torch.arange(count)) % self.end
        keys = self.shape.keys(self.kind, seed, count, self.dtype)
        self.key[:, :, slots] = keys
        batch = self.shape.batch
        write = CacheWrite(
            self.first, slots.expand(batch, -1), None, torch.full((batch,), self.end)
        )
        self.cache.update(self.key, write, True)

    def go_around(self, steps, seed):
        """Overwrite slots in turn, in between two of them around the end; read some meanwhile."""
        for offset in range(steps):
            self.wrap(steps + offset, 1, seed + offset)
            if offset == steps // 2:
                self.check_bounds(seed)
                self.cache.index.complete(self.key)
        if self.end > 2:
            self.wrap(self.end - 1, 2, seed)

    def check_bounds(self, seed):
        """Check that no score exceeds its bound."""
        index = self.cache.index
        query = self.shape.queries(seed, 1)[:, :: self.shape.group]
        bound = index.score_bound(query, 1.0)
        if bound is None:
            return
        slot = torch.arange(bound.shape[-1])
        known = (slot >= index.start[:, None]) & (slot < index.tail[:, None])
        score = query.double() @ self.key[:, :, : len(slot)].double().mT
        assert (~known[:, None, None] | (score <= bound.double())).all()

    def fill(self, begin, end, seed):
        self.key[:, :, begin:end] = self.shape.keys(self.kind, seed, end - begin, self.dtype)


@st.composite
def rigs(draw):
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    return Rig(draw(heads), draw(configs()), kind, dtype)


events = st.lists(
    st.tuples(
        st.sampled_from(
            ["decode", "rewind", "foreign", "prompt", "prefill", "pad", "unpad", "ring"]
        ),
        st.integers(1, 30),
    ),
    max_size=8,
)


@given(rigs(), events, st.integers(1, 60))
def test_the_index_describes_the_cache_after_anything(rig, steps, prompt):
    rig.write(0, prompt, 0)
    for seed, (event, number) in enumerate(steps, 1):
        if event == "rewind":  # rejected drafts: earlier positions are written again
            rig.write(max(rig.end - number, 0), 1, seed)
        elif event == "foreign":  # reorder, restored prefix: somebody else wrote the cache
            rig.fill(max(rig.end - number, 0), rig.end, seed)
            rig.cache.distrust()
            rig.write(rig.end, 1, seed)
        elif event == "prompt":  # reset and prefilled eagerly, then decoded on
            rig.end = number
            rig.fill(0, number, seed)
            rig.cache.distrust()
            rig.write(number, 1, seed)
        elif event == "prefill":  # a dense prefill notes, a later step builds
            rig.write(rig.end, number, seed, build=False)
            rig.write(rig.end, 1, seed)
        elif event == "ring":
            rig.go_around(number, seed)
        elif event == "decode":
            for offset in range(number):
                rig.write(rig.end, 1, seed + offset)
        else:
            rig.first += number if event == "pad" else -number
            rig.first.clamp_(0, rig.end - 1)
            rig.write(rig.end, 1, seed)
        rig.check_bounds(seed)
        first = torch.minimum(rig.first, rig.cache.index.start)
        assert (rig.cache.index.start <= rig.first).all(), "visible tokens before the index"
        assert_describes(rig.cache.index, rig.key, first, torch.full_like(first, rig.end))
        assert rig.cache.trust is Trust.TRUSTED


@given(rigs(), st.integers(2, 119), seeds, st.data())
def test_a_distrusted_cache_is_compared_key_by_key(rig, tokens, seed, data):
    """One changed number anywhere is found, though no version moved."""
    rig.write(0, tokens, seed)
    place = [data.draw(st.integers(0, size - 1)) for size in (*rig.key.shape[:2], tokens)]
    channel = data.draw(st.integers(0, rig.key.shape[3] - 1))
    rig.key.data[(*place, channel)] += 1e3
    rig.cache.distrust()
    write = CacheWrite(rig.first, span(tokens, tokens + 1, rig.shape.batch), None)
    rig.cache.update(rig.key, write, True)
    assert_describes(rig.cache.index, rig.key, rig.first, torch.full_like(rig.first, tokens + 1))


@given(rigs(), st.integers(2, 119), seeds, st.data())
def test_sampling_finds_what_nobody_reported(rig, tokens, seed, data):
    """A write through `.data` leaves no trace; a key is sampled once in tokens / SAMPLES steps."""
    rig.write(0, tokens, seed)
    changed = data.draw(st.integers(0, tokens - 2))
    rig.key.data[:, :, changed] += 1e3
    for _ in range(max((tokens - 1) // SAMPLES, 1)):
        rig.write(tokens - 1, 1, seed + 1)
    assert_describes(rig.cache.index, rig.key, rig.first, torch.full_like(rig.first, tokens))


@given(heads, configs(boundaries="auto"), seeds, st.data())
def test_noted_strengths_survive_until_their_token_is_rewritten(shape, config, seed, data):
    """A dense prefill notes them; chunks made later, and after a rewind, end where they say."""
    tokens, keep = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 79))
    keep = min(keep, tokens)
    key = shape.keys("gaussian", seed, CAPACITY)
    strength = torch.randint(
        5, (shape.batch, CAPACITY), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    cache, first = CacheIndex(key, config), torch.zeros(shape.batch, dtype=torch.int64)
    write = CacheWrite(first, span(0, tokens, shape.batch), strength[:, :tokens])
    cache.update(key, write, False)
    assert not cache.index.span.any()
    again = strength.flip(1)
    written = span(keep, keep + 25, shape.batch)
    cache.update(key, CacheWrite(first, written, again[:, keep : keep + 25]), True)
    for row in range(shape.batch):
        known = [*strength[row, :keep].tolist(), *again[row, keep : keep + 25].tolist()]
        chunks, tail = greedy_chunks(known, 0, keep + 25, config.chunk)
        assert row_chunks(cache.index, row) == [*chunks, (tail, keep + 25 - tail)]


def test_a_rewritten_token_without_a_strength_has_that_of_its_key():
    key = torch.ones(1, 1, 40, 4)
    key[:, :, 21:] = -1
    strengths = torch.zeros(1, 40, dtype=torch.uint8)
    strengths[:, 18] = 4
    cache = CacheIndex(key, IndexConfig(chunk=(17, 30), recent=30))
    cache.update(key, CacheWrite(ORIGIN[:1], span(0, 40, 1), strengths), True)
    assert row_chunks(cache.index, 0)[0] == (0, 19)
    cache.update(key, CacheWrite(ORIGIN[:1], span(10, 40, 1), None), True)
    assert row_chunks(cache.index, 0)[0] == (0, 21)


@given(configs(), seeds, st.data())
def test_ragged_rows_are_indexed_as_each_would_be_alone(config, seed, data):
    """Rows written at different positions, from different first tokens."""
    begin = data.draw(lengths(2, 60))
    steps = data.draw(st.integers(1, 40))
    first = torch.minimum(data.draw(lengths(2, 10)), begin)
    key = SHAPE.keys("topics", seed, 101)
    together = CacheIndex(key, config)
    alone = [CacheIndex(key[row : row + 1], config) for row in (0, 1)]
    for chunk in (torch.arange(steps), torch.arange(steps, steps + 1)):
        # The keys before `begin` were there already, as after an eager prefill.
        positions = begin[:, None] + chunk
        together.update(key, CacheWrite(first, positions, None), True)
        for row, cache in enumerate(alone):
            part = slice(row, row + 1)
            cache.update(key[part], CacheWrite(first[part], positions[part], None), True)
    for row, cache in enumerate(alone):
        assert row_chunks(together.index, row) == row_chunks(cache.index, 0)
    assert_describes(together.index, key, first, begin + steps + 1)


def test_a_ring_keeps_what_it_does_not_overwrite():
    """The steps of a full ring neither index its keys anew nor leave any of them out."""
    key = SHAPE.keys("gaussian", 0, 64)
    cache, end = CacheIndex(key, CONFIG), ORIGIN + 64
    cache.update(key, CacheWrite(ORIGIN, span(0, 64, 2), None), False)
    extended = []
    for step in range(70):
        slot = 10 + step % 54
        key[:, :, slot] = SHAPE.keys("gaussian", step, 1)[:, :, 0]
        cache.update(key, CacheWrite(ORIGIN, span(slot, slot + 1, 2), None, end), True)
        extended.append(cache.index.span.clone())
        if slot < 63:  # at the last slot a ring looks like a cache that has just been filled
            assert cache.index.tail.tolist() == [64, 64]
            assert cache.index.newest.tolist() == [[slot], [slot]]
    assert torch.equal(extended[0], extended[50])
    assert_describes(cache.index, key, ORIGIN, end)


def test_the_index_begins_again_when_earlier_slots_become_visible():
    key = SHAPE.keys("gaussian", 0, 60)
    cache = CacheIndex(key, CONFIG)
    padded = torch.tensor([0, 12])
    cache.update(key, CacheWrite(padded, span(0, 50, 2), None), True)
    assert cache.index.start.tolist() == [0, 12]
    kept = row_chunks(cache.index, 0)
    cache.update(key, CacheWrite(ORIGIN + 5, span(50, 51, 2), None), True)
    assert cache.index.start.tolist() == [0, 5]
    assert_describes(cache.index, key, torch.tensor([0, 5]), ORIGIN + 51)
    assert row_chunks(cache.index, 0)[: len(kept) - 1] == kept[:-1]


def test_a_cache_that_was_cropped_is_followed():
    """A dynamic cache cut back is a shorter tensor, with other tokens from there on."""
    key = SHAPE.keys("gaussian", 0, 80)
    cache = CacheIndex(key, CONFIG)
    cache.update(key, CacheWrite(ORIGIN, span(0, 80, 2), None), True)
    cropped = torch.cat((key[:, :, :40], SHAPE.keys("common", 1, 1)), 2)
    cache.distrust()
    cache.update(cropped, CacheWrite(ORIGIN, span(40, 41, 2), None), True)
    assert_describes(cache.index, cropped, ORIGIN, ORIGIN + 41)


def test_rows_that_were_reordered_are_told_apart():
    """Beam search: row 1 goes on from row 0, whose own index is kept."""
    key = SHAPE.keys("gaussian", 0, 80)
    cache = CacheIndex(key, CONFIG)
    cache.update(key, CacheWrite(ORIGIN, span(0, 60, 2), None), True)
    cache.index.complete(key)
    known = cache.index.fields["chunk_mean"][0, :, :20].clone()
    key[1] = key[0]
    cache.distrust()
    cache.update(key, CacheWrite(ORIGIN, span(60, 61, 2), None), True)
    assert_describes(cache.index, key, ORIGIN, ORIGIN + 61)
    assert torch.equal(cache.index.fields["chunk_mean"][0, :, :20], known)


def test_untouched_keys_are_not_indexed_again():
    key = SHAPE.keys("gaussian", 0, 100)
    cache = CacheIndex(key, CONFIG)
    cache.update(key, CacheWrite(ORIGIN, span(0, 60, 2), None), True)
    cache.index.complete(key)
    before = cache.index.fields["chunk_mean"].clone()
    for position in range(60, 70):
        cache.distrust()
        cache.update(key, CacheWrite(ORIGIN, span(position, position + 1, 2), None), True)
    assert int((cache.index.span > 0).sum(1).min()) > 10
    cache.index.complete(key)
    assert torch.equal(cache.index.fields["chunk_mean"][:, :, :27], before[:, :, :27])
