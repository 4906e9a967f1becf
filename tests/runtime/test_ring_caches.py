"""Caches whose slots are used again in turn: the newest tokens are read, within the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile
from lychee_compile.options import Options
from lychee_compile.runtime.cache_registry import registry

SIZE, KV_HEADS, GROUP, DIM = 96, 2, 2, 8
OPTIONS = {"budget": 32, "sinks": 4, "recent": 8, "chunk": (2, 4), "dense_layers": 0}

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


@dataclass
class Ring:
    """Keys and values whose first `sinks` slots stay; the others are overwritten in turn."""

    sinks: int = 0
    batch: int = 1
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)
    held: Tensor = field(init=False)
    """Position of the token in each slot, int64 [L]; -1 for none."""

    def __post_init__(self) -> None:
        self.key = torch.zeros(self.batch, KV_HEADS, SIZE, DIM)
        self.value = torch.zeros(self.batch, KV_HEADS, SIZE, DIM)
        self.held = torch.full((SIZE,), -1)

    def slots(self, position: Tensor) -> Tensor:
        """Return the slots of the tokens at some positions."""
        around = self.sinks + (position - self.sinks) % (SIZE - self.sinks)
        return torch.where(position < self.sinks, position, around)

    def operands(self, step: int, count: int) -> tuple[Tensor, ...]:
        """Return positions, queries, keys and values of a step that begins at position `step`."""
        generator = torch.Generator().manual_seed(step)
        position = torch.arange(step, step + count)
        query = 3 * torch.randn(self.batch, KV_HEADS * GROUP, count, DIM, generator=generator)
        new = torch.randn(2, self.batch, KV_HEADS, count, DIM, generator=generator)
        return position, query, *new.unbind(0)


def attend(ring: Ring, slot: Tensor, position: Tensor, query: Tensor, *new: Tensor) -> Tensor:
    ring.held.index_copy_(0, slot, position)
    ring.key.index_copy_(2, slot, new[0])
    ring.value.index_copy_(2, slot, new[1])
    seen = (ring.held >= 0) & (ring.held <= position[:, None])
    return F.scaled_dot_product_attention(
        query, ring.key, ring.value, attn_mask=seen, enable_gqa=True
    )


def step_inside(ring: Ring, position: Tensor, query: Tensor, *new: Tensor) -> Tensor:
    """Do a step that works out the slots."""
    return attend(ring, ring.slots(position), position, query, *new)


def assert_newest_read(ring: Ring, call: Any, position: Tensor, recent: int) -> None:
    """Check that every query reads the `recent` newest tokens that it sees, and none twice."""
    for place, last in enumerate(position.tolist()):
        newest = set(ring.slots(torch.arange(max(last + 1 - recent, 0), last + 1)).tolist())
        for read in call.tokens[:, :, place].flatten(0, 1):
            slots = read[read >= 0].tolist()
            assert len(slots) == len(set(slots)) <= OPTIONS["budget"]
            assert newest <= set(slots), (last, sorted(newest - set(slots)))


def attention_over(ring: Ring, query: Tensor, tokens: Tensor) -> Tensor:
    """Return attention over the slots `tokens` [B, Hkv, Tq, S], -1 for none, by definition."""
    read = torch.zeros(*tokens.shape[:3], SIZE + 1, dtype=torch.bool)
    read.scatter_(-1, torch.where(tokens < 0, SIZE, tokens), 1)
    read = read[..., :SIZE].repeat_interleave(GROUP, 1)
    return F.scaled_dot_product_attention(
        query, ring.key, ring.value, attn_mask=read, enable_gqa=True
    )


OFTEN = [(4, 1, 1, False), (0, 2, 1, True), (3, 2, 2, False)]
"""Sinks, rows, tokens of a step and whether slots come from outside, of what CI tests."""


@pytest.mark.parametrize(
    ("sinks", "batch", "count", "outside"),
    [
        pytest.param(
            *sizes, outside, marks=() if (*sizes, outside) in OFTEN else pytest.mark.thorough
        )
        for sizes in [(4, 1, 1), (0, 2, 1), (0, 1, 2), (3, 2, 2)]
        for outside in (False, True)
    ],
)
@torch.no_grad()
def test_the_newest_tokens_are_read_within_the_budget(
    sinks: int, batch: int, count: int, outside: bool
) -> None:
    """Slots come from the graph or from outside; two tokens are written across the end too."""
    ring = Ring(sinks, batch)
    function = attend if outside else step_inside
    compiled = torch.compile(function, backend="lychee", options=OPTIONS)
    first = 1 if sinks == 0 and count == 2 else 0  # so that a pair lies around the end
    if first:
        attend(ring, ring.slots(torch.tensor([0])), *ring.operands(0, 1))
    for step in range(first, 2 * SIZE + 20, count):
        position, *rest = ring.operands(step, count)
        slots = [ring.slots(position)] if outside else []
        with lychee_compile.record() as recorder:
            compiled(ring, *slots, position, *rest)
        for call in recorder.calls:
            assert_newest_read(ring, call, position, OPTIONS["recent"])
        assert recorder.calls or step < OPTIONS["budget"] + count
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"


@pytest.mark.parametrize(
    "options",
    [
        {"flat_tokens": 0, "overfetch": 1},
        {"epsilon": 0.2},
        {"policy": "quest", "budget": 48},
        {"policy": "clusterkv"},
        *(
            pytest.param({"policy": each}, marks=pytest.mark.thorough)
            for each in ("streaming", "tokenselect", "hisa", "oracle")
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@torch.no_grad()
def test_every_policy_decodes_over_a_ring(options: dict[str, Any]) -> None:
    """Slots read hold the token of the step, and keys as they are now give the output."""
    chosen = {**OPTIONS, **options}
    ring, steps = Ring(sinks=4), 2 * SIZE
    compiled = torch.compile(step_inside, backend="lychee", options=chosen)
    for step in range(steps):
        operands = ring.operands(step, 1)
        with lychee_compile.record() as recorder:
            output = compiled(ring, *operands)
        if step < SIZE:
            continue
        (call,) = recorder.calls
        if "epsilon" not in options:
            assert int(call.tokens_read.max()) <= chosen["budget"]
        assert bool((call.tokens == ring.slots(operands[0])).any(-1).all())
        expected = attention_over(ring, operands[1], call.tokens)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_streaming_reads_a_window_that_goes_around_the_end() -> None:
    ring, recent = Ring(sinks=4), OPTIONS["budget"] - 4
    options = {**OPTIONS, "policy": "streaming"}
    compiled = torch.compile(step_inside, backend="lychee", options=options)
    for step in range(SIZE + 30):
        operands = ring.operands(step, 1)
        with lychee_compile.record() as recorder:
            compiled(ring, *operands)
        for call in recorder.calls:
            assert_newest_read(ring, call, operands[0], recent)


@torch.no_grad()
def test_a_ring_that_was_filled_eagerly_is_indexed_whole() -> None:
    """The first step writes in the middle of slots that are all in use."""
    ring = Ring(sinks=4, batch=2)
    for step in range(SIZE + 40):
        step_inside(ring, *ring.operands(step, 1))
    compiled = torch.compile(step_inside, backend="lychee", options=OPTIONS)
    for step in range(SIZE + 40, SIZE + 60):
        operands = ring.operands(step, 1)
        with lychee_compile.record() as recorder:
            compiled(ring, *operands)
        assert_newest_read(ring, recorder.calls[0], operands[0], OPTIONS["recent"])
        cached = registry.index_of(ring.key, Options.parse(None, OPTIONS).index_config())
        assert cached is not None
        assert cached.index.tail.tolist() == [SIZE, SIZE]


@torch.no_grad()
def test_a_ring_that_begins_again_is_followed() -> None:
    ring = Ring(sinks=4)
    compiled = torch.compile(step_inside, backend="lychee", options=OPTIONS)
    for start in range(2):
        ring.held.fill_(-1)
        for step in range(SIZE + 20):
            operands = ring.operands(step + start, 1)
            with lychee_compile.record() as recorder:
                compiled(ring, torch.tensor([step]), *operands[1:])
            for call in recorder.calls:
                assert_newest_read(ring, call, torch.tensor([step]), OPTIONS["recent"])
