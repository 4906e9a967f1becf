"""Quest's kernels, interpreted, against boxes that are made here and attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F
import triton_interpreter
from decode_problems import Sizes, element, make_problem

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.parts import levels
from lychee_compile.codegen.specification import KV, B, H, Q, SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.levels import launch as launch_levels
from lychee_compile.kernels.gpu.levels import shares
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.page_index import PageDeviceIndex
from lychee_compile.kernels.levels.declaration import Level, LevelStack, Tokens
from lychee_compile.kernels.levels.expressions import dot, key, query
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.sizes import PAGE
from lychee_compile.passes.symbolic.elementwise import Flag

triton_interpreter.use()

BUDGET = 120
TIE = 0.12
"""Logs of shares in the same bin differ by less."""


def make_quest(sizes, budget=BUDGET, by_head=False, **given):
    """Return a problem whose output says what weight each token has: values are unit vectors."""
    sparse = SparseSpec("quest", budget, 16, 64, 16, 65536)
    problem = make_problem(sizes=replace(sizes, value_dim=sizes.kv_len), sparse=sparse, **given)
    if by_head:
        problem.visible = problem.visible & (torch.rand(problem.visible.shape) < 0.6)
        problem.captured = [problem.visible]
        problem.spec = replace(problem.spec, visible=Flag(element("mask", B, H, Q, KV)))
    spaces = problem.key.shape[:2]
    problem.value = torch.eye(sizes.kv_len, dtype=problem.key.dtype).expand(*spaces, -1, -1)
    return problem


def positions_of(problem):
    """Return slots of the tokens that the queries belong to, int64 [B, T]."""
    kv_len, query_len = problem.key.shape[2], problem.query.shape[2]
    rows = 5 * torch.arange(problem.key.shape[0]) if "lengths" in str(problem.spec.visible) else 0
    last = torch.arange(kv_len - query_len, kv_len)
    return (last - torch.as_tensor(rows).view(-1, 1)).expand(problem.key.shape[0], -1)


def index_up_to(problem, end):
    index = empty_index(problem)
    index.build(problem.module(), problem.key, [end] * problem.key.shape[0])
    return index


def empty_index(problem):
    return PageDeviceIndex(LevelLayout.over(problem.key, "quest"), torch.device("cpu"))


def run(problem, index, positions):
    used = IndexOperands(index.layout, index.parts, positions)
    return launch_levels.run_levels(problem.module(), problem.operands(), used)


def by_page(slots):
    """Reshape [..., L] to [..., pages, PAGE]."""
    return F.pad(slots, (0, -slots.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE))


def policy_ranks(problem, full):
    """Logs of Quest's shares [B, Hkv, T, pages], where only the first `full` [B] have a box."""
    heads = problem.key.shape[1]
    keys = F.pad(problem.key.double(), (0, 0, 0, -problem.key.shape[2] % PAGE))
    pages = keys.unflatten(2, (-1, PAGE))[:, :, None]
    rows = problem.query.double().unflatten(1, (heads, -1)).flatten(2, 3)[..., None, :]
    corner = torch.maximum(rows * pages.amin(4), rows * pages.amax(4)).sum(-1)
    corner = corner.unflatten(2, (-1, problem.query.shape[2]))
    shown = by_page(problem.visible.unflatten(1, (heads, -1)).any(2)).sum(-1)
    shown = shown.masked_fill(torch.arange(shown.shape[-1]) >= full.view(-1, 1, 1, 1), 0)
    score = problem.finish(corner, torch.arange(shown.shape[-1]) * PAGE)
    return (score + shown[:, :, None].log()).log_softmax(-1).logsumexp(2)


CASES = {
    "one head": {"sizes": Sizes(1, 2, 1, 1, 400, 64)},
    "bfloat16": {"sizes": Sizes(1, 2, 4, 1, 400, 64), "dtype": "bfloat16"},
    "soft-cap and sink": {"sizes": Sizes(1, 1, 4, 1, 401, 80), "score": "soft-cap", "extra": True},
    "rows": {"sizes": Sizes(2, 1, 2, 1, 368, 32), "mask": "rows"},
    "several queries": {"sizes": Sizes(1, 1, 7, 3, 402, 48), "layout": "slots first"},
    "holes": {"sizes": Sizes(2, 1, 3, 1, 400, 64), "mask": "mask"},
    "holes of each head": {"sizes": Sizes(1, 2, 3, 1, 400, 64), "mask": "mask", "by_head": True},
}


def cases_and_lots():
    """Yield every case with one lot of programs, and what differs by row and by head with two."""
    for name in CASES:
        yield pytest.param(name, 1, id=f"{name}-1")
        marks = () if name in ("rows", "holes of each head") else pytest.mark.thorough
        yield pytest.param(name, 2, marks=marks, id=f"{name}-2")


@pytest.mark.parametrize(("name", "lots"), list(cases_and_lots()))
def test_the_pages_read_are_the_policys(name, lots, monkeypatch):
    """But for ties; each of several programs rounds what is left for its ties down."""
    if lots > 1:
        monkeypatch.setattr(levels, "RANKED", 16)
        monkeypatch.setattr(levels, "BYTES_AT_ONCE", 0)
        monkeypatch.setattr(shares, "PROGRAMS", 2)
    problem = make_quest(**CASES[name])
    positions = positions_of(problem)
    index = index_up_to(problem, int(positions[0, 0]))
    index.parts.summary_greatest[:, :, int(positions[0, 0]) // PAGE :] = (
        torch.inf
    )  # of tokens taken back
    output = run(problem, index, positions)
    read, visible = (
        each.unflatten(1, (-1, problem.spec.group)).any(2) for each in (output > 0, problem.visible)
    )
    problem.assert_as_good_as_eager(output, read)

    slot = torch.arange(read.shape[-1])
    newest = (positions[:, 0] // PAGE * PAGE)[:, None, None]
    always = visible & (slot >= newest[..., None])
    chosen = by_page(read & ~always).any(-1)
    whole = chosen.repeat_interleave(PAGE, -1)[..., : slot.numel()]
    assert torch.equal(read, visible & (always | whole))

    rank = policy_ranks(problem, positions[:, 0] // PAGE)
    end = torch.where(visible, slot + 1, 0).amax(-1)
    room = (BUDGET - (end - newest)).expand(chosen.shape[:3])[..., None] // PAGE
    count = chosen.sum(-1, keepdim=True)
    assert ((count <= room) & (count > room - lots)).all()
    cut = rank.sort(-1, descending=True).values.gather(-1, room - 1)
    assert (~chosen | (rank > cut - TIE)).all()
    assert (chosen | (rank < cut + TIE)).all()


def test_the_policy_itself_chooses_as_many_of_the_same_rank():
    """The ranks that the test above compares with are those of the policy."""
    problem = make_quest(Sizes(1, 1, 4, 1, 400, 64))
    config = IndexConfig(budget=BUDGET, policy="quest")
    index = registry.make_index(1, 1, 64, config, torch.device("cpu"))
    index.extend(problem.key, torch.tensor([400]))
    inputs = ScoreInputs(problem.query, problem.key, 400, None, 64**-0.5)
    read = select(index, inputs, BUDGET).token_mask()
    chosen = by_page(read)[..., :-1, :].all(-1)
    ranks = policy_ranks(problem, torch.tensor([25]))[..., :-1]
    best = ranks.topk((BUDGET - 16) // PAGE).indices
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(-1, best, True))
    assert read[..., -PAGE:].all()
    assert read.sum() == chosen.sum() * PAGE + PAGE


@pytest.mark.parametrize(
    ("mask", "budget", "trusted"),
    [
        ("causal", 300, True),
        ("window", 20, True),
        ("mask", 300, False),
        pytest.param("causal", 300, False, marks=pytest.mark.thorough),
        pytest.param("window", 20, False, marks=pytest.mark.thorough),
        pytest.param("mask", 300, True, marks=pytest.mark.thorough),
    ],
)
def test_with_room_for_all_or_no_index_all_is_read(mask, budget, trusted):
    """A page cut by a window needs no more room than it shows tokens, if all fit."""
    sizes = Sizes(1, 2, 2, 1, 300, 32)
    problem = make_quest(sizes, budget=budget if trusted else 16, mask=mask)
    index = index_up_to(problem, 299)
    if not trusted:
        index.distrust()
    problem.assert_as_good_as_eager(run(problem, index, positions_of(problem)))


def test_a_page_before_the_last_visible_token_is_read_once():
    """The newest tokens are hidden, so that the last that is seen lies in a full page."""
    problem = make_quest(Sizes(1, 1, 2, 1, 300, 32), budget=300, length=200)
    problem.assert_as_good_as_eager(run(problem, index_up_to(problem, 300), None))


def test_rows_of_a_batch_have_boxes_up_to_their_own_ends():
    """Steps that only read, and steps that write: what lies behind an end has no box of use."""
    problem = make_quest(Sizes(2, 1, 2, 1, 400, 32), mask="rows", budget=300)
    index = empty_index(problem)
    index.build(problem.module(), problem.key, (400, 130))
    read = run(problem, index, None) > 0
    behind = problem.visible[1, :, :, 128:]
    assert behind.any()
    assert torch.equal(read[1, :, :, 128:], behind)
    assert (read.sum(-1) <= 300).all()
    run(problem, index, torch.tensor([[399], [120]]))
    assert index.parts.header.tolist() == [1, 400, 121]


@pytest.mark.parametrize("at", [[190, 385, 580], [580, 190, 385], [599, 8, 385]])
def test_packed_requests_that_are_written_apart_keep_to_their_own_within_the_budget(at):
    """A request reads the page that it is writing, and the best of those before."""
    document, at = torch.arange(600) // 200, torch.tensor(at)
    problem = make_quest(Sizes(1, 2, 2, 3, 600, 32), mask="mask")
    seen = (document == document[at][:, None]) & (torch.arange(600) <= at[:, None])
    problem.captured[0].copy_(seen)
    new = problem.key[:, :, at].clone()
    problem.key[:, :, at] = 0
    index = index_up_to(problem, int(at.max()) + 1)
    problem.key[:, :, at] = new
    output = run(problem, index, at)
    read = (output > 0).unflatten(1, (-1, 2)).any(2)
    problem.assert_as_good_as_eager(output, read)
    assert (read.sum(-1) <= BUDGET).all()
    assert read[:, :, torch.arange(3), at].all()
    assert index.parts.header.tolist() == [1, int(at.max()) + 1]


def test_a_box_far_too_large_hides_no_page():
    """Beside it shares of all other pages vanish, and yet there is room for them."""
    problem = make_quest(Sizes(1, 1, 2, 1, 300, 32), budget=300)
    problem.query[..., :2] = 1
    problem.key[..., :2, :2] = torch.tensor([[3000.0, -3000.0], [-3000.0, 3000.0]])
    problem.assert_as_good_as_eager(run(problem, index_up_to(problem, 299), positions_of(problem)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_leaves_the_index_as_building_it_does(dtype):
    """A step that writes to two pages, and fills one, leaves the index as building does."""
    problem = make_quest(Sizes(2, 2, 1, 5, 179, 48), dtype=dtype, layout="channels first")
    index, anew = index_up_to(problem, 174), index_up_to(problem, 179)
    assert not torch.equal(index.state, anew.state)
    run(problem, index, positions_of(problem)[0])
    assert torch.equal(index.state, anew.state)


def test_slots_counted_from_the_end_and_no_slots():
    """Positions may be negative; without any the index stays, and what it holds may be chosen."""
    problem = make_quest(Sizes(1, 1, 2, 1, 208, 32))
    index, anew = index_up_to(problem, 207), index_up_to(problem, 208)
    first = run(problem, index, torch.tensor([-1]))
    assert torch.equal(index.state, anew.state)
    again = run(problem, index, None)
    assert torch.equal(index.state, anew.state)
    assert (first[..., -PAGE:] > 0).all()
    assert (again[..., -1] > 0).all()


def test_what_has_no_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    odd = LevelStack(levels=(Level(Tokens(), estimate=dot(query, key) ** sympy.Rational(1, 3)),))
    registry.register_policy("odd", odd)
    spec = make_quest(Sizes(1, 1, 2, 1, 64, 32)).spec
    for policy, reason in (
        ("odd", "no Triton form of the power 0.3"),
        ("oracle", "'oracle' has no kernels; lychee have"),
    ):
        with pytest.raises(ValueError, match=reason):
            emit_module(replace(spec, sparse=replace(spec.sparse, policy=policy)))
