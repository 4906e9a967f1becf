"""Kernels that sketch keys, interpreted: all of a cache, and those that steps write."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, Sizes, make_problem
from sketch_spec import unpacked
from sparse_steps import Step, built, copied
from test_sparse_kernel import FLAT, PAGED

from lychee_compile.kernels.gpu.lychee import index as sketch_index
from lychee_compile.kernels.gpu.lychee import launch as sketch_launch
from lychee_compile.kernels.gpu.lychee import layout as sketch_layout
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_encode
from lychee_compile.kernels.gpu.lychee.layout import BLOCK, SketchLayout, planes
from lychee_compile.kernels.reference.sketch import KeySketches
from lychee_compile.kernels.sizes import PAGE

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

MOVED = {"float16": 0.01, "bfloat16": 0.1, "float32": 0.01}
"""Steps by which half precision may move a coordinate, by the dtype of keys."""


def codes(index):
    """Return the codes of all slots, [B, Hkv, slots, r]."""
    fine, coarse = planes(index.layout.head_dim)
    parts = index.parts
    kinds = (parts.fine, fine), (parts.coarse, coarse)
    return torch.cat([unpacked(packed, plane, centred=False) for packed, plane in kinds], -1)


def page_codes(index):
    """Return the codes of pages, [B, Hkv, pages, r]."""
    return unpacked(index.parts.pages, planes(index.layout.head_dim)[0], centred=False)


def levels(index, key):
    """Return the coordinates of keys [B, Hkv, L, D] of the first block, in steps from code 0 on."""
    parts = index.parts
    kept = parts.spread.shape[-1]
    axes, step = parts.axes[:, :, 0].double(), parts.step[:, :, 0, None].double()
    level = (key.double() - parts.centre[:, :, 0, None]) @ axes.mT / step
    return level + torch.where(torch.arange(level.shape[-1]) < kept, 8, 2)


def assert_same_codes(found, expected, level, moved):
    """Check that codes are equal, or neighbours if a coordinate is at the edge between both."""
    edge = (level - level.round()).abs() < moved
    assert ((found == expected) | (edge & ((found - expected).abs() <= 1))).all()
    assert (found == expected).float().mean() > 0.97


@pytest.mark.parametrize("head_dim", [16, 80, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_keys_are_quantised_as_the_reference_does(dtype, head_dim):
    problem = make_problem(dtype, Sizes(2, kv_len=200, head_dim=head_dim), sparse=FLAT)
    index, start = built(problem, 200), torch.zeros(2, dtype=torch.int64)
    reference = KeySketches(2, 1, head_dim, torch.device("cpu"), BLOCK)
    reference.encode(problem.key, start, start, start + 200)
    expected = reference.codes[:, :, :200] + reference._half
    level = levels(index, problem.key)
    assert_same_codes(codes(index)[:, :, :200], expected, level, MOVED[dtype])


def test_more_keys_than_a_launch_may_have_programs_for_are_sketched(monkeypatch):
    problem = make_problem(sizes=Sizes(kv_len=330), sparse=FLAT)
    at_once = built(problem, 330)
    monkeypatch.setattr(sketch_launch, "MOST_PROGRAMS", 2)
    assert torch.equal(built(problem, 330).state, at_once.state)


def assert_as_if_built(index, problem, ends):
    """Check that steps left of the first `ends` slots, one for each row, what one build leaves."""
    again = SketchIndex(index.layout, torch.device("cpu"))
    again.state.copy_(index.state)
    for part in (again.parts.fine, again.parts.coarse, again.parts.pages):
        part.fill_(255)
    for row, end in enumerate(ends):
        run_encode(problem.module(), problem.key, again.layout, again.parts, 0, end)
        level = levels(index, problem.key)[row, :, :end]
        found, expected = (codes(each)[row, :, :end] for each in (index, again))
        assert_same_codes(found, expected, level, MOVED[problem.spec.dtype])
        pages = -(-end // PAGE)
        found, expected = (page_codes(each)[row, :, :pages] for each in (index, again))
        assert (found - expected).abs().max() <= 1
        assert (found == expected).float().mean() > 0.95


HISTORIES = {
    "token by token": [(200 + step, 1) for step in range(5)],
    "drafts": [(200, 3), (201, 3), (204, 16), (206, 2)],
    "rewinds": [(200, 1), (130, 1), (131, 3), (129, 1)],
}
"""Slots from which steps write, and how many tokens they write."""
OFTEN = {("causal", "token by token"), ("causal", "rewinds")}


@pytest.mark.parametrize(
    ("mask", "history"),
    [
        pytest.param(*each, marks=() if each in OFTEN else pytest.mark.thorough)
        for each in product(("causal", "rows"), HISTORIES)
    ],
)
def test_steps_keep_the_index_up_to_date(mask, history):
    """Rows of a batch may be at slots of their own."""
    random = torch.Generator().manual_seed(1)
    batch = 2 if mask == "rows" else 1
    sparse = PAGED if history == "rewinds" else FLAT
    key = index = None
    for number, (length, count) in enumerate(HISTORIES[history]):
        sizes = Sizes(batch, kv_len=250, query_len=count, group=3)
        problem = make_problem("bfloat16", sizes, "scaled", mask, True, length=length,
                               sparse=sparse, seed=number)  # fmt: skip
        starts = length - 5 * torch.arange(batch)
        positions = starts[:, None] + torch.arange(count)
        if key is None:
            key, index = problem.key, built(problem, length)
        problem.key = key
        for row in range(batch):
            key[row, :, positions[row]] += torch.randn(1, count, 64, generator=random).bfloat16()
        step = Step.run(problem, index, positions if mask == "rows" else positions[0])
        step.check()
    assert index.parts.header.tolist() == [1, *(starts + count).tolist()]
    assert_as_if_built(index, problem, (starts + count).tolist())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_steps_take_keys_that_are_not_finite_as_a_build_does(dtype):
    problem = make_problem(dtype, Sizes(kv_len=100, query_len=4), sparse=FLAT)
    index = built(problem, 96)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e4])
    problem.key[:, :, 96:] = bad[:, None].to(problem.key.dtype)
    problem.key[:, :, 97, 3:] = 0
    Step.run(problem, index, torch.arange(96, 100))
    again = SketchIndex(index.layout, torch.device("cpu"))
    again.state.copy_(index.state)
    run_encode(problem.module(), problem.key, again.layout, again.parts, 0, 100)
    assert torch.equal(codes(index)[:, :, 96:100], codes(again)[:, :, 96:100])


def test_an_index_that_is_refitted_is_as_if_built():
    problem = make_problem(sizes=Sizes(kv_len=150), sparse=FLAT)
    index, whole = built(problem, 100), built(problem, 150)
    index.refit(problem.module(), problem.key, [150])
    index.parts.header.copy_(whole.parts.header)
    assert torch.equal(index.state, whole.state)


RAGGED = [(700, 300), (300, 1050), (530, 40), (1024, 512)]
"""Ends of two rows, in blocks of 512 of which 64 keys have axes of their own."""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sketch_layout, "BLOCK", 512)
    monkeypatch.setattr(sketch_index, "WELL_FITTED", 64)


def alone(problem, row, end):
    """Return an index of one row of the keys."""
    key = problem.key[row : row + 1]
    index = SketchIndex(SketchLayout.over(key), key.device)
    index.build(problem.module(), key, [end])
    return index


def assert_row_is(index, row, other, slots):
    """Check that these slots of a row are known as in an index of that row alone."""
    blocks = slice(slots.start // 512, -(-slots.stop // 512))
    for name in ("axes", "centre", "step", "spread"):
        found, expected = (getattr(each.parts, name) for each in (index, other))
        torch.testing.assert_close(
            found[row, :, blocks], expected[0, :, blocks], atol=2e-3, rtol=2e-3
        )
    found, expected = codes(index)[row, :, slots], codes(other)[0, :, slots]
    assert (found - expected).abs().max() <= 1
    assert (found == expected).float().mean() > 0.99
    whole = slice(slots.start // PAGE, slots.stop // PAGE)
    found, expected = page_codes(index)[row, :, whole], page_codes(other)[0, :, whole]
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize("ends", RAGGED)
def test_rows_of_a_batch_are_indexed_each_up_to_its_own_end(ends, small_blocks):
    problem = make_problem(sizes=Sizes(2, kv_len=1100), sparse=FLAT)
    for row, end in enumerate(ends):
        problem.key[row, :, end:] = 100  # nobody has written these
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    index.build(problem.module(), problem.key, ends)
    assert index.parts.header.tolist() == [1, *ends]
    for row, end in enumerate(ends):
        assert_row_is(index, row, alone(problem, row, end), slice(0, end))


def test_the_newest_block_of_every_row_is_refitted(small_blocks):
    problem = make_problem(sizes=Sizes(2, kv_len=1100), sparse=FLAT)
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    index.build(problem.module(), problem.key, (150, 400))
    ends = (300, 900)
    for row, end in enumerate(ends):
        problem.key[row, :, end:] = 100
    index.refit(problem.module(), problem.key, ends)
    assert_row_is(index, 0, alone(problem, 0, 300), slice(0, 300))
    assert_row_is(index, 1, alone(problem, 1, 900), slice(512, 900))


def test_refits_of_a_row_leave_rows_that_are_further_as_they_were(small_blocks):
    """Pages, too, that are full there and have just begun in the row that is refitted."""
    problem = make_problem(sizes=Sizes(2, kv_len=1100), sparse=PAGED)
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    index.build(problem.module(), problem.key, (150, 700))
    problem.key[0, :, 150:300] += 1
    index.refit(problem.module(), problem.key, (293, 700))
    assert_row_is(index, 0, alone(problem, 0, 293), slice(0, 293))
    assert_row_is(index, 1, alone(problem, 1, 700), slice(0, 700))


def test_a_block_that_begins_takes_over_the_axes_before(monkeypatch):
    monkeypatch.setattr(sketch_layout, "BLOCK", 512)
    sizes = Sizes(kv_len=520, query_len=2, group=2)
    problem = make_problem(sizes=sizes, sparse=PAGED, length=511)
    index = SketchIndex(SketchLayout.over(problem.key), torch.device("cpu"))
    filled = built(make_problem(sizes=Sizes(kv_len=300), sparse=PAGED), 300).parts
    for name in ("axes", "centre", "step", "spread"):
        getattr(index.parts, name)[:, :, :1] = getattr(filled, name)
    index.parts.fine.random_(0, 256, generator=torch.Generator().manual_seed(0))
    index.parts.fingerprints.copy_(built(problem, 511).parts.fingerprints)
    index.parts.header[:] = torch.tensor([1, 511])
    before = copied(index.parts)
    Step.run(problem, index, torch.tensor([511, 512])).check()
    for name in ("axes", "centre", "step", "spread"):
        taken, first = getattr(index.parts, name), getattr(before, name)[:, :, 0]
        assert torch.equal(taken[:, :, 0], first)
        assert torch.equal(taken[:, :, 1], first)
    new = slice(511, 513)
    level = levels(index, problem.key)[:, :, new]
    highest = torch.where(torch.arange(level.shape[-1]) < 16, 15, 3)
    expected = level.floor().clamp(min=0).minimum(highest)
    assert_same_codes(codes(index)[:, :, new], expected, level, MOVED["float32"])
