"""Kernels of chunks and clusters, interpreted, choose what the plain form does, up to ties."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, MASKS, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from known_policies import known_policies
from level_fits import table_of
from level_steps import EVENTS, Case, Steps, follow

from lychee_compile.codegen.parts import levels
from lychee_compile.kernels.gpu.levels import chunk_index as device_chunks
from lychee_compile.kernels.gpu.levels import shares
from lychee_compile.kernels.gpu.owners import _moved
from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack
from lychee_compile.kernels.levels.expressions import (
    count,
    dot,
    field,
    greatest,
    key,
    least,
    mean,
    query,
    softmax_scale,
)
from lychee_compile.kernels.levels.groups import Chunks, Clusters, TokenClusters

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

MOMENTS = {"middle": mean(key), "spread": mean((key - field("middle")) ** 2)}
GAUSSIAN = dot(query, field("middle")) + softmax_scale * dot(query**2, field("spread")) / 2
SMALL = {
    "one_level_of_clusters": LevelStack(
        levels=(
            Level(
                Clusters(), fields={"of_cluster": mean(key)},
                estimate=dot(query, field("of_cluster")), keep=Keep(1),
            ),
            Level(Chunks(), fields=MOMENTS, estimate=GAUSSIAN),
        ),
    ),
    "boxes_of_chunks": LevelStack(
        levels=(
            Level(
                Chunks(),
                fields={
                    "low": least(key), "high": greatest(key), "size": mean(dot(key, key)) / count,
                },
                estimate=dot(query, field("low")) + dot(query, field("high")) + field("size"),
            ),
        ),
        sinks=2,
        vote="layer",
    ),
    "small_clusters": LevelStack(
        levels=(
            Level(
                TokenClusters(size=8, window=24), fields={"centre": mean(key)},
                estimate=dot(query, field("centre")),
            ),
        ),
        recent=1,
    ),
}  # fmt: skip
POLICIES = ["dhsa", "lycheecluster", *SMALL]
EXAMPLES = max(settings().max_examples // 6, 1)
"""Interpreted kernels are slow."""
SEEN = [each for each in MASKS if each not in ("none", "mask by head")]
"""Masks that kernels and the plain form see alike."""
ROWS = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)]
"""Batch, KV heads and query positions."""


@pytest.fixture(autouse=True, scope="module")
def small_stacks() -> Iterator[None]:
    """Small stacks are known until these tests are over, and few tokens have clusters."""
    with known_policies(SMALL) as patch:
        patch.setattr(device_chunks, "REFIT", 16)
        yield


@st.composite
def cases(draw) -> tuple[Case, int]:
    """Draw an attention without its policy, and how many tokens it begins with."""
    slots = draw(st.integers(60, 180))
    batch, kv_heads, query_len = draw(st.sampled_from(ROWS))
    dim = draw(st.sampled_from([16, 24]))
    sizes = Sizes(batch, kv_heads, draw(st.integers(1, 4)), query_len, slots, dim, 16)
    case = Case(
        policy="",
        sizes=sizes,
        budget=draw(st.integers(20, 90)),
        sinks=draw(st.integers(0, 4)),
        recent=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mask=draw(st.sampled_from(SEEN)),
        score=draw(st.sampled_from(["scaled", "soft-cap"])),
        seed=draw(st.integers(0, 99)),
    )
    return case, draw(st.integers(50, slots - 8))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=EXAMPLES)
@given(drawn=cases(), history=st.lists(st.sampled_from(EVENTS), min_size=2, max_size=3))
def test_kernels_choose_as_the_plain_form_does(policy, drawn, history):
    case, length = drawn
    case.policy = policy
    follow(Steps(case, length), history)


@pytest.mark.parametrize(
    "policy",
    [
        "dhsa",
        "lycheecluster",
        pytest.param("one_level_of_clusters", marks=pytest.mark.thorough),
    ],
)
def test_many_programs_rank_and_list_as_one_does(policy, monkeypatch):
    """Sixteen groups at a time, so that quotas end in a lot behind others."""
    monkeypatch.setattr(levels, "RANKED", 16)
    monkeypatch.setattr(levels, "BYTES_AT_ONCE", 0)
    monkeypatch.setattr(shares, "PROGRAMS", 2)
    case = Case(policy, Sizes(1, 2, 2, 1, 500, 16, 16), budget=60, chunk=(3, 5), seed=1)
    follow(Steps(case, 440), ["step", "rewind far", "refit", "step"])


@pytest.mark.thorough
def test_groups_are_looked_into_without_a_fit_for_a_long_time():
    """All chunks since the last fit are open: far more than lists and scans are made for."""
    case = Case("lycheecluster", Sizes(1, 1, 2, 4, 400, 16, 16), budget=40, chunk=(3, 5))
    steps = Steps(case, 60)
    first = steps.index.named["open_2"].clone()
    follow(steps, ["step"] * 4)
    steps.length = 40  # back before the last fit
    for _ in range(3):
        new_keys(steps, steps.length, steps.length + 90)
        steps.length += 90
        steps.plain.distrust()
        follow(steps, ["step"])
        assert steps.index.parts.header[0] == 1
    assert (steps.index.named["open_2"] < first).all()


@given(seed=st.integers(0, 99), groups=st.integers(0, 30))
def test_the_first_open_group_is_used_and_in_no_cluster(seed, groups):
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, 3, (2, 3, groups), generator=random)
    used = torch.rand(2, 1, groups, generator=random) < 0.7
    found = device_chunks.first_open(label, used)
    for row, head in itertools.product(range(2), range(3)):
        there = (used[row, 0] & (label[row, head] < 0)).nonzero()[:, 0].tolist()
        assert int(found[row, head]) == min(there, default=groups)


def new_keys(steps, first, last):
    """Let the kernels learn that the slots [first, last) were written; rows lag by 5 each."""
    module, index, key = steps.case.problem(steps.length).module(), steps.index, steps.key
    named, layout = index.named, index.layout
    late = 5 * torch.arange(len(key))[:, None]
    positions = (torch.arange(first, last) - late).to(torch.int64)
    fields = [named[f"summary_{name}"] for name in layout.stack.levels[-1].fields]
    chunks = len(layout.stack.levels) - 1
    label = [named[f"label_{chunks}"], named[f"open_{chunks}"]] if chunks else []
    for b in range(key.shape[0]):
        for h in range(key.shape[1]):
            module.index_new[(1,)](
                key, *key.stride(), index.parts.header, named["fingerprints"],
                named["strength"], named["span"], named["span"].shape[2], *label, *fields,
                positions, *positions.stride(), last - first,
                b, h, layout.slots, key.shape[1], key.shape[2],
            )  # fmt: skip


@st.composite
def writes(draw, batch=2, slots=150):
    """Draw how many tokens are indexed at once, and then ranges of slots that steps write."""
    length = draw(st.integers(12, 90))
    ranges, end = [], length
    for _ in range(draw(st.integers(2, 5))):
        first = max(end - draw(st.sampled_from([0, 0, 0, 1, 7, 40])), 6)
        end = min(first + draw(st.sampled_from([1, 5, 16, 33])), slots)
        ranges.append((first, end))
    return length, ranges


@pytest.mark.parametrize("policy", ["dhsa", "lycheecluster"])
@settings(max_examples=3)
@given(
    drawn=writes(),
    chunk=st.sampled_from([(8, 16), (3, 7), (5, 5), (1, 4)]),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_kernels_cut_as_the_plain_form_does_at_once(policy, drawn, chunk, dtype):
    length, ranges = drawn
    case = Case(policy, Sizes(2, 2, 1, 1, 160, 16, 16), dtype=dtype, mask="rows", chunk=chunk)
    steps = Steps(case, length)
    for turn, (first, last) in enumerate(ranges):
        random = torch.Generator().manual_seed(turn)
        for row in range(2):
            new = torch.randn(2, last - first, 16, generator=random).to(steps.key.dtype)
            steps.key[row, :, first - 5 * row : last - 5 * row] = new
        new_keys(steps, first, last)
    end = torch.tensor([ranges[-1][1], ranges[-1][1] - 5])
    span, used = table_of(steps.index, 2)
    once = steps.case.at_once(steps.key, end)
    numbers = once.span.shape[1]
    for head in range(2):
        assert torch.equal(torch.where(used, span, 0)[:, head, :numbers], once.span)
    for name, held in once.fields.items():
        mine = steps.index.named[f"summary_{name}"][:, :, :numbers].float().view(held.shape)
        wrong = ((mine - held) * (once.span > 0)[:, None, :, None]).abs()
        allowed = (2e-2 if dtype != "float32" else 1e-5) * held.abs().clamp(min=1)
        assert (wrong <= allowed).all()
    if policy == "lycheecluster":
        label = steps.index.named["label_2"]
        assert (label[:, :, :numbers][once.span[:, None].expand(-1, 2, -1) == 0] >= 0).all()


@given(seed=st.integers(0, 99), length=st.integers(20, 150), dtype=st.sampled_from(sorted(DTYPES)))
@settings(max_examples=EXAMPLES)
def test_radii_of_clusters_cover_their_keys(seed, length, dtype):
    case = Case(
        "lycheecluster", Sizes(1, 2, 1, 1, 160, 16, 16), dtype=dtype, mask="length", seed=seed
    )
    steps = Steps(case, length)
    new_keys(steps, length, length + 9)
    steps.refit()
    named, chunk = steps.index.named, steps.index.layout.settings.chunk
    span, used = table_of(steps.index, 1)
    for head in range(2):
        for number in used[0, head].nonzero()[:, 0].tolist():
            low = number * chunk[0] + int(span[0, head, number] >> 16)
            keys = steps.key[0, head, low : low + int(span[0, head, number] & 65535)].float()
            cluster = int(named["label_2"][0, head, number]) - 1
            unit = int(named["label_1"][0, head, cluster]) - 1
            for name, place in (("chunk", number), ("cluster", cluster), ("unit", unit)):
                centre = named[f"summary_{name}_mean"][0, head, place].float()
                reach = (keys - centre).norm(dim=-1).max()
                assert reach <= named[f"summary_{name}_radius"][0, head, place] * (1 + 1e-5) + 1e-5
    for number in (0, 1):
        tokens = named[f"tokens_{number}"][0].sum(-1)
        assert (tokens == torch.where(used[0], span[0] & 65535, 0).sum(-1)).all(), "a token is lost"


def test_an_index_that_grows_keeps_its_chunks_and_clusters():
    steps = Steps(Case("lycheecluster", Sizes(1, 2, 1, 1, 500, 16, 16)), 400)
    larger = _moved(steps.index, steps.index.layout.resized(1024))
    old, new = steps.index.named, larger.named
    for name in ("span", "label_1", "label_2", "tokens_0", "tokens_1", "summary_chunk_mean"):
        count = old[name].shape[2]
        assert torch.equal(new[name][:, :, :count], old[name])
        assert not new[name][:, :, count:].any(), "what is new belongs to nothing"
    assert larger.tables.clustered == steps.index.tables.clustered > 0


class Siblings(Steps):
    """Steps of two tokens that do not see each other."""

    def problem(self):
        found = super().problem()
        seen, slot = found.captured[0], torch.arange(self.key.shape[2])
        seen[:] = slot < self.length
        for number in range(2):
            seen[:, :, number, self.length + number] = True
        return found


def test_a_chunk_that_a_hidden_slot_decides_is_read_by_the_step():
    case = Case("dhsa", Sizes(1, 1, 1, 2, 120, 16, 16), budget=60, mask="mask")
    steps = Siblings(case, 70)
    for _ in range(20):
        steps.compare()
