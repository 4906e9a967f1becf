"""Keys that somebody has changed, unseen by PyTorch, under compiled kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kernels_on_gpu import Problem, assert_as_good_as_eager, compiled, make_spec

import lychee_compile
from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.methods import gpu_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SLOTS, LENGTH = 40_000, 39_000


class Steps:
    """Steps of decoding over a cache, launched or replayed from a captured graph."""

    def __init__(self, policy, dtype, flat, graph):
        sparse = SparseSpec(policy, 512, 16, 64, 16, 65536 if flat else 0)
        spec = make_spec(dtype, 4, 128, None, sparse)
        self.problem, self.module = Problem(spec, 2, 2, SLOTS, LENGTH), compiled(spec)
        self.method = gpu_method(policy)
        self.index = self.method.new_index(self.method.layout_of(self.problem.key), "cuda")
        self.build()
        self.new = self.problem.key[:, :, :1].clone()
        self.output, self.graph = self.launch(), None
        if graph:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.launch()

    @property
    def trusted(self):
        trust, *ends = self.index.parts.header.tolist()
        return trust == 1 and min(ends) >= 0

    def build(self):
        self.index.build(self.module, self.problem.key, [self.problem.length] * 2)

    def launch(self):
        self.problem.key.index_copy_(2, self.problem.positions, self.new)
        used = IndexOperands(self.index.layout, self.index.parts, self.problem.positions)
        return self.method.run(self.module, self.problem.operands(), used)

    def step(self, position):
        self.problem.last.fill_(position)
        self.problem.positions.fill_(position)
        self.new.copy_(self.problem.keys(2, 2, 1))
        self.problem.query.copy_(self.problem.randn(*self.problem.query.shape))
        if self.graph is None:
            self.output = self.launch()
        else:
            self.graph.replay()
        return self.output

    def assert_reads_all(self):
        assert_as_good_as_eager(self.output, self.problem)


def all_through_data(keys, others):
    keys.data.copy_(others)


def a_prefix_through_data(keys, others):
    keys.data[:, :, :10_000] = others[:, :, :10_000]


def a_raw_copy(keys, others):
    keys.untyped_storage().copy_(others.untyped_storage())


def another_stream(keys, others):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        keys.data.add_(others)
    torch.cuda.current_stream().wait_stream(stream)


CHANGES = [all_through_data, a_prefix_through_data, a_raw_copy, another_stream]
WAYS = [("lychee", True), ("lychee", False), ("quest", False)]


@pytest.mark.parametrize("graph", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize(("policy", "flat"), WAYS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_changed_keys_are_noticed_by_the_next_step(change, policy, flat, graph):
    steps = Steps(policy, "bfloat16", flat, graph)
    for position in range(LENGTH, LENGTH + 3):
        steps.step(position)
        assert steps.trusted
    change(steps.problem.key, steps.problem.keys(2, 2, SLOTS).bfloat16())
    steps.step(LENGTH + 3)
    steps.assert_reads_all()
    assert not steps.trusted
    steps.problem.length = LENGTH + 4
    steps.build()
    steps.step(LENGTH + 4)
    assert steps.trusted


@pytest.mark.parametrize(("policy", "flat"), WAYS)
def test_one_changed_key_that_is_read_is_noticed(policy, flat):
    steps = Steps(policy, "float16", flat, graph=True)
    steps.step(LENGTH)
    steps.problem.key.data[1, 1, 3, 5] += 1  # it is read at every step
    position = LENGTH
    while steps.trusted and position < LENGTH + 500:  # one program of each row compares its keys
        position += 1
        steps.step(position)
    steps.step(position + 1)
    steps.problem.length = position + 1
    assert not steps.trusted
    steps.assert_reads_all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("policy", "flat"), WAYS)
def test_steps_and_rewinds_raise_no_alarm(policy, flat, dtype):
    steps = Steps(policy, dtype, flat, graph=True)
    position = LENGTH
    for number in range(400):
        steps.step(position)
        position += 1 if number % 17 else -7
        if number % 100 == 50:
            steps.problem.length = position
            steps.index.refit(steps.module, steps.problem.key, [position] * 2)
    assert steps.trusted


def decode(query, keys, values, position, key, value):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    mask = (torch.arange(keys.shape[2], device="cuda") <= position[:, None])[None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def test_caches_made_in_inference_mode_are_sparse_and_never_stale():
    lychee_compile.reset()
    step = torch.compile(decode, backend="lychee", options={"budget": 256})
    random = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=random, device="cuda")

    def gap(position):
        """Return the distance of a step from attention over all keys."""
        given = randn(1, 8, 1, 64), randn(1, 2, 1, 64), randn(1, 2, 1, 64)
        at = torch.tensor([position], device="cuda")
        got = step(given[0], keys, values, at, *given[1:])
        return float((got - decode(given[0], keys, values, at, *given[1:])).abs().max())

    with torch.inference_mode():
        keys, values = randn(1, 2, 4096, 64), randn(1, 2, 4096, 64)
        gaps = [gap(position) for position in range(3000, 3010)]
        assert gaps[0] < 1e-2
        assert min(gaps[1:]) > 2e-2
        keys[:, :, :2500] = randn(1, 2, 2500, 64)  # an eager prefill
        assert gap(2500) < 1e-2
        keys[:, :, 2501:2600] = randn(1, 2, 99, 64)  # an eager turn
        assert gap(2600) < 1e-2
        gaps = [gap(position) for position in range(2601, 2660)]
        assert gaps[-1] > 2e-2
