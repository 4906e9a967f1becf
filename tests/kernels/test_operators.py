"""The registered operators: PyTorch's own checks, shapes, order in a graph, dependencies."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import Heads, bounded_select, configs, heads, masks, random, row_chunks, seeds
from torch.fx.experimental.proxy_tensor import make_fx

from lychee_compile.kernels import handles, reference
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex
from lychee_compile.kernels.operators import reference as reference_operators
from lychee_compile.kernels.operators.observe import observers
from lychee_compile.kernels.operators.reference import sparse_attention, update_index
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.kernels.reference import own_slots
from lychee_compile.kernels.reference.operands import ScoreInputs

SHAPE = Heads(2, 2, 2, 8)
CONFIG = IndexConfig(sinks=2, recent=8, chunk=(2, 4), cluster_chunks=2, budget=24)
POLICIES = ["lychee", "quest", "clusterkv", "hisa", "tokenselect", "streaming", "oracle"]
HIDDEN = torch.zeros(1, 1, 1, 60, dtype=torch.bool)


@pytest.fixture
def handle():
    return ReferenceCacheIndex(CONFIG)


@pytest.fixture
def calls():
    """Collect what the sparse attention calls of a test tell their observers."""
    seen = []
    note = seen.append
    observers.append(note)
    yield seen
    observers.remove(note)


def operand_sets():
    """Yield query, key, value and mask in all dtypes, with one query or several."""
    for dtype in reference_operators.DTYPES:
        for query_len, group in ((1, 2), (3, 1), (3, 2)):
            shape = Heads(2, 2, group, 8)
            key = shape.keys("gaussian", 0, 60, dtype)
            value = random(1, 2, 2, 60, 4).to(dtype)
            mask = torch.ones(2, 1, query_len, 60, dtype=torch.bool).tril(60 - query_len)
            for each in (None, mask, torch.where(mask, 0.0, -torch.inf).to(dtype)):
                yield shape.queries(0, query_len, dtype), key, value, each


@pytest.mark.parametrize("operands", list(operand_sets()))
def test_sparse_attention_is_a_proper_operator(operands, handle):
    query, key, value, mask = operands
    update_index(key, mask, None, None, handle.tensor, 1)
    extra = torch.randn(query.shape[1], 1)
    sink, softcap = (extra, 5.0) if mask is None else (None, None)
    arguments = (query, key, value, mask, sink, handle.tensor, 0.3, softcap, "site")
    torch.library.opcheck(sparse_attention, arguments)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("query_len", [1, 4, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sink", [False, True])
def test_soft_caps_and_extra_logits_are_what_they_say(group, query_len, softcap, sink):
    """Against the formula in float64, with all keys read; 20 queries take the dense way."""
    heads, kv_len = 2, 50
    owner = ReferenceCacheIndex(IndexConfig(sinks=2, recent=8, chunk=(2, 4), budget=kv_len))
    query = torch.randn(2, heads * group, query_len, 8)
    key, value = torch.randn(2, 2, heads, kv_len, 8)
    extra = torch.randn(heads * group, 1) if sink else None
    seen = torch.ones(query_len, kv_len, dtype=torch.bool).tril(kv_len - query_len)
    update_index(key, seen, None, None, owner.tensor, 1)
    got = sparse_attention(query, key, value, seen, extra, owner.tensor, 0.7, softcap, "")
    wide, values = (each.double().repeat_interleave(group, 1) for each in (key, value))
    score = 0.7 * query.double() @ wide.mT
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~seen, -torch.inf)
    if extra is not None:
        column = extra.double()[None, :, :, None].expand(2, -1, query_len, 1)
        score = torch.cat((score, column), -1)
    expected = score.softmax(-1)[..., :kv_len] @ values
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@given(seeds, st.floats(0.5, 40.0))
def test_bounds_of_soft_capped_scores_hold(seed, softcap):
    """Keys not read hold no more mass than the bound says; the cap applies to both."""
    key, query = SHAPE.keys("gaussian", seed, 60), 3 * SHAPE.queries(seed, 2)
    owner = ReferenceCacheIndex(CONFIG)
    update_index(key, None, None, None, owner.tensor, 1)
    index = owner.index_for(key).index
    chosen = bounded_select(index, ScoreInputs(query, key, 60, None, 0.5, softcap), 24)
    wide = key.repeat_interleave(SHAPE.group, 1)
    score = softcap * torch.tanh(0.5 * query @ wide.mT / softcap)
    read = chosen.token_mask().repeat_interleave(SHAPE.group, 1)
    unread = score.masked_fill(read, -torch.inf).logsumexp(-1)
    assert bool((unread <= chosen.log_unread_bound + 1e-4).all())


@pytest.mark.parametrize(
    ("positions", "token_ids", "mask"),
    [
        (None, None, None),
        (torch.arange(57, 60), torch.zeros(2, 3, dtype=torch.int64), None),
        (torch.arange(57, 60).expand(2, -1), None, HIDDEN.logical_not()),
    ],
)
def test_update_index_is_a_proper_operator(positions, token_ids, mask):
    owner = ReferenceCacheIndex(CONFIG, lambda ids: ids.to(torch.uint8))
    key = SHAPE.keys("gaussian", 0, 60)
    operands = (key, mask, positions, token_ids, owner.tensor, 3)
    torch.library.opcheck(update_index, operands)


@given(
    heads, configs(policy="lychee"), st.sampled_from(reference_operators.DTYPES), seeds, st.data()
)
def test_the_operators_attend_as_sdpa_does(shape, config, dtype, seed, data):
    """With a budget for everything, whatever the mask; what was never indexed is read whole."""
    tokens = data.draw(st.integers(1, 60))
    query_len = data.draw(st.integers(1, min(4, tokens)))
    key, query = shape.keys("gaussian", seed, tokens, dtype), shape.queries(seed, query_len, dtype)
    mask = data.draw(masks(shape, query_len, tokens, dtype)).tensor
    owner = ReferenceCacheIndex(IndexConfig(**{**vars(config), "budget": tokens}))
    if data.draw(st.booleans()):
        update_index(key, mask, None, None, owner.tensor, query_len)
    output = sparse_attention(query, key, key, mask, None, owner.tensor, 0.2, None, "")
    dense = F.scaled_dot_product_attention(
        query, key, key, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    assert output.dtype == dtype
    few = 16 * torch.finfo(dtype).eps * float(key.float().abs().max())
    torch.testing.assert_close(output, dense, rtol=0, atol=max(few, 1e-4))


@pytest.mark.parametrize(
    "hidden",
    [
        False,
        -torch.inf,
        *(torch.finfo(dtype).min for dtype in reference_operators.DTYPES),
        -1e9,
        -1e4,
    ],
)
@pytest.mark.parametrize("idle", [[1], [0], [0, 1]])
def test_a_row_that_sees_nothing_gets_zeros_and_others_stay_sparse(hidden, idle, handle, calls):
    key, query = SHAPE.keys("gaussian", 0, 60), SHAPE.queries(0, 1)
    mask = HIDDEN.logical_not().repeat(2, 1, 1, 1)
    mask = mask if hidden is False else torch.zeros(mask.shape)
    expected = _decoded(query, key, mask)
    calls.clear()
    mask[idle], expected[idle] = hidden, 0
    update_index(key, mask, None, None, handle.tensor, 1)
    output = sparse_attention(query, key, key, mask, None, handle.tensor, 0.3, None, "")
    torch.testing.assert_close(output, expected)
    ((call,),) = (calls,)
    read = call.selection.tokens()
    assert (read[idle] < 0).all()
    assert all((row >= 0).any() for number, row in enumerate(read) if number not in idle)


def _decoded(query, key, mask):
    """Return one step over an index of its own."""
    owner = ReferenceCacheIndex(CONFIG)
    update_index(key, mask, None, None, owner.tensor, 1)
    return sparse_attention(query, key, key, mask, None, owner.tensor, 0.3, None, "")


def test_a_row_without_keys_gets_zeros_beside_an_attention_sink(handle):
    """A slot that nobody sees may hold anything."""
    key, query = SHAPE.keys("gaussian", 0, 60), SHAPE.queries(0, 1)
    mask = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    mask[1], key[1] = False, torch.nan
    extra = torch.zeros(query.shape[1], 1)
    update_index(key, mask, None, None, handle.tensor, 1)
    output = sparse_attention(query, key, key, mask, extra, handle.tensor, 0.3, None, "")
    assert (output[1] == 0).all()
    assert output[0].isfinite().all()


def test_an_idle_row_becomes_busy_and_idle_again(calls):
    owner = ReferenceCacheIndex(replace(CONFIG, budget=60))
    key, query = SHAPE.keys("gaussian", 0, 60), SHAPE.queries(0, 1)
    slot = torch.arange(60)
    for step in range(40, 56):
        busy = step // 4 % 2 == 0
        mask = (slot <= step).repeat(2, 1, 1, 1)
        mask[1] &= busy
        key[:, :, step] = SHAPE.keys("gaussian", step, 1)[:, :, 0]
        at = torch.tensor([step])
        update_index(key, mask, at, None, owner.tensor, 1)
        output = sparse_attention(query, key, key, mask, None, owner.tensor, 0.3, None, "")
        dense = F.scaled_dot_product_attention(
            query, key, key, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        dense[1] = dense[1] if busy else 0
        torch.testing.assert_close(output, dense)
        assert calls[-1].selection.token_mask().sum(-1)[:, 0, 0].tolist() == [
            step + 1,
            busy * (step + 1),
        ]


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_requests_read_their_own_within_the_budget(policy, calls):
    """Documents lie side by side in a row; each query is of one of them."""
    documents, size, budget = 3, 60, 32
    key = SHAPE.keys("gaussian", 0, documents * size)
    query = SHAPE.queries(0, documents)
    owner = ReferenceCacheIndex(replace(CONFIG, policy=policy, budget=budget))
    slot = torch.arange(documents * size)
    for step in range(40, 50):
        at = torch.arange(documents) * size + step
        mine = slot // size == torch.arange(documents)[:, None]
        mask = (mine & (slot <= at[:, None]))[None, None]
        key[:, :, at] = SHAPE.keys("gaussian", step, documents)
        update_index(key, mask, at, None, owner.tensor, documents)
        sparse_attention(query, key, key, mask, None, owner.tensor, 0.3, None, "")
        read = calls[-1].selection.token_mask()
        assert not (read & ~mask).any()
        assert (read.sum(-1) <= budget).all()
        assert all(read[:, :, number, each].all() for number, each in enumerate(at))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["side by side", "in turns", "uneven", "one is idle"])
def test_slots_of_each_querys_own_are_chosen_from_as_from_all(kind, softcap, calls, monkeypatch):
    """To score only what a query sees changes nothing but the time that it takes."""
    slot, documents = torch.arange(180), 3
    number = slot % 3 if kind == "in turns" else slot // 60
    number = (slot >= 20).int() + (slot >= 110).int() if kind == "uneven" else number
    mask = (number == torch.arange(documents)[:, None])[None, None].clone()
    if kind == "one is idle":
        mask[:, :, 1] = False
    key, query = SHAPE.keys("gaussian", 0, 180), SHAPE.queries(0, documents)
    owner = ReferenceCacheIndex(replace(CONFIG, budget=18))
    update_index(key, mask, None, None, owner.tensor, documents)
    for few in (2, 10**6):  # no query sees so small a part
        monkeypatch.setattr(own_slots, "FEW", few)
        sparse_attention(query, key, key, mask, None, owner.tensor, 0.3, softcap, "")
    one, other = (each.selection.token_mask() for each in calls)
    assert torch.equal(one, other)


@pytest.mark.parametrize("written", [0, 1, 60])
def test_an_update_may_see_nothing(written, handle):
    """A read-only use of a cache takes the last visible slot for the last written one."""
    key = SHAPE.keys("gaussian", 0, 60)
    update_index(key, HIDDEN, None, None, handle.tensor, written)
    update_index(key, None, None, None, handle.tensor, 0)
    whole = ReferenceCacheIndex(CONFIG)
    update_index(key, None, None, None, whole.tensor, 1)
    assert row_chunks(handle.cache.index, 0) == row_chunks(whole.cache.index, 0)


def test_token_ids_give_the_strengths():
    """Token ids count in a dense prefill too, which is indexed when decoding begins."""
    key = SHAPE.keys("gaussian", 0, 61)
    owner = ReferenceCacheIndex(CONFIG, lambda ids: (ids == 7).to(torch.uint8))
    ids = torch.zeros(1, 61, dtype=torch.int64)
    ids[:, 2::3] = 7
    update_index(key, None, torch.arange(60), ids[:, :60], owner.tensor, 60)
    assert not owner.cache.index.span.any()
    update_index(key, None, torch.tensor([60]), ids[:, 60:], owner.tensor, 1)
    assert {size for _, size in row_chunks(owner.cache.index, 1)[:-1]} == {3}


def test_a_prefill_is_dense(handle, calls):
    many = reference_operators.LONGEST_QUERY + 1
    key, query = SHAPE.keys("gaussian", 0, 60), SHAPE.queries(0, many)
    update_index(key, None, None, None, handle.tensor, 1)
    output = sparse_attention(query, key, key, None, None, handle.tensor, 0.3, None, "")
    torch.testing.assert_close(
        output, F.scaled_dot_product_attention(query, key, key, scale=0.3, enable_gqa=True)
    )
    assert calls == []


def test_symbolic_shapes(handle):
    """One trace serves any length."""

    def attend(query, key, value, tensor):
        return sparse_attention(query, key, value, None, None, tensor, 0.3, None, "")

    def operands(tokens, query_len):
        key = SHAPE.keys("gaussian", 0, tokens)
        return SHAPE.queries(0, query_len), key, random(1, 2, 2, tokens, 5), handle.tensor

    graph = make_fx(attend, tracing_mode="symbolic")(*operands(60, 3))
    node = next(node for node in graph.graph.nodes if "sparse_attention" in str(node.target))
    fake = node.meta["val"]
    assert isinstance(fake.shape[2], torch.SymInt)
    assert fake.is_contiguous()
    for tokens, query_len in ((70, 4), (33, 2)):
        given_ = operands(tokens, query_len)
        output = graph(*given_)
        assert output.shape == (2, 4, query_len, 5)
        assert torch.equal(output, attend(*given_))


def decode(key, query, new, position, handle):
    """Decode two tokens in one graph: write and read, write and read."""
    outputs = []
    for offset in range(2):
        at = position + offset
        key.index_copy_(2, at, new + offset)
        seen = torch.arange(key.shape[2]) <= at
        update_index(key, seen[None], at, None, handle, 1)
        read = sparse_attention(query, key, key, seen[None], None, handle, 0.3, None, "site")
        outputs.append(read)
    return outputs


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_graph_keeps_updates_and_reads_in_order(compiler, calls):
    results = []
    for function in (decode, torch.compile(decode, backend=compiler, fullgraph=True)):
        key, query, new = SHAPE.keys("gaussian", 0, 60), SHAPE.queries(0, 1), random(3, 2, 2, 1, 8)
        owner = ReferenceCacheIndex(CONFIG)
        update_index(key[:, :, :50], None, torch.arange(50), None, owner.tensor, 50)
        ends, count = [], owner.tensor[1].item()
        observers.append(lambda call, ends=ends: ends.append(int(call.index.end.max())))
        outputs = function(key, query, new, torch.tensor([50]), owner.tensor)
        observers.pop()
        assert ends == [51, 52]
        assert owner.tensor[1].item() == count + 2
        assert handles.find(owner.tensor, ReferenceCacheIndex) is owner
        results.append((*outputs, key))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
    assert {call.site for call in calls} == {"site"}


def test_an_update_alone_is_not_dead_code():
    """Nothing reads its result, yet functionalisation must keep it."""

    def note(key, handle):
        update_index(key, None, None, None, handle, 60)
        return key + 1

    owner, key = ReferenceCacheIndex(CONFIG), SHAPE.keys("gaussian", 0, 60)
    torch.compile(note, backend="aot_eager", fullgraph=True)(key, owner.tensor)
    assert owner.cache.known.tolist() == [60, 60]


def test_observers_see_the_operands(handle, calls):
    key, query = SHAPE.keys("gaussian", 0, 60), SHAPE.queries(0, 1)
    update_index(key, None, None, None, handle.tensor, 1)
    sparse_attention(query, key, key, None, None, handle.tensor, 0.3, None, "layer")
    (call,) = calls
    assert (call.site, call.operands.scale, call.operands.mask) == ("layer", 0.3, None)
    assert call.index is handle.cache.index
    assert call.selection.token_mask().sum(-1).max() <= CONFIG.budget


def test_a_handle_is_found_by_a_copy_and_gone_with_its_owner():
    owner = ReferenceCacheIndex(CONFIG)
    copy = owner.tensor.clone()
    others = [ReferenceCacheIndex(CONFIG) for _ in range(2)]
    assert handles.find(copy, ReferenceCacheIndex) is owner
    assert owner.tensor[0] not in [other.tensor[0] for other in others]
    with pytest.raises(TypeError, match="handle of a GrowingCacheIndex, not a ReferenceCacheIndex"):
        handles.find(copy, GrowingCacheIndex)
    del owner
    gc.collect()
    with pytest.raises(KeyError):
        handles.find(copy, ReferenceCacheIndex)


@pytest.mark.parametrize("other", [Heads(3, 2, 1, 8), Heads(2, 1, 1, 8), Heads(2, 2, 1, 4)])
def test_a_cache_of_another_shape_has_another_index(other, handle):
    first = handle.index_for(SHAPE.keys("gaussian", 0, 60))
    assert handle.index_for(SHAPE.keys("gaussian", 0, 70)) is first
    assert handle.index_for(other.keys("gaussian", 0, 60)) is not first


def test_the_operators_do_not_take_float64():
    """The passes keep such sites; the reference itself computes them in float64."""
    assert set(reference_operators.DTYPES) == {torch.float32, torch.bfloat16, torch.float16}


REFERENCE = Path(reference.__file__).parent
ALLOWED = (
    "torch",
    "sympy",
    "lychee_compile.kernels.config",
    "lychee_compile.kernels.levels",
    "lychee_compile.kernels.reference",
    "lychee_compile.kernels.sizes",
)


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.py")), ids=lambda path: path.name)
def test_the_reference_imports_torch_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            own = any(name == each or name.startswith(each + ".") for each in ALLOWED)
            assert own or name.partition(".")[0] in sys.stdlib_module_names, name


def test_the_kernels_run_where_nothing_but_torch_is_installed():
    script = """
import sys
import torch
blocked = ("transformers", "triton", "rich", "matplotlib", "tokenizers", "networkx")
loaded = {name for name in blocked if name in sys.modules}
class Blocker:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in blocked and name.partition(".")[0] not in loaded:
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference import attention, operands, selection
key = torch.ones(1, 1, 99, 4)
built = make_index(1, 1, 4, IndexConfig(), key.device)
built.extend(key, torch.tensor([99]))
given = operands.Operands(key[:, :, :1], key, key, None, 0.5)
attention.attend(given, selection.select(built, given.score_inputs, 90))
assert not {name for name in blocked if name in sys.modules} - loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
