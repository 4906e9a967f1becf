"""Keys that somebody else has changed, unseen by PyTorch, under interpreted kernels."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, Sizes, make_problem

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.methods import gpu_method

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

END = 150
REST = [each for each in DTYPES if each != "bfloat16"]
WAYS = pytest.mark.parametrize(
    ("policy", "flat_tokens"),
    [("lychee", 65536), ("lychee", 0), ("quest", 65536)],
    ids=["flat", "paged", "quest"],
)


class Steps:
    """Steps of decoding over one cache; rows of a batch are at slots of their own."""

    def __init__(self, policy, flat_tokens=65536, dtype="float32", batch=1, group=2):
        sparse = SparseSpec(policy, 60, 4, 8, 2, flat_tokens)
        self.problem = make_problem(
            dtype, Sizes(batch, 2, group, 1, 200, 16, 16), mask="none", sparse=sparse
        )
        self.method, self.module = gpu_method(policy), self.problem.module()
        self.index = self.method.new_index(
            self.method.layout_of(self.problem.key), torch.device("cpu")
        )
        self.index.build(self.module, self.problem.key, [200] * batch)

    @property
    def header(self):
        """Trust in the index, 0 if one of its rows is lost."""
        trust, *ends = self.index.parts.header.tolist()
        return trust if min(ends) >= 0 else 0

    def step(self, *positions, key=None):
        """Write `key`, or a random one, to a slot of each row, and attend."""
        at = torch.tensor(positions)[:, None]
        for row, slot in enumerate(positions):
            new = torch.randn(2, self.problem.key.shape[3]) if key is None else key
            self.problem.key[row, :, slot] = new
        used = IndexOperands(self.index.layout, self.index.parts, at)
        return self.method.run(self.module, self.problem.operands(), used)


def all_keys(keys):
    keys.data.copy_(keys.flip(2))


def a_prefix(keys):
    keys.data[:, :, :40] = 1


def the_newest(keys):
    keys.data[:, :, 149] += 1


def the_sign_of_one(keys):
    keys.data[-1, 1, 149, 3] *= -1


def a_raw_copy(keys):
    keys.untyped_storage().copy_((keys + 1).untyped_storage())


CHANGES = [
    all_keys,
    the_sign_of_one,
    *(
        pytest.param(each, marks=pytest.mark.thorough)
        for each in (a_prefix, the_newest, a_raw_copy)
    ),
]
DTYPES_OFTEN = ["bfloat16", *(pytest.param(each, marks=pytest.mark.thorough) for each in REST)]


@WAYS
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_that_finds_changed_keys_reads_all(change, policy, flat_tokens):
    steps = Steps(policy, flat_tokens)
    steps.problem.key = steps.problem.key.contiguous()
    steps.step(END - 1)
    assert steps.header == 1
    change(steps.problem.key)
    steps.problem.assert_as_good_as_eager(steps.step(END))
    assert steps.header == 0
    steps.index.build(steps.module, steps.problem.key, [200])
    steps.step(END + 1)
    assert steps.header == 1


@pytest.mark.parametrize("dtype", DTYPES_OFTEN)
@pytest.mark.parametrize("policy", ["lychee", "quest"])
def test_one_changed_key_that_is_read_is_noted_for_the_next_step(policy, dtype):
    """The key of a sink, or of the page that is being written, in one row of ragged ones."""
    steps = Steps(policy, dtype=dtype, batch=2, group=3)
    steps.step(190, END)
    slot = 1 if policy == "lychee" else 177
    steps.problem.key.data[0, 1, slot, 5] += 1
    at = 190
    while steps.header == 1 and at < 290:  # one program of each row compares some of its keys
        steps.step(at, END)
        at += 1
    assert steps.header == 2
    steps.problem.assert_as_good_as_eager(steps.step(at, END + 1))
    assert steps.header == 0


@WAYS
@pytest.mark.parametrize("dtype", DTYPES_OFTEN)
def test_steps_rewinds_and_refits_raise_no_alarm(policy, flat_tokens, dtype):
    steps = Steps(policy, flat_tokens, dtype, batch=2)
    random = torch.Generator().manual_seed(0)
    odd = [None, torch.nan, torch.inf, -0.0, 6e4, 1e-30]
    ends = [200, 200]
    for number in range(7):
        back = torch.randint(-1, 30, (2,), generator=random).tolist()
        ends = [end - 1 - each for end, each in zip(ends, back, strict=True)]
        value = odd[number % len(odd)]
        key = None if value is None else torch.full((2, 16), value).to(steps.problem.key.dtype)
        steps.step(*ends, key=key)
        ends = [end + 1 for end in ends]
        assert steps.header == 1
        if number == 5:
            steps.index.refit(steps.module, steps.problem.key, ends)


@WAYS
def test_a_row_that_goes_on_behind_its_end_is_lost(policy, flat_tokens):
    """Somebody else has written what lies between, be it the same keys as before."""
    steps = Steps(policy, flat_tokens, batch=2)
    steps.step(120, END)
    steps.step(160, END + 1)
    assert steps.index.parts.header.tolist() == [1, ~161, END + 2]
    steps.step(161, END + 2)  # it is lost until the host has indexed it
    assert steps.index.parts.header.tolist() == [1, ~162, END + 3]
    other = steps.method.new_index(steps.index.layout.resized(steps.index.layout.slots, 1), "cpu")
    other.build(steps.module, steps.problem.key[:1], [162])
    steps.index.take_row(0, other)
    assert steps.index.parts.header.tolist() == [1, 162, END + 3]
    steps.step(162, END + 3)
    assert steps.header == 1
