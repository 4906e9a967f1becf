"""The compiled kernels for CPUs compute what the plain PyTorch functions compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lychee_compile import torch_private
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.cpu import choice, library
from lychee_compile.kernels.cpu.attention import part_of
from lychee_compile.kernels.cpu.choice import choose
from lychee_compile.kernels.cpu.library import kernels
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.attention import attend_part
from lychee_compile.kernels.reference.decode_drawing import draw, salt_of
from lychee_compile.kernels.reference.drawing import log_weight
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.recency import Span
from lychee_compile.kernels.reference.selection import Selection, select

SIZES = st.integers(1, 3)
NEGLIGIBLE = 1e-5
"""Largest difference of two scores that rounding makes."""


def compiled() -> library.Kernels:
    """Return the kernels, which must compile here."""
    found = kernels()
    assert found is not None
    return found


def random(*shape: int, seed: int) -> Tensor:
    """Return normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ranges(batch: int, query_len: int, slots: int, seed: int) -> Span:
    """Return a range of at least one slot for each query."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, slots, (2, batch, query_len), generator=generator)
    return ends.amin(0), ends.amax(0) + 1


def inside(ranges: Span, slots: int) -> Tensor:
    """Return which slots are in the ranges: bool [B, 1, Tq, N]."""
    slot = torch.arange(slots)
    return ((slot >= ranges[0][..., None]) & (slot < ranges[1][..., None]))[:, None]


@given(
    batch=SIZES,
    heads=SIZES,
    rows=st.integers(1, 9),
    rank=st.sampled_from((4, 16, 32, 64, 96, 520)),
    slots=st.integers(1, 5000),
    seed=st.integers(0, 99),
)
def test_scan_equals_products_with_codes(
    batch: int, heads: int, rows: int, rank: int, slots: int, seed: int
) -> None:
    blocks = -(-slots // 4096)
    codes = (2 * random(batch, heads, blocks * 4096, rank, seed=seed)).round().to(torch.int8)
    weight = random(batch, heads, blocks, rows, rank, seed=seed + 1)
    constant = random(batch, heads, blocks, rows, 1, seed=seed + 2)
    first = seed * slots // 200
    raw = compiled().scan(codes, weight, constant, first, slots)
    wide = weight @ codes.unflatten(2, (blocks, 4096)).float().mT + constant
    expected = wide.transpose(2, 3).flatten(3)
    torch.testing.assert_close(raw[..., first:], expected[..., first:slots], rtol=1e-5, atol=1e-4)


@given(
    batch=SIZES,
    heads=SIZES,
    group=st.integers(1, 5),
    query_len=SIZES,
    slots=st.integers(1, 5000),
    size=st.sampled_from((0.1, 1.0, 30.0, 1000.0)),
    seed=st.integers(0, 99),
)
def test_shares_equal_a_softmax(
    batch: int, heads: int, group: int, query_len: int, slots: int, size: float, seed: int
) -> None:
    raw = size * random(batch, heads, group * query_len, slots, seed=seed)
    ranges = random_ranges(batch, query_len, slots, seed)
    held = inside(ranges, slots)
    share = compiled().log_shares(raw, ranges)
    assert share is not None
    by_head = raw.unflatten(2, (group, query_len)).masked_fill(~held[:, :, None], -torch.inf)
    logs = by_head.double().log_softmax(-1)
    # Below exp(-80) the largest share of a head stands for the sum.
    expected = torch.where(logs.amax(2) > -80, logs.clamp(min=-80).logsumexp(2), logs.amax(2))
    assert bool((share == -torch.inf).eq(~held.expand_as(share)).all())
    torch.testing.assert_close(
        share[held.expand_as(share)].double(),
        expected[held.expand_as(share)],
        rtol=1e-5,
        atol=size * NEGLIGIBLE,
    )


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("slot", [0, 2500])
def test_numbers_that_are_not_finite_are_left_to_pytorch(number: float, slot: int) -> None:
    raw = random(1, 2, 3, 5000, seed=0)
    raw[0, 1, 2, slot] = number
    all_slots = (torch.tensor([[0]]), torch.tensor([[5000]]))
    others = (torch.tensor([[slot + 1]]), torch.tensor([[5000]]))
    assert compiled().log_shares(raw, all_slots) is None
    assert compiled().log_shares(raw, others) is not None


def test_a_query_without_slots_chooses_none() -> None:
    nothing = (torch.tensor([[7], [2]]), torch.tensor([[7], [9]]))
    share = compiled().log_shares(random(2, 1, 1, 9, seed=0), nothing)
    assert share is not None
    assert bool((share[0] == -torch.inf).all())
    rooms = torch.full((2, 1, 1), 3)
    assert compiled().best(share, nothing, rooms)[1].flatten().tolist() == [0, 3]
    drawn = compiled().draw(share, nothing, rooms, salt_of(torch.tensor([1, 1]), 1))
    assert drawn is not None
    assert drawn[1].flatten().tolist() == [0, 3]


@given(
    heads=SIZES,
    query_len=SIZES,
    slots=st.integers(1, 5000),
    room=st.integers(0, 600),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_best_are_the_largest_in_order(
    heads: int, query_len: int, slots: int, room: int, ties: bool, seed: int
) -> None:
    share = random(2, heads, query_len, slots, seed=seed) * (1 if ties else 40)
    share = share.round() if ties else share
    ranges = random_ranges(2, query_len, slots, seed)
    held = inside(ranges, slots).expand_as(share)
    generator = torch.Generator().manual_seed(seed)
    rooms = torch.randint(0, room + 1, share.shape[:3], generator=generator)
    slot, count = compiled().best(share, ranges, rooms)
    known = share.masked_fill(~held, -torch.inf).sort(-1, descending=True).values
    assert bool((count == torch.minimum(rooms, held.sum(-1))).all())
    for at in torch.cartesian_prod(*map(torch.arange, count.shape)).view(-1, 3).tolist():
        one = tuple(at)
        taken = slot[one][: int(count[one])]
        assert bool((taken[1:] > taken[:-1]).all())
        assert bool(held[one][taken].all())
        found = share[one][taken].sort(descending=True).values
        assert torch.equal(found, known[one][: len(taken)])


@given(
    heads=SIZES,
    query_len=SIZES,
    slots=st.integers(1, 3000),
    room=st.integers(0, 900),
    size=st.sampled_from((0.0, 2.0, 60.0)),
    seed=st.integers(0, 99),
)
def test_draws_equal_those_of_pytorch(
    heads: int, query_len: int, slots: int, room: int, size: float, seed: int
) -> None:
    exact = (size * random(2, heads, query_len, slots, seed=seed)).softmax(-1)
    bins = exact.clamp(min=1e-37).view(torch.int32) >> 20
    share = ((bins << 20) + (1 << 19)).view(torch.float32).log()  # rounding changes no bin
    ranges = random_ranges(2, query_len, slots, seed)
    held = inside(ranges, slots)
    share = share.masked_fill(~held, -torch.inf)
    rooms = torch.full(share.shape[:3], room) - torch.arange(2)[:, None, None]
    rooms = rooms.clamp(min=0)
    salt = salt_of(torch.tensor([seed, 7 * seed]), heads)
    drawn = compiled().draw(share, ranges, rooms, salt)
    assert drawn is not None
    slot, count, entry, cut = drawn
    place, weight, taken = draw(share, torch.arange(slots), held, rooms, salt)
    assert torch.equal(count, taken.sum(-1))
    places = torch.where(taken, place, slots).sort(-1)
    for at in torch.cartesian_prod(*map(torch.arange, count.shape)).view(-1, 3).tolist():
        one, some = tuple(at), int(count[tuple(at)])
        assert torch.equal(slot[one][:some], places.values[one][:some])
        weights = log_weight(cut[one] + 1, entry[one][:some] + 1)
        torch.testing.assert_close(weights, weight[one][places.indices[one]][:some])


def test_shares_of_hardly_any_size_are_left_to_pytorch() -> None:
    share = torch.full((1, 1, 1, 50), -95.0)
    share[..., :20] = -2.0
    ranges = (torch.tensor([[0]]), torch.tensor([[50]]))
    salt = salt_of(torch.tensor([0]), 1)
    for room, fits in ((10, True), (20, False), (30, False)):
        drawn = compiled().draw(share, ranges, torch.full((1, 1, 1), room), salt)
        assert (drawn is not None) == fits


@given(
    batch=SIZES,
    heads=SIZES,
    group=st.integers(1, 4),
    query_len=SIZES,
    kv_len=st.integers(library.FEWEST_SLOTS, 3000),
    head_dim=st.sampled_from((8, 40, 64)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    budget=st.sampled_from((8, 300, 600)),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_to_a_selection_equals_that_of_pytorch(
    batch: int,
    heads: int,
    group: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype,
    budget: int,
    masked: bool,
    seed: int,
) -> None:
    key = random(batch, heads, kv_len + 5, head_dim, seed=seed).to(dtype)[:, :, :kv_len]
    value = random(batch, kv_len, heads, head_dim + 8, seed=seed + 1).to(dtype).transpose(1, 2)
    query = random(batch, heads * group, query_len, head_dim, seed=seed + 2).to(dtype)
    mask = None
    if masked:
        mask = inside(random_ranges(batch, query_len, kv_len, seed), kv_len)
        mask[0, 0, 0] = False  # sees nothing
    operands = Operands(query, key, value, mask, 0.3)
    index = make_index(batch, heads, head_dim, IndexConfig(budget=budget), key.device)
    index.extend(key, torch.full((batch,), kv_len))
    selection = select(index, operands.score_inputs, budget)
    found, once = part_of(operands, selection)
    expected, expected_once = attend_part(operands, selection)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_sum, expected.log_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(once, expected_once, rtol=1e-5, atol=1e-5)


def test_runs_are_cut_to_what_a_query_sees() -> None:
    slots = library.FEWEST_SLOTS
    key, query = random(1, 2, slots, 16, seed=0), random(1, 4, 2, 16, seed=1)
    mask = inside((torch.tensor([[90, 95]]), torch.tensor([[100, 110]])), slots)
    operands = Operands(query, key, key, mask, 0.3)
    start = torch.tensor([80, 97, slots - 4]).expand(1, 2, 2, 3)
    length = torch.tensor([12, 40, 4000]).expand(1, 2, 2, 3)
    visible = operands.score_inputs.visible()
    found, _ = part_of(operands, Selection(start, length, visible, 0.3))
    inner = Selection(start[..., :2], length[..., :2], visible, 0.3)
    expected, _ = attend_part(operands, inner)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.log_sum, expected.log_sum)


def test_a_score_that_is_not_finite_reaches_the_output() -> None:
    slots = library.FEWEST_SLOTS
    key = torch.zeros(1, 1, slots, 8)
    operands = Operands(torch.ones(1, 1, 1, 8), key, torch.ones(1, 1, slots, 8), None, 1.0)
    index = make_index(1, 1, 8, IndexConfig(budget=200), key.device)
    index.extend(key, torch.tensor([slots]))
    selection = select(index, operands.score_inputs, 200)
    key[0, 0, 1:] = torch.nan
    assert bool(part_of(operands, selection)[0].mean.isnan().all())
    key[:] = torch.nan
    assert bool(part_of(operands, selection)[0].mean.isnan().all())
    broken = replace(
        operands, value=torch.full((1, 1, slots, 8), torch.nan), key=torch.zeros_like(key)
    )
    assert bool(part_of(broken, selection)[0].mean.isnan().all())


@given(
    batch=SIZES,
    heads=SIZES,
    group=st.integers(1, 4),
    query_len=SIZES,
    kv_len=st.integers(2100, 6000),
    budget=st.sampled_from((64, 600)),
    softcap=st.sampled_from((None, 5.0)),
    seed=st.integers(0, 99),
)
def test_choices_equal_those_of_pytorch(
    batch: int,
    heads: int,
    group: int,
    query_len: int,
    kv_len: int,
    budget: int,
    softcap: float | None,
    seed: int,
) -> None:
    key = random(batch, heads, kv_len, 32, seed=seed)
    query = 2 * random(batch, heads * group, query_len, 32, seed=seed + 1)
    mask = torch.ones(batch, 1, query_len, kv_len, dtype=torch.bool).tril(kv_len - query_len)
    for row in range(batch):  # rows begin at slots of their own, as behind left padding
        mask[row, ..., : row * seed] = False
    operands = Operands(query, key, key, mask, 0.2, softcap)
    index = make_index(batch, heads, 32, IndexConfig(budget=budget), key.device)
    index.extend(key, torch.full((batch,), kv_len))
    used: list[bool] = []

    def watched(*arguments: object) -> object:
        used.append((chosen := choose(*arguments)) is not None)  # type: ignore[arg-type]
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lychee_compile.kernels.policies.decode.lychee.choose", watched)
        found = select(index, operands.score_inputs, budget).token_mask()
        patch.setattr("lychee_compile.kernels.policies.decode.lychee.choose", lambda *_: None)
        expected = select(index, operands.score_inputs, budget).token_mask()
    assert used == [True]
    differ = (found != expected).sum(-1)
    assert int(differ.max()) <= 4  # scores that rounding makes equal, or that share a bin's edge
    assert torch.equal(found.sum(-1), expected.sum(-1))


@pytest.mark.parametrize("error", [RuntimeError, OSError, TypeError])
def test_a_failure_to_compile_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    def fail(_: str) -> None:
        raise error("no compiler")

    monkeypatch.setattr(torch_private, "compiled_cpp", fail)
    assert kernels.__wrapped__() is None
    assert [record.getMessage().count("no compiler") for record in caplog.records] == [1]


def test_plain_pytorch_runs_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "kernels", lambda: None)
    key = random(1, 1, 2500, 16, seed=0)
    operands = Operands(random(1, 2, 1, 16, seed=1), key, key, None, 0.25)
    index = make_index(1, 1, 16, IndexConfig(budget=200), key.device)
    index.extend(key, torch.tensor([2500]))
    assert int(select(index, operands.score_inputs, 200).token_mask().sum()) == 200
