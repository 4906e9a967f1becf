"""Evaluating the expressions that a report gives for scores and masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def evaluate(text: str, names: dict[str, Tensor]) -> Tensor:
    """Return the value of an expression in sympy's words, elementwise.

    `names` are its symbols, of shapes that broadcast; a symbol with indices is indexed by them.
    Raises NameError for a symbol that is not among them.
    """
    functions = {
        "Abs": torch.abs,
        "Eq": lambda left, right: _tensor(left) == right,
        "Max": lambda left, right: torch.maximum(*torch.broadcast_tensors(*_both(left, right))),
        "Min": lambda left, right: torch.minimum(*torch.broadcast_tensors(*_both(left, right))),
        "Mod": lambda left, right: torch.remainder(_tensor(left), right),
        "Ne": lambda left, right: _tensor(left) != right,
        "Piecewise": _piecewise,
        "exp": lambda x: _tensor(x).exp(),
        "floor": torch.floor,
        "log": lambda x: _tensor(x).log(),
        "oo": math.inf,
        "tanh": torch.tanh,
    }
    return _tensor(eval(text, {"__builtins__": {}}, functions | names))


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


def _both(left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return _tensor(left).double(), _tensor(right).double()


def _piecewise(*cases: tuple[Any, Any]) -> Tensor:
    value = _tensor(math.nan).double()
    for each, condition in reversed(cases):
        value = torch.where(_tensor(condition), _tensor(each).double(), value)
    return value
