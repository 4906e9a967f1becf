"""How many attentions a call runs: counted twice while it runs uncompiled, without our matcher.

By calls: every attention function is wrapped (those that transformers dispatches to, the
`eager_attention_forward` of each model, and PyTorch's own), and each outermost call counts once. A
model whose attention is written in its module's `forward` calls none of them: there, a module
counts that is named an attention, holds no other such module, and ran without any such call inside.

By dataflow: below, at the level of ATen operators, whatever the spelling. A softmax counts when its
scores come from a product of two activations, by operators other than products, and its weights
go, in the same way, into a product. Fused attention operators count as they are.

The first says where the attentions are, the second does not depend on names. They must agree.
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
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

aten = torch.ops.aten

Function = Callable[..., Any]


@dataclass(frozen=True)
class Truth:
    """The attentions that a call ran."""

    names: tuple[str, ...]
    """Module path of each, in order, as counted by calls."""
    by_dataflow: int
    """How many there are by dataflow."""


def count_attentions(model: nn.Module, *args: Any, **kwargs: Any) -> Truth:
    """Run `model(*args, **kwargs)` uncompiled and count its attentions in both ways."""
    calls = _Calls()
    dataflow = _Dataflow(model)
    with uncompiled_flex(), calls.watching(model), dataflow:
        model(*args, **kwargs)
    return Truth(tuple(calls.names), dataflow.count)


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
    """Counts attentions by the functions that are called and the modules that run."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._modules: list[tuple[str, int]] = []
        """Path of each module that runs, outermost first, and how many were counted before it."""
        self._inside = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count what runs meanwhile."""
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
"""Modules that are named an attention and have no softmax: a recurrence over the tokens."""


def _attention_functions() -> list[tuple[Any, str]]:
    """Whatever computes one attention, with the place where its callers look it up."""
    found: list[tuple[Any, str]] = [
        (F, "scaled_dot_product_attention"),
        (F, "multi_head_attention_forward"),
        (flex, "flex_attention"),
    ]
    name = "eager_attention_forward"
    modules = [module for path, module in sys.modules.items() if path.startswith("transformers.")]
    return found + [(module, name) for module in modules if name in vars(module)]


def _is_leaf_attention(module: nn.Module) -> bool:
    inner = [each for each in module.modules() if _named_attention(each)]
    return inner == [module]


def _named_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and not LINEAR.search(name)


PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
"""Products, with the places of their operands."""
SOFTMAXES = {aten._softmax.default, aten._safe_softmax.default}
FUSED = (
    "aten::_scaled_dot_product",
    "aten::_native_multi_head_attention",
    "aten::_transformer_encoder_layer_fwd",
)


class _Dataflow(TorchDispatchMode):
    """Counts attentions by following what becomes of products, storage by storage."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count = 0
        self._scores: set[int] = set()
        """Storages of what was computed from a product of two activations."""
        self._weights: dict[int, set[int]] = {}
        """Storages of what was computed from a softmax of scores, with the softmaxes' numbers."""
        self._parameters = {_storage(each) for each in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []
        """Every tensor seen, lest another one gets the storage."""
        self._softmaxes = 0
        self._used: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        outputs = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        self._alive += outputs
        if isinstance(function, HigherOrderOperator):
            self.count += function.name() == "flex_attention"
        elif function.name().startswith(FUSED):
            self.count += 1
        elif function in PRODUCTS:
            self._product([args[place] for place in PRODUCTS[function]], outputs[0])
        else:
            inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self._other(function in SOFTMAXES, inputs, outputs)
        return output

    def _product(self, operands: list[Tensor], output: Tensor) -> None:
        storages = [_storage(operand) for operand in operands]
        for storage in storages:
            fresh = self._weights.get(storage, set()) - self._used
            self.count += len(fresh)
            self._used |= fresh
        if not self._parameters.intersection(storages):
            self._scores.add(_storage(output))

    def _other(self, softmax: bool, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        storages = {_storage(each) for each in inputs}
        scores = bool(self._scores & storages)
        weights = set().union(*(self._weights.get(storage, set()) for storage in storages))
        if softmax:
            weights = {self._softmaxes} if scores else set()
            self._softmaxes += 1
            scores = False
        for output in outputs:
            if scores:
                self._scores.add(_storage(output))
            if weights:
                self._weights.setdefault(_storage(output), set()).update(weights)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
