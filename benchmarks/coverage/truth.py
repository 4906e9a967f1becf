"""Count of the attentions that a call runs, taken twice while it runs uncompiled.

The count by calls wraps every attention function: those that transformers dispatches to, the
`eager_attention_forward` of each model, and PyTorch's own. Each outermost call counts once. A model
whose attention is written in its module's `forward` calls none of them. In such a model a module
counts if it is named an attention, holds no other such module, and ran without such a call inside.

The count by dataflow follows products and softmaxes through ATen operators (dataflow.py), for which
names and spellings do not matter.

The first count says in which modules the attentions are, the second depends on no names. The two
have to agree. Neither uses our matcher.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from benchmarks.coverage.dataflow import Dataflow

Function = Callable[..., Any]


@dataclass(frozen=True)
class Truth:
    """Attentions that a call ran."""

    names: tuple[str, ...]
    """Module path of each attention, in order, as counted by calls."""
    by_dataflow: int
    """Number of attentions as counted by dataflow."""

    @property
    def dispute(self) -> str:
        """Words on how the two counts disagree; empty if they agree."""
        called = len(self.names)
        if called == self.by_dataflow:
            return ""
        return f"the two counts disagree: {called} by calls, {self.by_dataflow} by dataflow"


def count_attentions(model: nn.Module, *args: Any, **kwargs: Any) -> Truth:
    """Run `model(*args, **kwargs)` uncompiled and count its attentions in both ways."""
    calls = _Calls()
    dataflow = Dataflow(model)
    with uncompiled_flex(), calls.watching(model), dataflow:
        model(*args, **kwargs)
    return Truth(tuple(calls.names), dataflow.count)


def count_in_graphs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return how many attentions of a call lie within a single graph of Dynamo, by dataflow.

    No backend sees the others: Dynamo breaks the graph within them and runs their code uncompiled.
    """
    counts = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Function:
        def run(*inputs: Any) -> Any:
            with Dataflow(model) as dataflow:
                output = graph(*inputs)
            counts.append(dataflow.count)
            return output

        return run

    torch.compile(model, backend=backend)(*args, **kwargs)
    return sum(counts)


@contextmanager
def uncompiled_flex() -> Iterator[None]:
    """Let FlexAttention, also transformers' compiled one, run as plain PyTorch."""
    from transformers.integrations import flex_attention as integration

    with (
        patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", new=True),
        patch.object(integration.WrappedFlexAttention, "__call__", lambda _: flex.flex_attention),
    ):
        yield


class _Calls:
    """Counter of attentions by the functions that are called and the modules that run."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._modules: list[tuple[str, int]] = []
        """Path of each module that runs, outermost first, and the count when it began."""
        self._inside = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count the attentions that run inside the context."""
        with ExitStack() as undo:
            for owner, name in _attention_functions():
                undo.enter_context(patch.object(owner, name, self._wrapped(getattr(owner, name))))
            undo.enter_context(patch.object(AttentionInterface, "__getitem__", self._lookup()))
            for path, module in model.named_modules():
                before, after = self._hooks(path, _is_leaf_attention(module))
                undo.callback(module.register_forward_pre_hook(before).remove)
                undo.callback(module.register_forward_hook(after).remove)
            yield

    def _lookup(self) -> Function:
        original = AttentionInterface.__getitem__
        return lambda interface, name: self._wrapped(original(interface, name))

    def _wrapped(self, function: Function) -> Function:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            self.names.append(self._modules[-1][0] if self._modules else "")
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return counted

    def _hooks(self, path: str, leaf_attention: bool) -> tuple[Function, Function]:
        def before(_module: nn.Module, _args: Any) -> None:
            self._modules.append((path, len(self.names)))

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            _, counted_before = self._modules.pop()
            if leaf_attention and len(self.names) == counted_before and not self._inside:
                self.names.append(path)

        return before, after


LINEAR = re.compile("Linear|Lightning")
"""Names of modules that are called an attention but are a recurrence without a softmax."""


def _attention_functions() -> list[tuple[Any, str]]:
    """Return the functions that compute one attention, as (owner, attribute) pairs."""
    functions: list[tuple[Any, str]] = [
        (F, "scaled_dot_product_attention"),
        (F, "multi_head_attention_forward"),
        (flex, "flex_attention"),
    ]
    name = "eager_attention_forward"
    modules = [module for path, module in sys.modules.items() if path.startswith("transformers.")]
    return functions + [(module, name) for module in modules if name in vars(module)]


def _is_leaf_attention(module: nn.Module) -> bool:
    inner = [each for each in module.modules() if _named_attention(each)]
    return inner == [module]


def _named_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and not LINEAR.search(name)
