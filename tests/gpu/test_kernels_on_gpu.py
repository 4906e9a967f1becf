"""Generated kernels compiled, at the shapes models have; everything here needs a CUDA device."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from sketch_spec import SelectionSizes, select_slots

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Captured, Q, S, SparseSpec
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.compile_together import compile_together
from lychee_compile.kernels.gpu.common.launch_common import Scratch
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_encode, run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.sizes import PAGE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = Captured("given_length", "int64", 0)
CAUSAL = Q + sympy.Symbol("given_length", integer=True) >= KV
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make_spec(dtype, group, head_dim, value_dim=None, sparse=None, softcap=None, extra=False):
    score = S / math.sqrt(head_dim)
    score = score if softcap is None else softcap * sympy.tanh(score / softcap)
    value_dim = value_dim or head_dim
    return AttentionSpec(dtype, group, head_dim, value_dim, score, CAUSAL, (LENGTH,), extra, sparse)


def compiled(spec):
    return module_cache.load(module_cache.store(emit_module(spec), spec.name).stem)


class Problem:
    """A cache of which the first `length` + T slots are filled, and queries at its end."""

    def __init__(self, spec, batch, heads, slots, length, query_len=1, seed=0):
        self.spec, self.length, self.query_len = spec, length, query_len
        self.generator = torch.Generator("cuda").manual_seed(seed)
        dtype, group = DTYPES[spec.dtype], spec.group
        self.key = self.keys(batch, heads, slots).to(dtype)
        self.value = self.randn(batch, heads, slots, spec.value_dim).to(dtype)
        self.query = self.randn(batch, heads * group, query_len, spec.head_dim).to(dtype)
        self.last = torch.tensor(length, device="cuda")
        self.positions = torch.arange(length, length + query_len, device="cuda")
        self.extra = self.randn(heads * group, 1) if spec.extra else None

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, device="cuda")

    def keys(self, batch, heads, slots):
        """Return low-rank keys around a centre, with noise: what a sketch is made for."""
        dim = self.spec.head_dim
        low = self.randn(batch, heads, slots, dim // 4) @ self.randn(batch, heads, dim // 4, dim)
        centre, noise = self.randn(batch, heads, 1, dim), self.randn(batch, heads, slots, dim)
        return low / math.sqrt(dim / 4) + 2 * centre + 0.3 * noise

    def visible(self):
        """Return which slots are visible, bool [B, 1, 1, T, L]."""
        slot = torch.arange(self.key.shape[2], device="cuda")
        step = torch.arange(self.query_len, device="cuda")[:, None]
        return (slot <= self.last + step)[None, None, None]

    def finish(self, raw):
        score = raw / math.sqrt(self.spec.head_dim)
        cap = float(self.spec.score.subs(S, sympy.oo)) if self.spec.score.has(sympy.tanh) else None
        return score if cap is None else cap * torch.tanh(score / cap)

    def attention(self, read, dtype=torch.float64):
        """Return softmax attention over the slots where `read`, bool [B, Hkv, T, L], in `dtype`."""
        heads, group = self.key.shape[1], self.spec.group
        query = self.query.to(dtype).unflatten(1, (heads, group))
        score = self.finish(query @ self.key.to(dtype)[:, :, None].mT)
        score = score.masked_fill(~(read[:, :, None] & self.visible()), -torch.inf)
        if self.extra is not None:
            column = self.extra.to(dtype).view(1, heads, group, 1, 1)
            score = torch.cat((score, column.expand(*score.shape[:-1], 1)), -1)
        weight = score.softmax(-1)[..., : self.key.shape[2]]
        return (weight @ self.value.to(dtype)[:, :, None]).flatten(1, 2)

    def share(self):
        """Return the softmax of each head, float64 [B, Hkv, G, T, L]."""
        query = self.query.double().unflatten(1, (self.key.shape[1], self.spec.group))
        score = self.finish(query @ self.key.double()[:, :, None].mT)
        return score.masked_fill(~self.visible(), -torch.inf).softmax(-1)

    def operands(self):
        return AttentionOperands(self.query, self.key, self.value, [self.last], self.extra)

    def exact(self, module):
        return run_exact(module, self.operands())

    def sparse(self, module, index):
        used = IndexOperands(index.layout, index.parts, self.positions)
        return run_lychee(module, self.operands(), used)


def assert_as_good_as_eager(output, problem):
    """No further from float64 than eager attention in the same precision, but for rounding."""
    everything = torch.ones(
        problem.key.shape[0], problem.key.shape[1], problem.query_len, problem.key.shape[2],
        dtype=torch.bool, device="cuda",
    )  # fmt: skip
    truth = problem.attention(everything)
    eager = problem.attention(everything, problem.query.dtype)
    band = rounding_band(output, truth, problem)
    error, allowed = (output - truth).abs().max(), (eager - truth).abs().max()
    assert error <= allowed + band, (error, allowed, band)


def rounding_band(output, truth, problem):
    """Roundings of the output, and one of each score, in float32: a relative one of its weight."""
    heads = (problem.key.shape[1], problem.spec.group)
    raw = problem.query.float().unflatten(1, heads) @ problem.key.float()[:, :, None].mT
    scores = problem.finish(raw).masked_fill(~problem.visible(), 0).abs().max()
    single = torch.finfo(torch.float32).eps
    return (4 * torch.finfo(output.dtype).eps + single * scores) * truth.abs().max()


EXACT = [
    ("bfloat16", 4, 128, None, 1, 8, 32768, 1, {}),
    ("bfloat16", 4, 128, None, 4, 8, 4096, 4, {}),
    ("float16", 7, 80, 64, 2, 4, 5000, 2, {}),
    ("bfloat16", 16, 256, None, 1, 1, 4096, 1, {"softcap": 30.0}),
    ("float32", 3, 96, None, 2, 2, 3000, 3, {"extra": True}),
    ("float16", 1, 64, None, 1, 12, 2048, 16, {}),
    ("bfloat16", 2, 192, 128, 1, 4, 6000, 1, {}),
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact_attention_is_as_good_as_eager(case):
    dtype, group, head_dim, value_dim, batch, heads, slots, query_len, more = case
    spec = make_spec(dtype, group, head_dim, value_dim, **more)
    problem = Problem(spec, batch, heads, slots, slots - 100 - query_len, query_len)
    assert_as_good_as_eager(problem.exact(compiled(spec)), problem)


SPARSE = [
    ("bfloat16", 4, 128, None, 1, 8, 32768, 1, 1024, {}),
    ("bfloat16", 4, 128, None, 1, 2, 131072, 1, 1024, {}),
    ("float16", 7, 80, 64, 2, 2, 20000, 2, 512, {}),
    ("float32", 3, 96, None, 2, 2, 9000, 3, 512, {"extra": True}),
    ("bfloat16", 16, 256, None, 1, 1, 12000, 1, 1024, {"softcap": 30.0}),
]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_attention_reads_what_the_specification_selects(case, monkeypatch):
    dtype, group, head_dim, value_dim, batch, heads, slots, query_len, budget, more = case
    sparse = SparseSpec("lychee", budget, 16, 64, 16, 65536)
    spec = make_spec(dtype, group, head_dim, value_dim, sparse, **more)
    module, length = compiled(spec), slots - 50 - query_len
    problem = Problem(spec, batch, heads, slots, length, query_len)
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    assert_as_good_as_eager(problem.sparse(module, index), problem)  # nothing indexed yet
    index.build(module, problem.key, [length] * problem.key.shape[0])
    output, read, made = slots_read(monkeypatch, problem, lambda: problem.sparse(module, index))
    assert_selected(problem, index, read, made)
    truth = problem.attention(read)
    eager = problem.attention(read, problem.query.dtype)
    band = rounding_band(output, truth, problem)
    assert (output - truth).abs().max() <= (eager - truth).abs().max() + band


@pytest.mark.parametrize("slots", [32768, 131072], ids=["flat", "paged"])
@pytest.mark.parametrize("group", [1, 4])
def test_as_many_tokens_are_read_as_it_takes_to_cover_a_share(group, slots, monkeypatch):
    counts = []
    for coverage in (0.05, 0.9, None):
        sparse = SparseSpec("lychee", 2048, 16, 64, 16, 65536, coverage)
        spec = make_spec("bfloat16", group, 128, None, sparse)
        module, length = compiled(spec), slots - 50
        problem = Problem(spec, 1, 4, slots, length)
        index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
        index.build(module, problem.key, [length])
        output, read, _ = slots_read(monkeypatch, problem, lambda: problem.sparse(module, index))  # noqa: B023
        truth, eager = problem.attention(read), problem.attention(read, problem.query.dtype)
        band = rounding_band(output, truth, problem)
        assert (output - truth).abs().max() <= (eager - truth).abs().max() + band
        counts.append(read.sum(-1))
        share = problem.share()
        covered = (share * read[:, :, None]).sum(-1).mean(2)
        used_up = counts[-1] >= 0.95 * 2048 - 32
        assert (used_up | (covered >= (coverage or 1) - 0.08)).all()
    few, more, most = counts
    assert (few <= more).all()
    assert (few < more).all() or slots > 65536  # random keys are alike, and pages of them more so
    assert (more <= most).all()
    assert (most <= 2048).all()


def test_a_trial_compiles_what_calls_launch_and_all_of_it_at_once():
    spec = make_spec("bfloat16", 4, 128, None, SparseSpec("lychee", 333, 16, 64, 16, 65536))
    module, slots = compiled(spec), 20000
    problem = Problem(spec, 1, 8, slots, slots - 51)
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)

    def step(given):
        index.build(given, problem.key, [problem.length])
        return problem.sparse(given, index)

    def kernels():
        names = ("encode", "query_weights", "scan_tokens", "attend", "combine")
        return {name: list(getattr(module, name).device_caches[0][0]) for name in names}

    compile_together(module, step)
    before = kernels()
    assert all(len(made) == 1 for made in before.values())
    step(module)
    index.build(module, problem.key, [1603])
    assert kernels() == before


def slots_read(monkeypatch, problem, call):
    """Return the output of a call of the sparse kernels, the slots it read, and its scratch memory.

    Slots are bool [B, Hkv, T, L].
    """
    kept = {}
    allocate = Scratch.allocate

    def keep(scratch, device):
        made = allocate(scratch, device)
        made["chosen_list"].fill_(-1)
        kept.update(made)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "allocate", keep)
        output = call()
    batch, heads, slots, _ = problem.key.shape
    lists = kept["chosen_list"].flatten(1).long()
    mask = torch.zeros(len(lists), slots + 1, dtype=torch.bool, device="cuda")
    mask.scatter_(1, torch.where(lists < 0, slots, lists), True)
    assert ((lists >= 0).sum(1) == mask[:, :-1].sum(1)).all()  # none twice
    read = mask[:, :-1].view(batch, problem.query_len, heads, slots).transpose(1, 2)
    return output, read, kept


def in_listed_pages(problem, made):
    """Return which slots are in the listed pages: bool [B, Hkv, T, L]."""
    batch, heads, slots, _ = problem.key.shape
    pages = -(-slots // PAGE)
    listed = torch.zeros(len(made["candidates"]), pages + 1, dtype=torch.bool, device="cuda")
    number = torch.arange(made["candidates"].shape[1], device="cuda")
    inside = number < made["candidate_count"][:, None]
    listed.scatter_(1, torch.where(inside, made["candidates"] // PAGE, pages).long(), True)
    rows = listed[:, :-1].repeat_interleave(PAGE, 1)[:, :slots]
    return rows.view(batch, problem.query_len, heads, slots).transpose(1, 2)


def assert_selected(problem, index, read, made):
    """Check that the slots `read`, bool [B, Hkv, T, L], are those of most share, but for ties."""
    sparse, heads = problem.spec.sparse, problem.key.shape[1]
    query = problem.query.unflatten(1, (heads, problem.spec.group))
    visible = problem.visible().expand(*query.shape[:3], problem.query_len, -1)
    fresh = torch.full((len(query), 1, problem.query_len), problem.length, device="cuda")
    always, rank, room = select_slots(
        query, index.parts, visible, fresh, problem.finish, problem.spec.head_dim**-0.5,
        SelectionSizes(sparse.budget, sparse.sinks, sparse.recent),
    )  # fmt: skip
    if "candidates" in made:
        rank = rank.masked_fill(~in_listed_pages(problem, made), -torch.inf)
    assert (read | ~always).all()
    chosen = read & ~always
    assert (chosen.sum(-1) <= room).all()
    assert (chosen.sum(-1) >= 0.95 * room - 32).all()  # each program may leave some of the last bin
    order = rank.sort(-1, descending=True).values
    cut = order.gather(-1, room[..., None])
    unclear = 0.4  # bins of an eighth of an octave, and weights in eight bits
    assert (chosen | (rank <= cut + unclear)).all()
    assert (~chosen | (rank >= cut - unclear)).all()


def test_one_captured_graph_follows_lengths_contents_and_index(monkeypatch):
    sparse = SparseSpec("lychee", 256, 16, 64, 16, 65536)
    spec = make_spec("bfloat16", 4, 128, None, sparse)
    module, slots, length = compiled(spec), 8192, 3000
    problem = Problem(spec, 2, 2, slots, length)
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    index.build(module, problem.key, [length] * problem.key.shape[0])
    fresh_key, fresh_value = problem.key[:, :, :1].clone(), problem.value[:, :, :1].clone()
    problem.sparse(module, index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.key.index_copy_(2, problem.positions, fresh_key)
        problem.value.index_copy_(2, problem.positions, fresh_value)
        output = problem.sparse(module, index)

    def step(position):
        problem.length = position
        problem.last.fill_(position)
        problem.positions.fill_(position)
        fresh_key.copy_(problem.keys(2, 2, 1))
        fresh_value.copy_(problem.randn(2, 2, 1, 128))
        problem.query.copy_(problem.randn(*problem.query.shape))
        graph.replay()
        eager, read, made = slots_read(monkeypatch, problem, lambda: problem.sparse(module, index))
        assert torch.equal(output, eager)
        if position % 16 == 0:
            assert_selected(problem, index, read, made)

    for position in range(length, length + 200):
        step(position)
    for position in range(length + 50, length + 80):  # drafts were rejected
        step(position)
    problem.key.copy_(problem.keys(2, 2, slots))  # a new prompt, of another length
    index.distrust()
    problem.last.fill_(5000)
    problem.positions.fill_(5000)
    problem.length = 5000
    graph.replay()
    assert_as_good_as_eager(output, problem)
    index.build(module, problem.key, [5001] * problem.key.shape[0])
    for position in range(5001, 5050):
        step(position)


def test_a_step_sketches_keys_as_the_build_does():
    sparse = SparseSpec("lychee", 256, 16, 64, 16, 65536)
    spec = make_spec("bfloat16", 4, 128, None, sparse)
    module = compiled(spec)
    problem = Problem(spec, 1, 2, 4096, 2000, query_len=8)
    index = SketchIndex(SketchLayout.over(problem.key), problem.key.device)
    index.build(module, problem.key, [2000] * problem.key.shape[0])
    problem.sparse(module, index)
    whole = SketchIndex(index.layout, problem.key.device)
    whole.state.copy_(index.state)
    run_encode(module, problem.key, whole.layout, whole.parts, 0, 2008)
    for name in ("fine", "coarse"):
        stepped, built = (getattr(each.parts, name)[:, :, :2008] for each in (index, whole))
        assert (stepped != built).float().mean() < 0.01, name
