"""Integers that no tensor depends on stay out of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_names import CACHE
from small_decoders import model_of, transformers
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import torch_private
from lychee_compile.passes.graph.host_integers import take_out_integers

pytestmark = pytest.mark.usefixtures("seeded")

PROMPT, STEPS = 20, 8


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The integers that compiled graphs are called with."""
    given: list[int] = []

    def compile_and_watch(gm: Any, inputs: Any, mode: Any, patches: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            given.extend(each for each in args if isinstance(each, int))
            return gm(*args)

        return run

    monkeypatch.setattr(torch_private, "inductor", compile_and_watch)
    return given


def decode(model: Any, forward: Callable[..., Any]) -> list[Tensor]:
    """Return logits after an eager prefill, step by step, with masks as `generate()` makes."""
    ids = torch.randint(1, 128, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(2))
    cache = transformers.StaticCache(model.config, max_cache_len=64)
    model(ids[:, :PROMPT], **{CACHE: cache})
    logits = []
    for step in range(PROMPT, PROMPT + STEPS):
        position = torch.tensor([[step]])
        given = model.prepare_inputs_for_generation(
            ids[:, : step + 1],
            next_sequence_length=1,
            **{CACHE: cache},
            attention_mask=torch.ones(1, step + 1, dtype=torch.int64),
            position_ids=position,
        )
        logits.append(forward(**given).logits)
    return logits


@pytest.mark.parametrize("name", ["gemma3", pytest.param("gpt_oss", marks=pytest.mark.thorough)])
def test_the_length_that_a_window_layer_counts_is_no_input(name: str, integers: list[int]) -> None:
    model = model_of(name, "sdpa" if name == "gemma3" else "eager")
    expected = decode(model, model)
    options = {"budget": 48, "sinks": 2, "recent": 16, "chunk": (4, 8)}
    made = decode(model, torch.compile(model, backend="lychee", options=options))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    assert counters["lychee"]["sparse"] >= 1
    assert len(lychee_compile.reports()) == 2, "the length is one number, then any"
    assert not integers


def graph_of(function: Callable[..., Any], *args: Any) -> torch.fx.GraphModule:
    """Return the graph of a function with symbolic integers, after Dynamo and the retrace."""
    graphs = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        mode, fakes = torch_private.fake_inputs(inputs)
        graphs.append(torch_private.retrace(gm, fakes, mode))
        return gm

    torch.compile(function, backend=keep, dynamic=True)(*args)
    return graphs[-1]


def inputs_and_outputs(gm: torch.fx.GraphModule) -> tuple[int, int]:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return sum(node.op == "placeholder" for node in gm.graph.nodes), len(output.args[0])


def test_sums_are_made_from_the_inputs_there_were() -> None:
    gm = graph_of(lambda x, n, m: (x + 1, n + 2, n * m, x * 2), torch.ones(3), 5, 7)
    before = inputs_and_outputs(gm)
    order = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    taken = take_out_integers(gm)
    assert taken is not None
    inputs, outputs = inputs_and_outputs(gm)
    assert (before[1], outputs) == (4, 2)
    assert len(taken.kept) == inputs == before[0] - 2
    numbers = iter((50, 70))
    args = [next(numbers) if i not in taken.kept else 3 for i, _ in enumerate(order)]
    tensor = next(n for n, each in enumerate(order) if isinstance(each, Tensor))
    args[tensor] = torch.ones(3)
    made = taken.around(gm)(*args)
    assert made[1:3] == [52, 3500]
    assert torch.equal(made[0], torch.full((3,), 2.0))
    assert torch.equal(made[3], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: (x * n, n + 1),  # a tensor is made with it
        lambda x, n: (x[:n], n + 1),  # and with it another's size
        lambda x, n: (x.sum(), x.shape[0] + 1),  # a tensor's own size
    ],
    ids=["value", "size", "own size"],
)
def test_what_tensors_depend_on_stays(function: Callable[..., Any]) -> None:
    gm = graph_of(function, torch.ones(9), 5)
    before = inputs_and_outputs(gm)
    assert take_out_integers(gm) is None
    assert inputs_and_outputs(gm) == before
