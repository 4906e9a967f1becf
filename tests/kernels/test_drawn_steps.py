"""Decode kernels that draw tokens of small shares by chance, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import MASKS, Sizes, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_steps import Step, best_left_out, built

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common import tuning as tunings
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.reference.decode_drawing import luck_at, salt_of
from lychee_compile.kernels.reference.drawing import log_weight
from lychee_compile.kernels.sizes import BINS, SLOT_BITS

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FEW = settings(max_examples=max(settings().max_examples // 10, 1))
SPARSE = SparseSpec("lychee", 60, sinks=4, recent=8, overfetch=4, flat_tokens=65536, draws=True)


@st.composite
def problems(draw):
    """Draw attentions over a cache that is larger than the budget."""
    query_len = draw(st.sampled_from([1, 1, 2]))
    flat = draw(st.sampled_from([65536, 65536, 0]))
    sparse = replace(SPARSE, budget=draw(st.integers(40, 150)), flat_tokens=flat)
    sizes = Sizes(1, 2, draw(st.sampled_from([1, 4])), query_len, draw(st.integers(200, 500)), 64)
    mask = draw(st.sampled_from(MASKS))
    return make_problem("float32", sizes, mask=mask, sparse=sparse, seed=draw(st.integers(0, 99)))


def drawn_and_plain(problem, tuning=None):
    """Return a step that draws, and the same one that reads the tokens of the largest shares."""
    sparse = replace(problem.spec.sparse, draws=False)
    plain = replace(problem, spec=replace(problem.spec, sparse=sparse))
    end = problem.key.shape[2]
    positions = torch.arange(end - problem.query.shape[2], end)
    index = built(problem, int(positions[0]))
    return tuple(Step.run(each, index, positions, tuning) for each in (problem, plain))


def by_slot(step, values, kv_len):
    """Return what stands in the list of a step at each slot, -1 elsewhere: [B, Hkv, T, L]."""
    items = step.scratch["chosen_list"].flatten(1).long()
    slot = torch.where(items < 0, kv_len, items % (1 << SLOT_BITS))
    flat = torch.full((len(items), kv_len + 1), -1).scatter(1, slot, values(items))
    return step._by_row(flat[:, :-1])


@FEW
@given(problems(), st.sampled_from([1, 5]))
def test_a_step_draws_by_shares_and_luck(problem, programs):
    drawn, plain = drawn_and_plain(problem, Tuning(programs, 32, 4, 2))
    kv_len, heads = problem.key.shape[2], problem.key.shape[1]
    if not drawn.paged:
        share, priority = (each._by_row(each.scratch["bins"]).int() for each in (plain, drawn))
    else:
        pages = drawn._page_shares()[0].shape[-1]
        share, priority = (each._looked_at(pages).clamp(min=0) for each in (plain, drawn))
    salt = salt_of(torch.tensor([kv_len - problem.query.shape[2]]), heads)
    luck = luck_at(torch.arange(share.shape[-1]) + salt)
    always, rank, room = drawn._reference()
    possible = torch.nn.functional.pad(rank > -torch.inf, (0, share.shape[-1]))[
        ..., : share.shape[-1]
    ]
    possible = possible & (share > 0)
    assert torch.equal(priority[possible].int(), (share + luck).clamp(max=BINS - 1)[possible].int())
    priority = torch.where(possible, priority, 0).int()
    depth = by_slot(drawn, lambda items: items >> SLOT_BITS, kv_len)
    read = depth >= 0
    assert (read | ~always).all()
    assert (depth[always] == 0).all(), "sinks and recent tokens stand for themselves"
    selected = read & ~always
    cut = best_left_out(priority, room)
    width = min(kv_len, priority.shape[-1])
    priority, share, selected = (each[..., :width] for each in (priority, share, selected))
    assert (selected | ~(priority > cut)).all()
    assert not (selected & (priority < cut)).any()
    wanted = (2 * (cut - share) + 1).clamp(min=0).int()
    assert torch.equal(depth[..., :width][selected].int(), wanted[selected])
    lift = torch.zeros_like(read, dtype=torch.float32)
    lift[..., :width] = torch.where(selected, log_weight(cut + 1, share + 1), 0.0)
    assert_weighted(problem, drawn.output, read, lift)


def assert_weighted(problem, output, read, lift):
    """Check that an output is attention to the slots that are read, each as often as it counts."""
    group = problem.spec.group
    score = problem.finish_scores().double().unflatten(1, (-1, group))
    seen = problem.visible.unflatten(1, (-1, group)) & read[:, :, None]
    score = (score + lift[:, :, None]).masked_fill(~seen, -torch.inf)
    weight = score.softmax(-1).nan_to_num(0.0)
    wanted = (weight @ problem.value.double()[:, :, None]).flatten(1, 2)
    assert (output.double() - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("mask", "flat"), [("causal", 65536), ("mask by head", 65536), ("causal", 0)]
)
def test_luck_is_the_same_from_a_table(mask, flat, monkeypatch):
    sizes, sparse = Sizes(1, 2, 4, 1, 300, 64), replace(SPARSE, flat_tokens=flat)
    problem = make_problem("float32", sizes, mask=mask, sparse=sparse)
    written, tuning = torch.tensor([299]), Tuning(4, 32, 4, 2)
    computed = Step.run(problem, built(problem, 299), written, tuning)
    monkeypatch.setattr(tunings, "LISTED_ROWS", 1)
    dealt = Step.run(problem, built(problem, 299), written, tuning)
    assert "luck" in dealt.scratch
    assert "luck" not in computed.scratch
    for name in ("bins", "histogram", "chosen_list"):
        assert torch.equal(dealt.scratch[name], computed.scratch[name]), name
    assert torch.equal(dealt.output, computed.output)


def test_tokens_that_are_drawn_stand_for_those_that_are_not():
    """Tokens of small shares have other values than those of large ones."""
    errors = torch.zeros(2)
    for seed in range(2):
        sizes = Sizes(1, 2, 4, 1, 480, 64)
        problem = make_problem("float32", sizes, mask="causal", sparse=SPARSE, seed=seed)
        score = problem.finish_scores().masked_fill(~problem.visible, -torch.inf)
        share = score.softmax(-1).float()
        place = share.unflatten(1, (2, 4)).sum((2, 3)).argsort(-1, descending=True).argsort(-1)
        value = torch.where(place < 60, -1.0, 1.0)[..., None].expand_as(problem.value)
        problem = replace(problem, value=value.contiguous())
        dense = share @ value.repeat_interleave(4, 1)
        for number, step in enumerate(drawn_and_plain(problem)):
            errors[number] += (step.output - dense).abs().mean() / 2
    assert errors[0] < 0.4 * errors[1]
