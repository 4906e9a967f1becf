"""Errors and changes around `generate()`, after which the next generation is right all the same."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from cache_names import CACHE
from generating import (
    EVERYTHING,
    LAYERS,
    NEW,
    PROMPT,
    SPARSE,
    assert_everything_read,
    decoder,
    empty,
    entered,
    generate,
    greedy,
    tokens,
    transformers,
)
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.operators import reference as reference_operators
from lychee_compile.kernels.out_of_memory import warn_of_memory
from lychee_compile.kernels.policies.decode.lychee import LycheeIndex
from lychee_compile.runtime.cache_registry import registry

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def dense(ids: Tensor, dtype: torch.dtype = torch.float32, **given: Any) -> Tensor:
    """Return the tokens that a model without the backend generates after `ids`."""
    return generate(decoder(dtype=dtype), None, ids, disable_compile=True, **given)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.thorough)]
)
def test_a_cache_of_another_dtype_than_the_first(dtype: torch.dtype) -> None:
    """float64 has no operator: attention stays as it was."""
    model, ids = decoder(), tokens(2, PROMPT)
    given = entered("compile_config", model, EVERYTHING)
    assert torch.equal(generate(model, "static", ids, **given), dense(ids))
    with lychee_compile.record() as recorder:
        got = generate(model.to(dtype), "static", ids, **given)
    first, second = lychee_compile.reports()
    assert first.sites[0].decision == "sparse"
    if dtype == torch.float64:
        assert torch.equal(got, dense(ids, dtype))
        assert (second.sites[0].decision, recorder.calls) == ("kept", [])
    else:  # whose rounding may turn a token
        assert second.sites[0].decision == "sparse"
        assert_everything_read(recorder, NEW - 1)


def test_a_cache_shorter_than_the_budget_stays_exact() -> None:
    """Before and after a longer one; by then the graph is one for any length."""
    model, ids = decoder(), tokens(2, PROMPT)
    given = entered("compile_config", model, {**SPARSE, "budget": 100})
    for size in (90, 128, 91):
        cache = transformers.StaticCache(model.config, max_cache_len=size)
        with lychee_compile.record() as recorder:
            got = generate(model, None, ids, **{CACHE: cache}, **given)
        assert torch.equal(got, dense(ids))
        assert_everything_read(recorder, 0 if size == 90 else NEW - 1)
    first, second = lychee_compile.reports()
    assert [site.decision for site in (*first.sites, *second.sites)] == ["kept"] * 2 + [
        "sparse"
    ] * 2


class Cancelled(transformers.StoppingCriteria):
    """Raises when a sequence is `length` long."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Any:
        if ids.shape[1] >= self.length:
            raise TimeoutError
        return torch.zeros(len(ids), dtype=torch.bool)


class Interrupted(transformers.generation.streamers.BaseStreamer):
    """The user presses Ctrl-C at the fifth token."""

    def __init__(self) -> None:
        self.left = 6

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("it was interrupted")


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.thorough), "dynamic"])
def test_a_cancelled_generation_leaves_model_and_cache_fit_for_use(kind: str) -> None:
    model = decoder()
    given = entered("compile_config" if kind == "static" else "model.forward", model, EVERYTHING)
    ids = tokens(1, PROMPT)
    expected = dense(ids)
    ways = [
        (TimeoutError, {"stopping_criteria": [Cancelled(PROMPT + 5)]}),
        (KeyboardInterrupt, {"streamer": Interrupted()}),
    ]
    for error, cancelled in ways:
        cache = empty(model, kind)
        with pytest.raises(error):
            generate(model, None, ids, **{CACHE: cache}, **cancelled, **given)
        written = int(cache.get_seq_length())
        assert PROMPT < written < expected.shape[1] - 1
        # A new cache, and the same one from where it was.
        assert torch.equal(generate(model, kind, ids, **given), expected)
        rest = expected.shape[1] - written - 1
        begun = expected[:, : written + 1]
        with lychee_compile.record() as recorder:
            got = generate(model, None, begun, **{CACHE: cache}, max_new_tokens=rest, **given)
        assert torch.equal(got, expected)
        assert recorder.calls


def test_a_step_that_breaks_off_within_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer has written its key, the second has not: the cache has to be emptied."""
    model, ids, calls = decoder(), tokens(1, PROMPT), []
    given = entered("compile_config", model, EVERYTHING)
    cache, select = empty(model, "static"), reference_operators.select

    def broken(*operands: Any) -> Any:
        calls.append(None)
        if len(calls) == 4 * LAYERS:
            raise KeyboardInterrupt
        return select(*operands)

    with monkeypatch.context() as patched:
        patched.setattr(reference_operators, "select", broken)
        with pytest.raises(KeyboardInterrupt):
            generate(model, None, ids, **{CACHE: cache}, **given)
    assert len(registry) == 0
    cache.reset()
    assert torch.equal(generate(model, None, ids, **{CACHE: cache}, **given), dense(ids))
    assert len(registry) == LAYERS


CERTIFIED = {**SPARSE, "epsilon": 0.1}
NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(SPARSE, MemoryError(), id="budget"),
        pytest.param(CERTIFIED, NO_MEMORY, id="epsilon"),
        pytest.param(SPARSE, NO_MEMORY, marks=pytest.mark.thorough, id="budget, PyTorch's error"),
        pytest.param(CERTIFIED, MemoryError(), marks=pytest.mark.thorough, id="epsilon, Python's"),
    ],
)
def test_where_the_index_finds_no_memory_attention_is_exact(
    options: dict[str, Any],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For this cache; the next one is tried again."""
    warn_of_memory.cache_clear()
    model, ids = decoder(), tokens(2, PROMPT)
    ids[1, :20] = 0
    padding = {"attention_mask": (ids != 0).long()}
    given = {**entered("compile_config", model, options), **padding}
    extend, calls = LycheeIndex.extend, []

    def full(index: LycheeIndex, key: Tensor, end: Tensor) -> None:
        calls.append(end)
        extend(index, key, end)  # memory runs out late: a half-built index is left behind
        raise error

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "lychee_compile"):
        patched.setattr(LycheeIndex, "extend", full)
        with lychee_compile.record() as recorder:
            got = generate(model, "static", ids, **given)
    assert torch.equal(got, dense(ids, **padding))
    assert_everything_read(recorder, NEW - 1)
    assert len(calls) == LAYERS
    (record,) = caplog.records
    assert "reads all keys" in record.message
    with lychee_compile.record() as recorder:
        generate(model, "static", ids, **given)
    assert any(int(call.tokens_read.max()) < call.kv_len for call in recorder.calls)


def test_another_error_of_the_index_is_not_taken_for_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("the index is wrong")

    model = decoder()
    given = entered("compile_config", model, SPARSE)
    monkeypatch.setattr(LycheeIndex, "extend", broken)
    with pytest.raises(RuntimeError, match="the index is wrong"):
        greedy(model, "static", given)


def test_two_threads_generate_through_one_compiled_model() -> None:
    model = decoder()
    entered("model.forward", model, SPARSE)
    prompts = [tokens(1, PROMPT, seed) for seed in (1, 2)]
    alone = [generate(model, "static", ids) for ids in prompts]
    together: list[list[Tensor]] = [[], []]
    begin = threading.Barrier(2)

    def run(place: int) -> None:
        with torch.no_grad():
            begin.wait()
            for _ in range(4):
                together[place].append(generate(model, "static", prompts[place]))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for got, expected in zip(together, alone, strict=True):
        assert len(got) == 4
        assert all(torch.equal(each, expected) for each in got)
