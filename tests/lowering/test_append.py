"""Growing caches keep room behind them; nobody's tensor changes for it."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from cache_names import CACHE
from hypothesis import given
from hypothesis import strategies as st
from kernel_steps import SMALL, compiled, grow
from small_decoders import model_of, transformers

import lychee_compile
from lychee_compile.kernels.operators import append as module
from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.options import Options
from lychee_compile.passes import pipeline
from lychee_compile.runtime.cache_registry import registry

append = torch.ops.lychee.append.default


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@given(
    dims=st.sampled_from([(2, 4), (1, 4), (0, 2), (1, 3)]),
    actions=st.lists(st.sampled_from(["append", "three", "crop", "branch", "write"]), max_size=12),
)
def test_any_history_gives_what_concatenation_gives(dims, actions):
    """A tensor that was handed out keeps its contents, whatever is appended to it or to others."""
    dim, rank = dims
    sizes = [2, 3, 2, 4][:rank]
    sizes[dim] = 5
    known = [(torch.randn(sizes), None)]
    known[0] = (known[0][0], known[0][0].clone())
    for number, action in enumerate(actions):
        tensor, expected = known[-1]
        if action == "branch":
            tensor, expected = known[number % len(known)]
        if action == "crop":
            length = max(tensor.shape[dim] - 2, 1)
            known.append((tensor.narrow(dim, 0, length), expected.narrow(dim, 0, length).clone()))
            continue
        if action == "write":
            fresh = tensor.clone()
            known.append((fresh, fresh.clone()))
            continue
        sizes[dim] = 3 if action == "three" else 1
        new = torch.randn(sizes)
        known.append((append(tensor, new, dim), torch.cat((expected, new), dim)))
    for tensor, expected in known:
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_the_past_is_copied_once_in_many_steps():
    keys = torch.randn(1, 2, 1000, 8)
    places = []
    for _ in range(600):
        keys = append(keys, torch.randn(1, 2, 1, 8), 2)
        places.append(storage(keys))
    assert len(set(places)) == 2
    room = keys.stride(1) // 8
    assert keys.stride() == (2 * room * 8, room * 8, 8, 1)
    assert room > 1600


def test_a_copy_of_a_cache_goes_its_own_way():
    first = append(torch.zeros(1, 1, 5, 2), torch.ones(1, 1, 1, 2), 2)
    deep = copy.deepcopy(first)
    one, other = (
        append(each, torch.full((1, 1, 1, 2), n), 2) for each, n in ((first, 2), (deep, 3))
    )
    shallow = append(first, torch.full((1, 1, 1, 2), 4), 2)
    assert len({storage(each) for each in (one, other, shallow)}) == 3
    assert [float(each[0, 0, -1, 0]) for each in (one, other, shallow)] == [2, 3, 4]
    assert all(bool((each[:, :, :6] == first).all()) for each in (one, other, shallow))


def test_a_buffer_dies_with_the_tensors_that_show_it():
    keys = append(torch.zeros(1, 1, 5, 2), torch.ones(1, 1, 1, 2), 2)
    buffer = weakref.ref(getattr(keys, module._BUFFER))
    del keys
    assert buffer() is None


def test_without_memory_for_room_there_is_none(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def little(tensor, *sizes, **given):
        if max(sizes) > 8:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return new_empty(tensor, *sizes, **given)

    monkeypatch.setattr(torch.Tensor, "new_empty", little)
    keys = append(torch.zeros(1, 1, 5, 2), torch.ones(1, 1, 1, 2), 2)
    assert keys.shape[2] == 6
    assert not hasattr(keys, module._BUFFER)


def test_opcheck():
    """The strides of the result depend on its room, which no fake tensor knows."""
    utils = ("test_schema", "test_autograd_registration")
    given = (torch.randn(1, 2, 5, 4), torch.randn(1, 2, 1, 4), 2)
    torch.library.opcheck(append, given, test_utils=utils)


def test_nothing_given_shares_storage_with_what_was_taken():
    """Results have their own storages, as PyTorch demands of every operator, over shared memory."""
    with_room = append(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 1, 4), 2)
    place = storage(with_room)
    grown = append(with_room, torch.randn(1, 2, 1, 4), 2)
    assert storage(grown) == place
    assert grown.untyped_storage()._cdata != with_room.untyped_storage()._cdata
    assert grown._version == with_room._version == 0


@pytest.mark.usefixtures("without_inductor", "seeded")
def test_steps_over_a_growing_cache_do_not_copy_it():
    """Compiled twice, as ever: for the first length, and for any."""
    step, expected = compiled(grow), torch.randn(1, 1, 41, 8)
    keys, values = expected.clone(), torch.randn(1, 1, 41, 8)
    places = []
    for _ in range(200):
        fresh = torch.randn(3, 1, 1, 1, 8)
        _, keys, values = step(fresh[0], keys, values, fresh[1], fresh[2])
        expected = torch.cat((expected, fresh[1]), 2)
        places.append((storage(keys), storage(values)))
    assert torch.equal(keys, expected)
    assert len(set(places)) == 1
    assert len(lychee_compile.reports()) == 2


def decoded(model, ids):
    """Return logits of 24 steps, five of them taken back, addresses of keys, and last values."""
    forward = torch.compile(model, backend="lychee", options={"budget": 48, "recent": 16})
    cache, logits, places, length = transformers.DynamicCache(config=model.config), [], [], 60
    model(ids[:, :length], **{CACHE: cache})
    for step in range(24):
        if step == 16:
            cache.crop(-5)
            length -= 5
        token = ids[:, length : length + 1]
        logits.append(forward(token, **{CACHE: cache}).logits)
        length += 1
        places.append(storage(cache.layers[0].keys))
    return torch.stack(logits), places, cache.layers[-1].values


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_dynamic_cache_of_transformers_is_not_copied(inductor, request, monkeypatch):
    """A cache that is not copied decodes as one that is."""
    if not inductor:
        request.getfixturevalue("without_inductor")
    model = model_of("llama" if inductor else "llama of one layer")
    ids = torch.randint(1, 128, (2, 90))
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "append_in_place", lambda *_: 0)
        expected, copied, values = decoded(model, ids)
    torch._dynamo.reset()
    got, places, same = decoded(model, ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(same, values)
    assert len(set(places[:16])) == 1
    assert len(set(places[16:])) == 1
    assert len(set(copied)) > 2


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_an_eager_turn_costs_one_copy_and_no_compilation(heads, inductor, request):
    """An eager step leaves contiguous caches, which the compiled step takes and makes its own."""
    if not inductor:
        request.getfixturevalue("without_inductor")
    step, batch = compiled(grow), 2
    keys, values = torch.randn(2, batch, heads, 60, 8)
    expected = keys

    def decode(keys, values, count):
        places = []
        for _ in range(count):
            query, key, value = torch.randn(3, batch, heads, 1, 8)
            _, keys, values = step(query, keys, values, key, value)
            places.append((storage(keys), storage(values)))
        return keys, values, len(set(places))

    keys, values, _ = decode(keys, values, 5)
    assert torch.equal(keys[:, :, :60], expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            turn = torch.randn(2, batch, heads, 7, 8)
            expected = torch.cat((keys, turn[0]), 2)
            keys, values, copies = decode(expected, torch.cat((values, turn[1]), 2), 6)
            assert torch.equal(keys[:, :, :-6], expected)
            assert copies == 1
    assert len(lychee_compile.reports()) == 2


@pytest.mark.usefixtures("without_inductor", "seeded")
def test_a_cache_that_the_graph_reads_otherwise_is_traced_as_it_is():
    """A result that depends on the strides of a cache must not be traced with other strides."""

    def read_too(query, keys, values, key, value):
        out, grown, more = grow(query, keys, values, key, value)
        return out + keys.reshape(-1)[:1], grown, more

    step = compiled(read_too)
    keys, values = torch.randn(2, 2, 3, 60, 8)
    for length in range(60, 70):
        before = keys
        query, key, value = torch.randn(3, 2, 3, 1, 8)
        _, keys, values = step(query, keys, values, key, value)
        assert torch.equal(keys, torch.cat((before, key), 2))
        assert keys.shape[2] == length + 1


@pytest.mark.usefixtures("without_inductor", "seeded")
def test_a_cache_that_begins_within_the_budget_stays_as_it_is():
    """Dynamo would have to compile for a third time, for other strides."""
    step = compiled(grow, budget=60)
    keys, values = torch.randn(1, 1, 41, 8), torch.randn(1, 1, 41, 8)
    for _ in range(30):
        fresh = torch.randn(3, 1, 1, 1, 8)
        _, keys, values = step(fresh[0], keys, values, fresh[1], fresh[2])
    assert keys.is_contiguous()
    assert len(lychee_compile.reports()) == 2


@pytest.mark.usefixtures("without_inductor", "seeded")
def test_branches_of_a_cache_have_indexes_of_their_own():
    """They go on from the same tensors, one in the buffer of both and one in a copy."""
    step, config = compiled(grow), Options.parse(None, SMALL).index_config()
    keys, values = torch.randn(2, 1, 1, 60, 8)

    def decode(keys, values):
        fresh = torch.randn(3, 1, 1, 1, 8)
        _, grown, more = step(fresh[0], keys, values, fresh[1], fresh[2])
        assert torch.equal(grown, torch.cat((keys, fresh[1]), 2))
        cache = registry.index_of(grown, config)
        if cache is not None:  # the first graph reads all
            known = cache.fingerprint[:, : grown.shape[2]]
            assert cache.known.tolist() == [grown.shape[2]]
            assert torch.equal(known, fingerprints(grown))
        return grown, more

    for _ in range(20):
        keys, values = decode(keys, values)
    first = second = keys, values
    for _ in range(10):
        first, second = decode(*first), decode(*second)
    assert storage(first[0]) == storage(keys) != storage(second[0])
    assert registry.index_of(first[0], config) is not registry.index_of(second[0], config)
    assert not torch.equal(first[0], second[0])
