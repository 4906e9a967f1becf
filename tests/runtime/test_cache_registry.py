"""The registry knows the index of every cache, which stays true between calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import row_chunks
from tiny_models import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY, Past, StaticKV, TinyDecoder
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import BoundaryTable
from lychee_compile.kernels.operators import reference as reference_operators
from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.options import Options
from lychee_compile.runtime.cache_registry import registry

BATCH, SIZE, PROMPT = 2, 160, 70
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}
SPARSE = {**EVERYTHING, "budget": 32, "overfetch": 1}

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def tokens(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (BATCH, count), generator=generator)


def compiled_decoder(options: dict[str, Any]) -> tuple[TinyDecoder, Any]:
    model = TinyDecoder().eval()
    return model, torch.compile(model, backend="lychee", options=options)


def prompted(model: TinyDecoder, seed: int) -> StaticKV:
    cache = StaticKV.empty(BATCH, SIZE)
    model(tokens(seed, PROMPT), cache=cache)
    return cache


def index_of(cache: Tensor, options: dict[str, Any]) -> Any:
    return registry.index_of(cache, Options.parse(None, options).index_config())


# Strength 4 after every token below 16, none elsewhere.
STRENGTHS = torch.where(torch.arange(VOCABULARY) < 16, 4, 0).to(torch.uint8)
CHUNK = (4, 12)


def check_cuts(index: Any, ids: Tensor) -> None:
    """Check that each chunk ends at the first of the strongest boundaries that lengths allow."""
    strength = STRENGTHS[ids]
    for row in range(BATCH):
        *chunks, _ = row_chunks(index, row)
        assert len(chunks) > 3
        for start, length in chunks:
            window = strength[row, start + CHUNK[0] - 1 : start + CHUNK[1]]
            assert int(strength[row, start + length - 1]) == int(window.max())


STATIC_OR_GROWING = pytest.mark.parametrize(
    "growing", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["static", "growing"]
)


@STATIC_OR_GROWING
def test_chunks_end_where_the_table_says(growing: bool) -> None:
    options = {
        **SPARSE,
        "chunk": CHUNK,
        "recent": 12,
        "tokenizer": BoundaryTable(STRENGTHS),
    }
    _, compiled = compiled_decoder(options)
    for length in (50, 70):  # the second prompt makes its length symbolic
        ids = tokens(length, length + 30)
        cache: StaticKV | Past
        if growing:
            _, cache = compiled(ids[:, :length])
        else:
            cache = StaticKV.empty(BATCH, SIZE)
            compiled(ids[:, :length], cache=cache)
        for step in range(length, length + 30):
            fresh = ids[:, step : step + 1]
            if growing:
                _, cache = compiled(fresh, past=cache)
            else:
                compiled(fresh, cache=cache)
        keys = [key for key, _ in cache] if isinstance(cache, list) else cache.keys
        for key in keys:
            check_cuts(index_of(key, options).index, ids)


def test_without_a_table_chunks_are_cut_elsewhere() -> None:
    """The chunks in the test above are cut there because of the table."""
    model, compiled = compiled_decoder({**SPARSE, "chunk": CHUNK, "recent": 12})
    cache = StaticKV.empty(BATCH, SIZE)
    ids = tokens(0, PROMPT + 1)
    model(ids[:, :PROMPT], cache=cache)
    compiled(ids[:, PROMPT:], cache=cache)
    index = index_of(cache.keys[0], {**SPARSE, "chunk": CHUNK, "recent": 12}).index
    with pytest.raises(AssertionError):
        check_cuts(index, ids)


def test_a_table_is_of_no_use_to_exact_attention() -> None:
    table = BoundaryTable(STRENGTHS)
    _, compiled = compiled_decoder({**SPARSE, "budget": None, "tokenizer": table})
    cache = StaticKV.empty(BATCH, SIZE)
    compiled(tokens(0, PROMPT), cache=cache)
    compiled(tokens(1, 1), cache=cache)
    assert len(registry) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_breaks_off_drops_its_index(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, compiled = compiled_decoder(EVERYTHING)
    cache = prompted(model, 0)
    compiled(tokens(1, 1), cache=cache)
    assert len(registry) == LAYERS

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(reference_operators, "select", broken)
        with pytest.raises(error, match="in the middle"):
            compiled(tokens(2, 1), cache=cache)
    assert len(registry) == 0
    shadow = cache.copy()
    got, expected = compiled(tokens(3, 1), cache=cache), model(tokens(3, 1), cache=shadow)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(registry) == LAYERS


def test_threads_with_caches_of_their_own_do_not_mix() -> None:
    model, compiled = compiled_decoder(SPARSE)

    def decode(seed: int) -> list[Tensor]:
        with torch.no_grad():
            cache = prompted(model, seed)
            return [compiled(tokens(seed + step, 1), cache=cache) for step in range(20)]

    alone = [decode(seed) for seed in (0, 100)]
    together: list[list[Tensor]] = [[], []]

    def run(slot: int, seed: int) -> None:
        together[slot] = decode(seed)

    threads = [threading.Thread(target=run, args=(slot, 100 * slot)) for slot in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for got, expected in zip(together, alone, strict=True):
        assert len(got) == 20
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
def test_a_new_prompt_of_the_same_length_is_noticed(guard: Any) -> None:
    """Tensors made in inference mode count no versions."""
    model, compiled = compiled_decoder(EVERYTHING)
    sparse = torch.compile(model, backend="lychee", options=SPARSE)
    with guard():
        for decoder, exact in ((compiled, True), (sparse, False)):
            cache = prompted(model, 0)
            assert cache.keys[0].is_inference() == (guard is torch.inference_mode)
            for seed in (10, 20, 30):
                cache.length.zero_()
                model(tokens(seed, PROMPT), cache=cache)
                shadow, fresh = cache.copy(), cache.copy()
                for step in range(5):
                    ids = tokens(seed + step, 1)
                    got = decoder(ids, cache=cache)
                    reference = model(ids, cache=shadow) if exact else decoder(ids, cache=fresh)
                    torch.testing.assert_close(got, reference, atol=1e-5, rtol=1e-5)
                options = EVERYTHING if exact else SPARSE
                state = index_of(cache.keys[0], options)
                length = PROMPT + 5
                assert torch.equal(
                    state.fingerprint[:, :length], fingerprints(cache.keys[0][:, :, :length])
                )


@pytest.mark.parametrize("reset", [lychee_compile.reset, torch.compiler.reset])
def test_reset_forgets_indexes_and_reports(reset: Any) -> None:
    _, compiled = compiled_decoder(SPARSE)
    cache = StaticKV.empty(BATCH, SIZE)
    compiled(tokens(0, 1), cache=cache)
    assert len(registry) == LAYERS
    assert len(lychee_compile.reports()) == 1
    reset()
    assert len(registry) == 0
    assert lychee_compile.reports() == []
    compiled(tokens(1, 1), cache=cache)
    assert len(registry) == LAYERS


@pytest.mark.parametrize("budget", [2000, 32])
def test_a_growing_cache_follows_pieces_longer_than_the_query(budget: int) -> None:
    """Each call appends five keys, asks with one query, and is then cropped by four."""

    def step(query, past_key, past_value, k_new, v_new):
        key, value = torch.cat((past_key, k_new), 2), torch.cat((past_value, v_new), 2)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return attended, key, value

    options = {**SPARSE, "budget": budget}
    key, value = torch.randn(2, BATCH, KV_HEADS, 1000, HEAD_DIM)
    compiled = torch.compile(step, backend="lychee", options=options)
    for _ in range(8):
        query = torch.randn(BATCH, HEADS, 1, HEAD_DIM)
        fresh = torch.randn(2, BATCH, KV_HEADS, 5, HEAD_DIM)
        expected = step(query, key, value, *fresh)[0]
        got, key, value = compiled(query, key, value, *fresh)
        if budget > 1000:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        state = index_of(key, options)
        if state is not None:  # the first graph is compiled for a length within the budget
            length = key.shape[2]
            assert torch.equal(state.fingerprint[:, :length], fingerprints(key))
        key, value = key[:, :, :-4], value[:, :, :-4]
    assert counters["lychee"]["sparse"] > 0


@STATIC_OR_GROWING
def test_nothing_is_compiled_more_often_than_without_us(growing: bool) -> None:
    model = TinyDecoder().eval()

    def graphs(name: str, **given: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=name, **given)
        cache: StaticKV | None = StaticKV.empty(BATCH, SIZE)
        past: Past | None = None
        for ids in (tokens(0, 60), *(tokens(step, 1) for step in range(20))):
            if growing:
                _, past = compiled(ids, past=past)
            else:
                compiled(ids, cache=cache)
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    expected = graphs("aot_eager")
    assert graphs("lychee", options=SPARSE) == expected
    assert counters["lychee"]["sparse"] > 0
