"""Whatever happens to caches between calls, an answer is that of the cache as it is now."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from strategies import row_chunks
from tiny_models import VOCABULARY, Past, StaticKV, TinyDecoder
from torch import Tensor

from lychee_compile.kernels.operators.cache_index import CacheIndex
from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.options import Options
from lychee_compile.runtime.cache_registry import registry

SIZE, BATCH, PROMPT = 160, 2, 60
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}
SPARSE = {**EVERYTHING, "budget": 32, "overfetch": 1, "flat_tokens": 0}

Event = tuple[Any, ...]
seeds = st.integers(0, 2**16)
slots = st.integers(0, 1)
counts = st.sampled_from([1, 1, 1, 2, 5])
lengths = st.integers(5, 120)
orders = st.permutations(range(BATCH)).map(tuple)


def tokens(seed: int, count: int) -> Tensor:
    """Return random token ids [BATCH, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (BATCH, count), generator=generator)


def check_chunks(index: KVIndex, key: Tensor) -> None:
    """Check that a chunk has the mean of its keys, and that its ball reaches all of them."""
    for row in range(BATCH):
        for start, size in row_chunks(index, row):
            number = start // index.settings.chunk[0]
            if not index.span[row, number] or index.waiting[row, number]:
                continue  # nobody has asked for it
            keys = key[row, :, start : start + size]
            mean = index.fields["chunk_mean"][row, :, number]
            torch.testing.assert_close(mean, keys.mean(1), atol=1e-5, rtol=1e-5)
            distance = torch.linalg.vector_norm((keys - mean[:, None]).double(), dim=-1)
            reach = index.fields["chunk_radius"][row, :, number].double()
            assert bool((distance <= reach * (1 + 1e-5) + 1e-5).all())


class Histories(RuleBasedStateMachine):
    """Two caches through compiled decoders, and everything that happens to caches.

    Each slot has two caches with the same history: one decoded with a budget that holds everything,
    each step of which must equal dense attention over a copy of the cache; and one decoded
    sparsely, whose every history, run once more alone, must give the same bits.
    """

    model: TinyDecoder
    decoders: dict[str, Callable[..., Any]]

    def empty(self) -> Any:
        """Return a cache without tokens."""
        raise NotImplementedError

    def length(self, cache: Any) -> int:
        """Return the number of tokens in a cache."""
        raise NotImplementedError

    def apply(self, cache: Any, event: Event, decoder: Callable[..., Any]) -> tuple[Any, Any]:
        """Do one event to a cache: the cache after it, and a decoding step's output or None."""
        raise NotImplementedError

    def copy(self, cache: Any) -> Any:
        """Return an independent copy of a cache."""
        raise NotImplementedError

    def keys(self, cache: Any) -> list[Tensor]:
        """Return the keys of each layer."""
        raise NotImplementedError

    @initialize(seed=seeds)
    def begin(self, seed: int) -> None:
        registry.clear()
        self.finished: list[tuple[list[Event], list[Tensor]]] = []
        self.running: list[tuple[list[Event], list[Tensor]]] = [([], []), ([], [])]
        self.caches = [{kind: self.empty() for kind in ("all", "sparse")} for _ in range(2)]
        for slot in range(2):
            self.prompt(slot, seed + slot, PROMPT)

    def happen(self, slot: int, event: Event) -> None:
        caches = self.caches[slot]
        events, outputs = self.running[slot]
        events.append(event)
        shadow = self.copy(caches["all"]) if event[0] == "decode" else None
        caches["all"], everything = self.apply(caches["all"], event, self.decoders["all"])
        caches["sparse"], sparse = self.apply(caches["sparse"], event, self.decoders["sparse"])
        if shadow is not None:
            _, dense = self.apply(shadow, event, self.model)
            torch.testing.assert_close(everything, dense, atol=1e-4, rtol=1e-4)
            outputs.append(sparse)
            for key in self.keys(caches["sparse"]):
                self.check_index(key, self.now(slot))

    def check_index(self, key: Tensor, length: int) -> None:
        """Check that the index of a cache describes the keys that are in it now."""
        cache = registry.index_of(key, Options.parse(None, SPARSE).index_config())
        if cache is None:  # the graph was compiled for a length within the budget
            assert length <= SPARSE["budget"]
            return
        assert cache.known.tolist() == [length] * BATCH
        assert torch.equal(cache.fingerprint[:, :length], fingerprints(key[:, :, :length]))
        index = cache.index
        assert bool((length - index.tail <= SPARSE["chunk"][1] + 1).all())
        check_chunks(index, key)

    def now(self, slot: int) -> int:
        return self.length(self.caches[slot]["all"])

    @rule(slot=slots, seed=seeds, count=counts)
    def decode(self, slot: int, seed: int, count: int) -> None:
        if self.now(slot) + count < SIZE:
            self.happen(slot, ("decode", seed, count))

    @rule(slot=slots, seed=seeds, steps=st.integers(1, 12))
    def decode_on(self, slot: int, seed: int, steps: int) -> None:
        for step in range(steps):
            self.decode(slot, seed + step, 1)

    @rule(slot=slots, seed=seeds, length=lengths)
    def prompt(self, slot: int, seed: int, length: int) -> None:
        self.happen(slot, ("prompt", seed, length))

    @rule(slot=slots, seed=seeds)
    def prompt_of_same_length(self, slot: int, seed: int) -> None:
        self.happen(slot, ("prompt", seed, self.now(slot)))

    @rule(slot=slots, count=st.integers(1, 40))
    def rewind(self, slot: int, count: int) -> None:
        if self.now(slot) > count:
            self.happen(slot, ("rewind", count))

    @rule(slot=slots, order=orders)
    def reorder(self, slot: int, order: tuple[int, ...]) -> None:
        self.happen(slot, ("reorder", order))

    @rule(slot=slots, seed=seeds)
    def drop(self, slot: int, seed: int) -> None:
        self.finished.append(self.running[slot])
        self.running[slot] = ([], [])
        self.caches[slot] = {kind: self.empty() for kind in ("all", "sparse")}
        self.prompt(slot, seed, PROMPT)

    def teardown(self) -> None:
        for events, outputs in getattr(self, "finished", []) + getattr(self, "running", []):
            registry.clear()
            cache, again = self.empty(), []
            for event in events:
                cache, result = self.apply(cache, event, self.decoders["sparse"])
                again += [result] if result is not None else []
            # A step that failed has left no output.
            for got, wanted in zip(outputs, again, strict=False):
                torch.testing.assert_close(got, wanted, atol=0, rtol=0)


class StaticHistories(Histories):
    """Buffers written in place."""

    def empty(self) -> StaticKV:
        return StaticKV.empty(BATCH, SIZE)

    def length(self, cache: StaticKV) -> int:
        return int(cache.length)

    def copy(self, cache: StaticKV) -> StaticKV:
        return cache.copy()

    def keys(self, cache: StaticKV) -> list[Tensor]:
        return cache.keys

    def apply(
        self, cache: StaticKV, event: Event, decoder: Callable[..., Any]
    ) -> tuple[StaticKV, Tensor | None]:
        kind, *args = event
        if kind == "decode":
            return cache, decoder(tokens(*args), cache=cache)
        if kind == "prompt":
            cache.length.zero_()
            self.model(tokens(*args), cache=cache)
        elif kind == "rewind":
            cache.length.sub_(args[0])
        else:
            for tensor in cache.tensors():
                tensor.copy_(tensor[torch.tensor(args[0])])
        return cache, None

    @rule(slot=slots, seed=seeds, length=lengths)
    def reset(self, slot: int, seed: int, length: int) -> None:
        for cache in self.caches[slot].values():
            for tensor in cache.tensors():
                tensor.zero_()
        self.happen(slot, ("prompt", seed, length))


class GrowingHistories(Histories):
    """Tensors grown by concatenation; a rewind leaves a view of the longer ones."""

    def empty(self) -> Past | None:
        return None

    def length(self, cache: Past | None) -> int:
        return 0 if cache is None else cache[0][0].shape[2]

    def copy(self, cache: Past | None) -> Past | None:
        return cache and [(key.clone(), value.clone()) for key, value in cache]

    def keys(self, cache: Past | None) -> list[Tensor]:
        return [key for key, _ in cache or []]

    def apply(
        self, cache: Past | None, event: Event, decoder: Callable[..., Any]
    ) -> tuple[Past | None, Tensor | None]:
        kind, *args = event
        if kind == "decode":
            hidden, cache = decoder(tokens(*args), past=cache)
            return cache, hidden
        if kind == "prompt":
            return self.model(tokens(*args))[1], None
        if kind == "branch":
            longer = cache
            for step in range(args[1]):
                _, longer = decoder(tokens(args[0] + step, 1), past=longer)
            return cache, None
        assert cache is not None
        if kind == "rewind":
            rest = self.length(cache) - args[0]
            return [(key[:, :, :rest], value[:, :, :rest]) for key, value in cache], None
        row = torch.tensor(args[0])
        return [(key[row], value[row]) for key, value in cache], None

    @rule(slot=slots, seed=seeds, steps=st.integers(1, 6))
    def branch(self, slot: int, seed: int, steps: int) -> None:
        """Decode on, then go back to the tensors from before, which others may still hold."""
        if self.now(slot) + steps < SIZE:
            self.happen(slot, ("branch", seed, steps))


@pytest.fixture(params=[StaticHistories, GrowingHistories])
def machine(request: pytest.FixtureRequest, without_inductor: None) -> Iterator[type[Histories]]:
    """A state machine with its decoders compiled."""
    torch.manual_seed(0)
    model = TinyDecoder().eval()
    request.param.model = model
    request.param.decoders = {
        name: torch.compile(model, backend="lychee", options=options)
        for name, options in (("all", EVERYTHING), ("sparse", SPARSE))
    }
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        yield request.param


def test_any_history_gives_what_the_cache_holds(machine: type[Histories]) -> None:
    examples = max(settings().max_examples // 8, 2)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=16)
    )
    assert torch._dynamo.utils.counters["lychee"]["sparse"] > 0


def test_a_dropped_cache_drops_its_index(without_inductor: None) -> None:
    torch.manual_seed(0)
    decoder = torch.compile(TinyDecoder().eval(), backend="lychee", options=SPARSE)
    caches = [StaticKV.empty(BATCH, SIZE) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            decoder(tokens(0, 1), cache=cache)
    each = len(registry) // 2
    assert each == len(caches[0].keys)
    caches.pop()
    del cache
    gc.collect()
    assert len(registry) == each


@torch.no_grad()
def test_a_prompt_that_another_backend_compiled_is_noticed(
    monkeypatch: pytest.MonkeyPatch, without_inductor: None
) -> None:
    monkeypatch.setattr(CacheIndex, "_sample_differs", lambda *_: False)
    torch.manual_seed(0)
    model = TinyDecoder().eval()
    cache = StaticKV.empty(BATCH, SIZE)
    prefill = torch.compile(model, backend="inductor")
    decoder = torch.compile(model, backend="lychee", options=SPARSE)
    config = Options.parse(None, SPARSE).index_config()
    for seed in range(3):
        cache.length.zero_()
        prefill(tokens(seed, PROMPT), cache=cache)
        decoder(tokens(seed + 10, 1), cache=cache)
        for key in cache.keys:
            found = registry.index_of(key, config)
            assert found is not None
            check_chunks(found.index, key)
