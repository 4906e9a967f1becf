"""Captured tensors in expressions: whose elements they are, and which numbers are integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import sympy

from lychee_compile.codegen.expressions import fraction, indices_of, is_short_power
from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.specification import KV, KV_LEN, B, Captured, H, Q, S

_FLOAT32, _INT32 = ".to(tl.float32)", ".to(tl.int32)"
LOADED = {
    "bool": " != 0",
    "float16": _FLOAT32,
    "bfloat16": _FLOAT32,
    "float32": "",
    "float64": _FLOAT32,
    "int8": _INT32,
    "int16": _INT32,
    "int32": "",
    "int64": "",
    "uint8": _INT32,
}
"""Text after a load from a tensor of each dtype."""
VARIABLES = (S, B, H, Q, KV, KV_LEN)
"""Variables of score and mask."""
_BUILT = (sympy.Add, sympy.Mul, sympy.Abs, sympy.Max, sympy.Min, sympy.Mod)
"""Functions that give integers for integers."""


class CapturedTensors:
    """The captured tensors of a site, by name, and the variables of a kernel."""

    def __init__(
        self, tensors: Mapping[str, Captured], variables: Collection[sympy.Symbol] = VARIABLES
    ) -> None:
        self._tensors = tensors
        self.variables = variables

    def tensor_of(self, element: sympy.Symbol | sympy.Indexed) -> Captured:
        """Return the tensor of an element.

        Raises Unprintable if there is none, or none of that rank, or if its dtype cannot be loaded.
        """
        name = element.base.name if isinstance(element, sympy.Indexed) else element.name
        tensor = self._tensors.get(name)
        if tensor is None:
            raise Unprintable(f"{element} is no variable of a kernel and no captured tensor")
        if len(indices_of(element)) != tensor.rank:
            raise Unprintable(f"{element}: {name} has {tensor.rank} dimensions")
        if tensor.dtype not in LOADED:
            raise Unprintable(f"{name} is of {tensor.dtype}, not of {', '.join(LOADED)}")
        return tensor

    def is_integer(self, expression: sympy.Basic) -> bool:
        """True if the text of a number has an integer type."""
        if isinstance(expression, (sympy.Symbol, sympy.Indexed)):
            if expression in self.variables:
                return bool(expression.is_integer)
            return "int" in self.tensor_of(expression).dtype
        if isinstance(expression, (sympy.floor, sympy.ceiling)):
            return all(map(self.is_integer, fraction(expression.args[0])))
        if isinstance(expression, sympy.Piecewise):
            return all(self.is_integer(value) for value, _ in expression.args)
        if isinstance(expression, sympy.Pow):
            return is_short_power(expression) and self.is_integer(expression.base)
        if isinstance(expression, _BUILT):
            return all(map(self.is_integer, expression.args))
        return isinstance(expression, sympy.Integer)
