"""Count of attentions by following products through ATen operators.

A softmax counts if its scores come from a product of two activations by operators other than
products, and its weights go, in the same way, into such a product. Fused operators count as one.
For models of other libraries `by_hand` counts an exponential of scores as a softmax, and follows
scores and weights through a small parameter, which mixes heads.
"""

from __future__ import annotations

from collections.abc import Sequence
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
EXPONENTIALS = {aten.exp.default, aten.exp_.default}
"""Operators with which a softmax is written by hand."""
FUSED = {
    "aten::_scaled_dot_product": (1, -2),
    "aten::_native_multi_head_attention": (1, 1),
    "aten::_transformer_encoder_layer_fwd": (0, 1),
}
"""Names with which fused operators begin; the position of their keys, and the axis of tokens."""
CONVOLUTIONS = {aten.convolution.default}
"""Operators that compute new features, as a linear layer does."""
MIXED = 200
"""Largest size of a parameter that mixes heads; those of linear layers are larger here."""


class Dataflow(TorchDispatchMode):
    """Counter of attentions while the mode is on, which follows products storage by storage."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, *, by_hand: bool = False) -> None:
        super().__init__()
        self.key_counts: list[int] = []
        """Number of keys of each attention so far."""
        self._by_hand = by_hand
        self._softmax_operators = SOFTMAXES | (EXPONENTIALS if by_hand else set())
        self._scores: set[int] = set()
        """Storages of tensors computed from a product of two activations."""
        self._weights: dict[int, set[int]] = {}
        """Storages of tensors computed from a softmax of scores, with the softmaxes' numbers."""
        self._parameters = {_storage(each) for each in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []
        """Every tensor seen, so that no other tensor gets its storage."""
        self._softmaxes: list[int] = []
        """Number of keys of each softmax so far; its place is its number."""
        self._used: set[int] = set()

    @property
    def count(self) -> int:
        """Number of attentions so far."""
        return len(self.key_counts)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        outputs = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        self._alive += outputs
        if isinstance(function, HigherOrderOperator):
            if function.name() == "flex_attention":
                self.key_counts.append(args[1].shape[-2])
        elif fused := [each for name, each in FUSED.items() if function.name().startswith(name)]:
            position, axis = fused[0]
            self.key_counts.append(args[position].shape[axis])
        elif function in PRODUCTS:
            self._product([args[position] for position in PRODUCTS[function]], outputs[0])
        elif not self._is_layer(function, args):
            inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            softmax = function in self._softmax_operators
            keys = _softmax_length(inputs[0], args) if softmax else None
            self._other(keys, inputs, outputs)
        return output

    def _is_layer(self, function: Any, args: Sequence[Any]) -> bool:
        """Return True for a convolution through which no score passes."""
        return self._by_hand and function in CONVOLUTIONS and not _mixes([args[1]])

    def _is_parameter(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._parameters

    def _product(self, operands: list[Tensor], output: Tensor) -> None:
        storages = {_storage(operand) for operand in operands}
        if storages & self._parameters:
            if self._by_hand and _mixes([each for each in operands if self._is_parameter(each)]):
                self._other(None, operands, [output])
            return
        self._scores.add(_storage(output))
        used = set().union(*(self._weights.get(storage, set()) for storage in storages))
        self.key_counts += [self._softmaxes[each] for each in sorted(used - self._used)]
        self._used |= used

    def _other(self, keys: int | None, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Follow an operator other than a product; `keys` is the length of a softmax."""
        storages = {_storage(each) for each in inputs}
        scores = bool(self._scores & storages)
        weights = set().union(*(self._weights.get(storage, set()) for storage in storages))
        if keys is not None:
            weights = {len(self._softmaxes)} if scores else set()
            self._softmaxes.append(keys)
            scores = False
        for output in outputs:
            if scores:
                self._scores.add(_storage(output))
            if weights:
                self._weights.setdefault(_storage(output), set()).update(weights)


def _mixes(parameters: Sequence[Tensor]) -> bool:
    return all(each.numel() <= MIXED for each in parameters)


def _softmax_length(scores: Tensor, args: Sequence[Any]) -> int:
    """Return the length of the axis that a softmax runs over; an exponential's is the last."""
    axis = args[1] if len(args) > 1 else -1
    return scores.shape[axis] if scores.dim() else 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
