"""Levels that read some rotary pairs of channels: their choice, and the kernels that read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.methods import gpu_method
from lychee_compile.kernels.gpu.owners import _moved
from lychee_compile.kernels.levels.declaration import DominantPairs
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.dominant_pairs import channels_of, fitted_tokens, pick

triton_interpreter.use()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BUDGET, TIE = 120, 0.12
CPU = torch.device("cpu")


def rotated(vectors, interleaved):
    """Return `vectors` [..., L, D] under rotary positions."""
    length, dim = vectors.shape[-2:]
    angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(dim // 2) * 2 / dim)
    pair = (vectors[..., ::2], vectors[..., 1::2]) if interleaved else vectors.chunk(2, -1)
    first = pair[0] * angle.cos() - pair[1] * angle.sin()
    second = pair[0] * angle.sin() + pair[1] * angle.cos()
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


def keys(dim, length, interleaved, seed=0):
    """Return rotated keys [2, 2, L, D] whose channels have sizes and means of their own."""
    random = torch.Generator().manual_seed(seed)
    size = 2 * torch.rand(2, 2, 1, dim, generator=random)
    middle = 2 * torch.randn(2, 2, 1, dim, generator=random)
    noise = torch.randn(2, 2, length, dim, generator=random)
    return rotated(size * noise + middle, interleaved)


def from_all(key, pairs):
    count = torch.full((key.shape[0],), key.shape[2])
    return channels_of(key, fitted_tokens(count), pairs)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "length"), [(64, 300), (80, 9000), (128, 2000), (32, 150)])
def test_pairs_are_those_that_were_rotated(dim, length, interleaved):
    for seed in range(3):
        channels = from_all(keys(dim, length, interleaved, seed), DominantPairs(4))
        assert channels.shape == (2, 2, DominantPairs(4).channels(dim))
        if interleaved:
            assert torch.equal(channels[..., ::2] + 1, channels[..., 1::2])
            assert not (channels[..., ::2] % 2).any()
        else:
            first, second = channels.chunk(2, -1)
            assert torch.equal(first + dim // 2, second)


def test_the_pairs_that_vary_most_are_chosen():
    key = keys(64, 500, interleaved=False)
    variance = key[:, :, :256].var(2).unflatten(-1, (2, 32)).sum(-2)
    best = variance.topk(8).indices.sort(-1).values
    assert torch.equal(from_all(key, DominantPairs(4)), torch.cat((best, best + 32), -1))


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 48])
def test_any_number_of_channels_will_do(dim):
    random = torch.Generator().manual_seed(dim)
    key = torch.randn(2, 3, 40, dim, generator=random)
    key[0, 0, 7] = torch.nan
    channels = from_all(key, DominantPairs(4))
    assert channels.shape == (2, 3, DominantPairs(4).channels(dim))
    assert ((channels >= 0) & (channels < dim)).all()
    assert (channels.sort(-1).values.diff(dim=-1) > 0).all(), "a channel twice"
    assert from_all(key[:, :, :0], DominantPairs(4)).shape == channels.shape


def test_tokens_count_in_powers_of_two():
    found = fitted_tokens(torch.tensor([0, 1, 2, 3, 1023, 1024, 2**40]))
    assert found.tolist() == [0, 1, 2, 2, 512, 1024, 2**40]
    with pytest.raises(ValueError, match="one pair in at least 1"):
        DominantPairs(0)


def fasa_index(batch, kv_heads, dim, budget=BUDGET):
    config = IndexConfig(budget=budget, policy="fasa")
    return make_index(batch, kv_heads, dim, config, CPU)


def test_a_row_chooses_anew_once_it_has_four_times_the_tokens():
    key, index = keys(32, 300, interleaved=True), fasa_index(2, 2, 32)
    index.restart(torch.tensor([False, True]), torch.tensor([0, 20]))
    for end, fitted in (([16, 30], [16, 16]), ([63, 51], [16, 16]), ([64, 52], [64, 16])):
        index.fresh = torch.tensor(end) if end[0] > 16 else None
        index.extend(key, torch.tensor(end) + (index.fresh is not None))
        assert index.fitted.tolist() == fitted
    expected = channels_of(key, torch.tensor([64, 16]), DominantPairs(4))
    assert torch.equal(index.channels, expected)
    index.truncate(torch.tensor([40, 40]))
    assert torch.equal(index.channels, expected), "a rewind keeps them"


CASES = {
    "one head": {"sizes": Sizes(1, 2, 1, 1, 400, 64)},
    "bfloat16": {"sizes": Sizes(1, 2, 4, 1, 400, 64), "dtype": "bfloat16"},
    "soft-cap and sink": {"sizes": Sizes(1, 1, 4, 1, 401, 80), "score": "soft-cap", "extra": True},
    "rows": {"sizes": Sizes(2, 1, 2, 1, 368, 32), "mask": "rows"},
    "several queries": {"sizes": Sizes(1, 1, 7, 3, 402, 48), "layout": "slots first"},
    "holes of each head": {"sizes": Sizes(1, 2, 3, 1, 400, 128), "mask": "mask by head"},
    "slopes": {"sizes": Sizes(1, 1, 3, 1, 400, 96), "score": "slopes"},
}


def problem_of(sizes, **given):
    """Return a problem whose output says what weight each token has, and the index before it."""
    sparse = SparseSpec("fasa", BUDGET, 16, 64, 16, 65536)
    problem = make_problem(sizes=replace(sizes, value_dim=sizes.kv_len), sparse=sparse, **given)
    spaces = problem.key.shape[:2]
    problem.value = torch.eye(sizes.kv_len, dtype=problem.key.dtype).expand(*spaces, -1, -1)
    method = gpu_method("fasa")
    index = method.new_index(method.layout_of(problem.key), CPU)
    ends = [sizes.kv_len - sizes.query_len - 5 * row for row in range(sizes.batch)]
    index.build(problem.module(), problem.key, ends)
    return problem, index, ends


@pytest.mark.usefixtures("kernel_folder")
@pytest.mark.parametrize("name", CASES)
def test_kernels_read_the_tokens_of_largest_score_over_these_channels(name):
    problem, index, ends = problem_of(**CASES[name])
    batch, kv_heads, length, dim = problem.key.shape
    positions = torch.tensor(ends)[:, None] + torch.arange(problem.query.shape[2])
    used = IndexOperands(index.layout, index.parts, positions)
    output = gpu_method("fasa").run(problem.module(), problem.operands(), used)
    read = (output > 0).unflatten(1, (-1, problem.spec.group)).any(2)
    problem.assert_as_good_as_eager(output, read)

    plain = fasa_index(batch, kv_heads, dim)
    plain.fresh = torch.tensor(ends)
    plain.extend(problem.key, torch.tensor(ends) + problem.query.shape[2])
    assert torch.equal(index.parts.channels, plain.channels.int())

    picked = plain.channels.repeat_interleave(problem.spec.group, 1)
    query, key = problem.query.float(), problem.key.float()
    key = key.repeat_interleave(problem.spec.group, 1)
    query, key = (pick(each, picked) for each in (query, key))
    slot, fresh = torch.arange(length), torch.tensor(ends)[:, None, None, None]
    score = problem.score(query @ key.mT, slot)
    score = score.masked_fill(~problem.visible | (slot >= fresh), -torch.inf)
    share = score.softmax(-1).unflatten(1, (kv_heads, -1)).sum(2).log()
    chosen, count = read & (slot < fresh), (read & (slot < fresh)).sum(-1, keepdim=True)
    assert (read.sum(-1) <= BUDGET).all()
    assert (read.sum(-1) >= BUDGET - 4).all()
    cut = share.sort(-1, descending=True).values.gather(-1, count - 1)
    tie = TIE + (0.05 if problem.key.dtype == torch.bfloat16 else 0)
    assert (~chosen | (share > cut - tie)).all()
    assert (chosen | (share < cut + tie)).all()


@pytest.mark.usefixtures("kernel_folder")
def test_an_index_keeps_its_channels_as_it_grows_and_chooses_anew_at_refits():
    problem, index, _ = problem_of(Sizes(2, 2, 2, 1, 700, 32))
    index.build(problem.module(), problem.key, [100, 40])
    expected = channels_of(problem.key, torch.tensor([64, 32]), DominantPairs(4))
    assert torch.equal(index.parts.channels, expected.int())
    assert index.refit_after(100) == 256
    assert index.refit_after(3000) == 4 * 2048 - 3000
    grown = _moved(index, index.layout.resized(2 * index.layout.slots))
    assert torch.equal(grown.parts.channels, index.parts.channels)
    grown.refit(problem.module(), problem.key, [600, 40])
    anew = from_all(problem.key[:1], DominantPairs(4))
    assert torch.equal(grown.parts.channels[:1], anew.int())
    assert torch.equal(grown.parts.channels[1:], expected[1:].int())


def test_a_choice_reads_a_quarter_of_the_keys():
    index = fasa_index(1, 1, 128)
    assert index.bytes_per_step(1000, BUDGET) == 1000 * 2 * 32
