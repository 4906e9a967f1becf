"""Tell of attention that reads all keys of a cache in host memory.

Each such call takes the keys over the link to the GPU: that is slow, and must not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.host_memory import any_on_host, lies_on_host, warn_of_reading
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.passes.decide import Plan
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import ancestors, operator_of

_PROMPT = (
    "attention of a prompt in compiled code",
    (
        "let generate() read prompts uncompiled, without prefill_chunk: then keys are copied to "
        "the device first"
    ),
)
Inputs = tuple[int, ...]
"""Numbers of the inputs of a graph that hold the keys of one attention."""


def inputs_of_keys(plans: Sequence[Plan], graph: torch.fx.Graph) -> list[Inputs]:
    """Return the inputs behind the keys of each attention, before the graph is rewritten.

    They are not looked for while nothing lies in host memory: the list is then empty.
    """
    if not any_on_host():
        return []
    numbers = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    return [tuple(numbers[node] for node in _behind(plan) if node in numbers) for plan in plans]


def _behind(plan: Plan) -> Iterator[torch.fx.Node]:
    """Yield what the keys of an attention come from, but for what their projection takes."""
    attention = plan.attention
    if isinstance(attention, Attention):
        yield from ancestors(attention.key.node, lambda node: operator_of(node).product is not None)


def told_of_host_caches(
    compiled: Callable[..., Any], plans: Sequence[Plan], keys: Sequence[Inputs]
) -> Callable[..., Any]:
    """Return `compiled`, with a warning before its first call that reads such a cache whole.

    `plans` say what became of each attention, and `keys` is what `inputs_of_keys` gave for them.
    """
    whole = [
        (places, _words(plan))
        for plan, places in zip(plans, keys, strict=False)
        if places and plan.outcome.reason is not None
    ]
    return _Telling(compiled, whole) if whole else compiled


def _words(plan: Plan) -> tuple[str, str]:
    """Return who reads all keys, and what to do about it."""
    count, reason = getattr(plan.attention, "query_len", None), plan.outcome.reason
    assert reason is not None
    if not isinstance(count, int) or count > LONGEST_QUERY:
        return _PROMPT
    return f"attention of {plan.site.name}", str(reason)


class _Telling:
    """A compiled graph that warns once that it reads caches in host memory whole."""

    def __init__(
        self, compiled: Callable[..., Any], whole: Sequence[tuple[Inputs, tuple[str, str]]]
    ) -> None:
        self._compiled, self._whole = compiled, whole

    def __call__(self, *args: Any) -> Any:
        """Run the graph on the inputs that Dynamo passes."""
        if self._whole and any_on_host():
            self._look(args)
        return self._compiled(*args)

    def _look(self, args: Sequence[Any]) -> None:
        """Warn if one of the inputs that hold keys lies in host memory."""
        for places, words in self._whole:
            given = (args[place] for place in places)
            if any(isinstance(each, Tensor) and lies_on_host(each) for each in given):
                warn_of_reading(*words)
                self._whole = ()
                return
