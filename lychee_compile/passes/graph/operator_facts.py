"""The columns of the table in `operators`: all that is known of one ATen operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import sympy
from sympy.logic.boolalg import Boolean


class View(Enum):
    """Kinds of views, by how an index of the output leads to the input (see `symbolic.views`)."""

    COPY = auto()
    """The same values in the same shape, perhaps in another dtype."""
    RESHAPE = auto()
    BROADCAST = auto()
    SWAP = auto()
    """The dimensions that the second and the third argument name are swapped."""
    SWAP_LAST = auto()
    PERMUTE = auto()
    MOVE = auto()
    REVERSE = auto()
    SELECT = auto()
    SLICE = auto()
    REPEAT = auto()
    """Whole copies, one after the other."""
    INTERLEAVE = auto()
    """Copies of each element, side by side."""
    FLIP = auto()
    PARTS = auto()
    """Several outputs, each a part of the input."""

    @property
    def keeps_all(self) -> bool:
        """True if the output shows every element of the input once."""
        return self in _KEEPING_ALL

    @property
    def keeps_order(self) -> bool:
        """True if the output lays the elements out in the order of the input, in another shape."""
        return self in (View.RESHAPE, View.BROADCAST)


_KEEPING_ALL = {
    View.COPY, View.RESHAPE, View.SWAP, View.SWAP_LAST, View.PERMUTE, View.MOVE, View.REVERSE,
}  # fmt: skip


class Memory(Enum):
    """Owners of the memory that the output shows."""

    BY_SCHEMA = auto()
    """The input, perhaps, if the schema says so; otherwise the output itself."""
    FRESH = auto()
    """The output itself, always."""
    OF_INPUT = auto()
    """The input, always: nothing is read or copied."""
    PERHAPS_OF_INPUT = auto()
    """The input, perhaps, though the schema does not say so."""


class Rule(Enum):
    """Rules that make an element of the output; `symbolic.element_rules` has the functions."""

    DIVIDE = auto()
    WHERE = auto()
    MASKED_FILL = auto()
    LOWER_TRIANGLE = auto()
    UPPER_TRIANGLE = auto()
    ARANGE = auto()
    ONES = auto()
    ZEROS = auto()
    FULL = auto()
    INDEX = auto()
    INDEX_SELECT = auto()
    EMBEDDING = auto()
    INDEX_PUT = auto()


class StepKind(Enum):
    """Things that an operator does to scores."""

    TIMES = auto()
    """Multiplies them by the other operand."""
    OVER = auto()
    """Divides them by the other operand."""
    PLUS = auto()
    """Adds the other operand."""
    MINUS = auto()
    """Subtracts the other operand."""
    FROM = auto()
    """Subtracts them from the other operand."""
    TANH = auto()
    FLOOR = auto()
    """Replaces what is below the other operand by it."""
    FILL = auto()
    """Replaces them under a condition."""
    EXTRA = auto()
    """Puts one more logit beside them."""
    OTHER = auto()
    """Anything else, which is named in the report and left alone."""


class ProductKind(Enum):
    """Spellings of a product of two tensors; `symbolic.products` has a function for each."""

    MATMUL = auto()
    LINEAR = auto()
    ADD_BATCHES = auto()
    ADD_MATRIX = auto()
    ADD_VECTOR = auto()
    EINSUM = auto()
    SUM = auto()
    TENSORDOT = auto()


class WriteKind(Enum):
    """Operators that write slots of a tensor.

    `detect.caching.token_writes` has a function for each.
    """

    INDEX_COPY = auto()
    INDEX_PUT = auto()
    SCATTER = auto()
    SLICE_SCATTER = auto()
    SELECT_SCATTER = auto()


class Family(Enum):
    """Operators that some part of detection or lowering treats alike."""

    CONVOLUTION = auto()
    DROPOUT = auto()
    EXPONENTIAL = auto()
    PADDING = auto()
    """Sets other elements around those of its input."""
    JOINING = auto()
    """Puts tensors together into one, each as a part of it."""
    NORMALISATION = auto()
    """Shifts and scales its input by statistics of it, in the same shape."""
    ATTENTION_MODULE = auto()
    """Computes a whole module that holds an attention."""
    GATHER = auto()
    """Takes entries of its input that a tensor of indices names."""


Numbers = Callable[..., sympy.Expr | Boolean]
Truths = Callable[..., Boolean]


@dataclass(frozen=True)
class AtenOperator:
    """One operator of ATen, with everything that the passes know about it."""

    name: str = ""
    """The first of its synonyms, without overload; empty for operators not in the table."""
    view: View | None = None
    memory: Memory = Memory.BY_SCHEMA
    rule: Rule | None = None
    numbers: Numbers | None = None
    """Elementwise function of numbers, if it is one."""
    truths: Truths | None = None
    """Elementwise function of truth values, if it is one."""
    bits: Truths | None = None
    """Bitwise function, if it is one. It is followed between truth values, and for lowest bits."""
    keeps_range: bool = False
    """True if its integers never need more bits than those that they are made of."""
    steps: tuple[StepKind | None, ...] = ()
    """Effect on scores, for each operand that they may be; empty if scores are not followed."""
    product: ProductKind | None = None
    write: WriteKind | None = None
    """Slots that it writes, in place or to a copy of its input."""
    family: Family | None = None
    carries: bool = False
    """True if attention weights are followed through it; always so for views."""
    reads_shape_only: bool = False
    """True if it reads the shape of its input and none of the values."""
    writes_nothing: bool = False
    """True if it writes to no memory, though the schema says that it changes its input."""
    only_in_place: bool = False
    """True if there is no operator that gives the same value as a new tensor."""

    @property
    def carries_weights(self) -> bool:
        """True if the elements of its input go on one by one, whole or changed."""
        return self.carries or self.view is not None

    @property
    def is_elementwise(self) -> bool:
        """True if its elements are a known function of elements of its operands."""
        return any((self.numbers, self.truths, self.bits))

    def step(self, place: int) -> StepKind:
        """Return the effect on scores that are operand number `place`."""
        return (self.steps[place] if place < len(self.steps) else None) or StepKind.OTHER
