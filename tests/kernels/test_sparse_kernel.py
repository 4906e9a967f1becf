"""Sparse decode kernels, interpreted: what they select, read and make of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, LAYOUTS, MASKS, SCORES, Sizes, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_steps import Step, built

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.lychee import layout as sketch_layout
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FEW = settings(max_examples=max(settings().max_examples // 10, 1))
FLAT = SparseSpec("lychee", 60, sinks=4, recent=8, overfetch=2, flat_tokens=65536)
PAGED = replace(FLAT, flat_tokens=0)
BLOCK = 1024
"""Slots of a block, where there is more than one."""
COVERED_OFTEN = [(0.6, 4, "mask"), (0.9, 1, "causal")]
"""Coverage, group and mask of what CI compares with the index on a CPU."""
BOTH = pytest.mark.parametrize("sparse", [FLAT, PAGED], ids=["flat", "paged"])


@st.composite
def problems(draw):
    """Draw attentions of one or two rows of queries over a cache that is larger than the budget."""
    query_len = draw(st.sampled_from([1, 1, 2, 3]))
    batch = draw(st.integers(1, 2)) if query_len == 1 else 1
    heads = draw(st.integers(1, 2 // batch)) if query_len == 1 else 1
    kv_len = draw(st.integers(query_len + 80, 560))
    head_dim = draw(st.sampled_from([16, 64, 80, 128]))
    sparse = SparseSpec(
        "lychee",
        draw(st.integers(40, 200)),
        sinks=draw(st.integers(0, 20)),
        recent=draw(st.integers(1, 20)),
        overfetch=draw(st.integers(1, 4)),
        flat_tokens=draw(st.sampled_from([0, 65536])),
    )
    return make_problem(
        draw(st.sampled_from(list(DTYPES))),
        Sizes(batch, heads, draw(st.integers(1, 16)), query_len, kv_len, head_dim),
        draw(st.sampled_from(SCORES)),
        draw(st.sampled_from(MASKS)),
        draw(st.booleans()),
        draw(st.sampled_from(LAYOUTS)),
        sparse,
        seed=draw(st.integers(0, 99)),
    )


def newest(problem):
    """Return the slots that the queries are at: the last ones."""
    end = problem.key.shape[2]
    return torch.arange(end - problem.query.shape[2], end)


def step_of(problem):
    """Return a step whose index holds all keys but those that it writes."""
    positions = newest(problem)
    return Step.run(problem, built(problem, int(positions[0])), positions)


@FEW
@given(problems(), st.integers(1, 12))
def test_a_step_reads_the_best_tokens(problem, programs):
    positions = newest(problem)
    index = built(problem, int(positions[0]))
    Step.run(problem, index, positions, Tuning(programs, 32, 4, 2)).check()


@FEW
@given(problems(), st.sampled_from([0.3, 0.7, 0.9, 0.99]))
def test_a_step_by_mass_reads_as_many_as_it_takes(problem, coverage):
    positions = newest(problem)
    problem = by_mass(problem, coverage)
    index = built(problem, int(positions[0]))
    Step.run(problem, index, positions, Tuning(4, 32, 4, 2)).check()


@pytest.mark.parametrize(
    ("coverage", "group", "mask"),
    [
        pytest.param(*each, marks=() if each in COVERED_OFTEN else pytest.mark.thorough)
        for each in itertools.product([0.6, 0.9], [1, 4], ["causal", "mask"])
    ],
)
def test_a_cpu_covers_as_much_with_as_many_tokens(coverage, group, mask):
    problem = make_problem(sizes=Sizes(1, 2, group, kv_len=560), mask=mask, sparse=by_all())
    problem = by_mass(problem, coverage)
    step, sparse = step_of(problem), problem.spec.sparse
    config = IndexConfig(budget=sparse.budget, sinks=4, recent=8, chunk=(4, 8), coverage=coverage)
    index = make_index(1, 2, problem.spec.head_dim, config, torch.device("cpu"))
    index.extend(problem.key, torch.tensor([560]))
    scale = 1 / math.sqrt(problem.spec.head_dim)
    inputs = ScoreInputs(problem.query, problem.key, 560, problem.visible, scale)
    on_cpu = select(index, inputs, sparse.budget).token_mask()
    share = problem.finish_scores().masked_fill(~problem.visible, -torch.inf).softmax(-1)
    share = share.unflatten(1, (2, group)).mean(2)
    seen = problem.visible.unflatten(1, (2, group)).any(2)
    counts, masses = [], []
    for read in (on_cpu, step.slots_read() & seen):
        counts.append(read.sum(-1).float())
        masses.append((share * read).sum(-1))
        assert (masses[-1] > coverage - 0.05).all()
    assert ((counts[0] - counts[1]).abs() < 12 + 0.15 * counts[0]).all()
    assert ((masses[0] - masses[1]).abs() < 0.05).all()
    assert (counts[0] < 0.8 * sparse.budget).all(), "there is something to gain"


def by_all():
    """Return a selection whose budget never ends a choice by mass."""
    return replace(FLAT, budget=500)


def by_mass(problem, coverage):
    """Return an attention whose choice ends once it covers a share of the softmax."""
    sparse = replace(problem.spec.sparse, coverage=coverage)
    return replace(problem, spec=replace(problem.spec, sparse=sparse))


@BOTH
def test_a_budget_for_everything_reads_everything(sparse):
    problem = make_problem(sizes=Sizes(kv_len=150), sparse=replace(sparse, budget=150))
    step = step_of(problem)
    assert step.slots_read().all()
    problem.assert_as_good_as_eager(step.output)


@BOTH
def test_an_index_that_is_not_trusted_is_not_used(sparse):
    problem = make_problem(sizes=Sizes(kv_len=150, query_len=2), mask="mask", sparse=sparse)
    positions = newest(problem)
    empty = SketchIndex(SketchLayout.over(problem.key), torch.device("cpu"))
    index = built(problem, int(positions[0]))
    index.distrust()
    for each in (empty, index):
        step = Step.run(problem, each, positions)
        assert step.reads_everything
        problem.assert_as_good_as_eager(step.output)
        assert each.parts.header[:2].tolist() == [0, 150]


@BOTH
@pytest.mark.parametrize("mask", ["causal", "mask"])
def test_queries_that_see_nothing_give_zeros(mask, sparse):
    sizes = Sizes(kv_len=150, query_len=2)
    problem = make_problem(sizes=sizes, mask=mask, extra=True, sparse=sparse, length=-2)
    step = Step.run(problem, built(problem, 150), None)
    assert torch.equal(step.output, torch.zeros_like(step.output))


@pytest.mark.parametrize(
    ("mask", "sparse"),
    [
        pytest.param("rows", FLAT, id="rows-flat"),
        pytest.param("mask", FLAT, id="mask-flat", marks=pytest.mark.thorough),
        pytest.param("mask by head", FLAT, id="mask by head-flat", marks=pytest.mark.thorough),
        pytest.param("rows", PAGED, id="rows-paged", marks=pytest.mark.thorough),
        pytest.param("mask", PAGED, id="mask-paged"),
        pytest.param("mask by head", PAGED, id="mask by head-paged"),
    ],
)
def test_an_idle_row_reads_no_key_and_others_stay_sparse(mask, sparse):
    """The values of a row without a request may be anything."""
    problem = make_problem(sizes=Sizes(batch=2, kv_len=200), mask=mask, sparse=sparse, length=180)
    busy = Step.run(problem, built(problem, 180), torch.tensor([180]))
    index = built(problem, 180)
    problem.captured[0][1] = -1 if mask == "rows" else 0
    problem.value[1] = torch.nan
    step = Step.run(problem, index, torch.tensor([180]))
    assert torch.equal(step.output[1], torch.zeros_like(step.output[1]))
    assert torch.equal(step.output[0], busy.output[0])
    assert (step.scratch["chosen_list"].unflatten(0, (2, -1))[1] == -1).all()


def packed(sparse, document, at):
    """Return an attention whose queries, at slots `at` [T], each see one `document`, int [L]."""
    problem = make_problem(sizes=Sizes(query_len=len(at), kv_len=400), mask="mask", sparse=sparse)
    seen = (document == document[at][:, None]) & (torch.arange(400) <= at[:, None])
    problem.captured[0].copy_(seen)
    return problem


@BOTH
def test_packed_requests_that_are_appended_keep_to_their_own_within_the_budget(sparse):
    """Documents lie side by side; their new tokens follow all of them, in turns."""
    document = torch.cat((torch.arange(380) // 127, torch.arange(20) % 3)).clamp(max=2)
    problem = packed(sparse, document, torch.arange(397, 400))
    step = step_of(problem)
    step.check()
    assert not step.reads_everything
    sees = problem.visible.any(1)[:, None]
    assert ((step.slots_read() & sees).sum(-1) <= sparse.budget).all()


def written_apart(sparse, at):
    """Return packed requests that are each written at their own end, and an index before that."""
    problem = packed(sparse, torch.arange(400) // 100, at)
    new = problem.key[:, :, at].clone()
    problem.key[:, :, at] = 0
    index = built(problem, int(at.max()) + 1)
    problem.key[:, :, at] = new
    return problem, index


@BOTH
@pytest.mark.parametrize("at", [[90, 185, 280], [280, 90, 185], [399, 8], [-1, 90]])
def test_packed_requests_that_are_written_apart_keep_to_their_own_within_the_budget(sparse, at):
    """Keys that other requests have written are not new to a query, and make no index stale."""
    at = torch.tensor(at) % 400
    problem, index = written_apart(sparse, at)
    step = Step.run(problem, index, at)
    step.check()
    assert not step.reads_everything
    read = step.slots_read()
    assert ((read & problem.visible.any(1)[:, None]).sum(-1) <= sparse.budget).all()
    assert read[:, :, torch.arange(len(at)), at].all()
    assert index.parts.header.tolist() == [1, int(at.max()) + 1]


@BOTH
def test_a_packed_request_that_is_not_indexed_is_noticed(sparse):
    """Its prompt was written by somebody else, behind the slots that the index was built for."""
    document, at = torch.arange(400) // 100, torch.tensor([90, 280])
    problem = packed(sparse, document, at)
    index = built(problem, 90)
    step = Step.run(problem, index, at)
    assert step.reads_everything
    problem.assert_as_good_as_eager(step.output)
    assert index.parts.header.tolist() == [1, ~281]


@BOTH
def test_the_last_request_sees_drafts_of_its_own_alone(sparse):
    """Two tokens of one request and one of another are written in one step."""
    at = torch.tensor([90, 91, 280])
    problem, index = written_apart(sparse, at)
    step = Step.run(problem, index, at)
    step.check()
    assert step.fresh.tolist() == [[[90, 90, 280]]]


@BOTH
def test_without_new_keys_all_that_are_indexed_may_be_chosen(sparse):
    problem = make_problem(sizes=Sizes(kv_len=200), sparse=sparse)
    index = built(problem, 200)
    before = index.state.clone()
    step = Step.run(problem, index, None)
    step.check()
    assert torch.equal(index.state, before)


@BOTH
def test_without_new_keys_every_row_knows_its_own_end(sparse):
    problem = make_problem(sizes=Sizes(2, kv_len=400), sparse=replace(sparse, budget=350))
    index = SketchIndex(SketchLayout.over(problem.key), torch.device("cpu"))
    index.build(problem.module(), problem.key, (400, 120))
    step = Step.run(problem, index, None)
    step.check()
    assert step.slots_read()[1, ..., 120:].all()  # which have no sketches


@pytest.mark.parametrize(
    ("mask", "group"),
    [
        ("causal", 1),
        pytest.param("causal", 4, marks=pytest.mark.thorough),
        pytest.param("mask", 1, marks=pytest.mark.thorough),
        ("mask", 4),
    ],
)
def test_a_large_cache_that_holds_little_is_ranked_token_by_token(mask, group):
    sizes = Sizes(kv_heads=2, group=group, kv_len=600)
    sparse = replace(FLAT, overfetch=1, flat_tokens=256)
    problem = make_problem(sizes=sizes, mask=mask, sparse=sparse, length=240)
    step = Step.run(problem, built(problem, 240), torch.tensor([240]))
    step.check()
    assert step.paged
    looked_at = step.scratch["candidate_count"]
    assert (looked_at > FLAT.budget + 16).all(), "only the best pages are looked at"
    assert (looked_at <= 256).all()
    pages = sparse.budget // 16
    few, all_pages = (step.may_be_chosen(pages, flat) for flat in (0, 16))
    assert all_pages.sum() > 2 * few.sum(), "the specification says so too"
    assert torch.equal(all_pages, step.may_be_chosen(None, 0))


@pytest.mark.parametrize(("mask", "length"), [("rows", 257), ("padding mask", 300)])
def test_rows_that_hold_little_are_ranked_token_by_token_beside_long_ones(mask, length):
    sizes = Sizes(batch=2, kv_len=600)
    sparse = replace(FLAT, overfetch=1, flat_tokens=256)
    problem = make_problem(sizes=sizes, mask=mask, sparse=sparse, length=length)
    step = Step.run(problem, built(problem, length), torch.tensor([length]))
    step.check()
    seen = problem.visible.any(1).any(1).sum(-1)
    assert (seen > 256).tolist() == [True, False], "one row is to be long, one short"
    of_best, of_all = step.scratch["candidate_count"].tolist()
    assert of_best <= sparse.budget + 15
    assert of_all >= seen[1] - 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_count_from_the_end_too(dtype):
    problem = make_problem(sizes=Sizes(kv_len=200, query_len=2), sparse=FLAT)
    usual, other = (
        Step.run(problem, built(problem, 198), positions)
        for positions in (newest(problem), torch.tensor([-2, -1], dtype=dtype))
    )
    other.check()
    assert torch.equal(usual.output, other.output)
    assert torch.equal(usual.index.state, other.index.state)


@BOTH
@pytest.mark.parametrize("mask", ["none", "mask"])
def test_more_unknown_keys_than_the_budget_are_all_read(mask, sparse):
    """A step that writes an early slot, and sees later ones of which nothing is known."""
    problem = make_problem(sizes=Sizes(kv_len=600), mask=mask, sparse=sparse)
    step = Step.run(problem, built(problem, 600), torch.tensor([30]))
    assert step.reads_everything
    problem.assert_as_good_as_eager(step.output)


@BOTH
@pytest.mark.parametrize("slot", [450, 404])
def test_recent_tokens_of_a_ring_are_those_before_the_slot_written(slot, sparse):
    """Keys behind the slot are unknown in this step, and are read too."""
    problem = make_problem(sizes=Sizes(kv_len=500), mask="mask", sparse=replace(sparse, budget=160))
    step = Step.run(problem, built(problem, 500), torch.tensor([slot]))
    assert not step.reads_everything
    read, seen = step.slots_read(), problem.visible[:, :1]
    assert (read | ~seen)[..., slot - 7 :].all()
    assert int(read.sum(-1).max()) <= 160
    problem.assert_as_good_as_eager(step.output, read)


@BOTH
def test_an_index_may_have_room_for_more(sparse):
    """An index may have more slots than the cache, like the index of a growing cache."""
    problem = make_problem(sizes=Sizes(kv_len=200), sparse=sparse)
    positions = newest(problem)
    index = built(problem, int(positions[0]), slots=BLOCK + 512)
    Step.run(problem, index, positions).check()


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_keys_that_are_not_finite_harm_no_others(dtype, sparse):
    problem = make_problem(dtype, Sizes(kv_len=300, group=3), sparse=sparse)
    bad = torch.tensor([50, 51, 120])
    for slot, number in zip(bad, (torch.nan, torch.inf, -torch.inf), strict=True):
        problem.key[:, :, slot] = number
    step = step_of(problem)
    read = step.assert_selection()
    assert not read[..., bad].any(), "they are taken for average keys"
    problem.key[:, :, bad] = 0
    problem.assert_as_good_as_eager(step.output, read)


@pytest.fixture(scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_layout, "BLOCK", BLOCK)
        yield


@pytest.fixture(scope="module")
def long(kernel_folder, small_blocks):
    """A cache of more than one block, and its index."""
    sizes = Sizes(kv_len=BLOCK + 150, group=3)
    problem = make_problem("bfloat16", sizes, sparse=FLAT)
    return problem, built(problem, BLOCK + 149).state


def test_blocks_are_ranked_together(long):
    problem, state = long
    for sparse in (FLAT, PAGED):
        other = replace(problem, spec=replace(problem.spec, sparse=sparse))
        index = SketchIndex(SketchLayout.over(problem.key), torch.device("cpu"))
        index.state.copy_(state)
        step = Step.run(other, index, newest(problem))
        step.check()
        assert step.slots_read()[..., 4:BLOCK].any(), "nothing of the first block"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mask", ["mask", pytest.param("padded", marks=pytest.mark.thorough)])
@BOTH
def test_three_blocks(mask, sparse):
    sizes = Sizes(batch=2, kv_len=2 * BLOCK + 700, group=3, query_len=2)
    step_of(make_problem("bfloat16", sizes, mask=mask, sparse=replace(sparse, budget=500))).check()
