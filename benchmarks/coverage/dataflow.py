"""Count of attentions by following products through ATen operators.

A softmax counts if its scores come from a product of two activations by operators other than
products, and its weights go, in the same way, into such a product. Fused operators count as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
"""Operators that are products, with the positions of their operands."""
SOFTMAXES = {aten._softmax.default, aten._safe_softmax.default}
FUSED = (
    "aten::_scaled_dot_product",
    "aten::_native_multi_head_attention",
    "aten::_transformer_encoder_layer_fwd",
)


class Dataflow(TorchDispatchMode):
    """Counter of attentions while the mode is on, which follows products storage by storage."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count = 0
        """Number of attentions so far."""
        self._scores: set[int] = set()
        """Storages of tensors computed from a product of two activations."""
        self._weights: dict[int, set[int]] = {}
        """Storages of tensors computed from a softmax of scores, with the softmaxes' numbers."""
        self._parameters = {_storage(each) for each in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []
        """Every tensor seen, so that no other tensor gets its storage."""
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
            self._product([args[position] for position in PRODUCTS[function]], outputs[0])
        else:
            inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self._other(function in SOFTMAXES, inputs, outputs)
        return output

    def _product(self, operands: list[Tensor], output: Tensor) -> None:
        storages = {_storage(operand) for operand in operands}
        if storages & self._parameters:
            return
        self._scores.add(_storage(output))
        used = set().union(*(self._weights.get(storage, set()) for storage in storages))
        self.count += len(used - self._used)
        self._used |= used

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
