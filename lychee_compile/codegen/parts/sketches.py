"""Functions that load sketches and score them: what scans of tokens, pages and lists share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lychee_compile.codegen.parts.pair_products import (
    PACK,
    Operand,
    pair_constraints,
    pair_instructions,
)
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.gpu.lychee.layout import Field, plane_bytes, planes
from lychee_compile.kernels.sizes import power_of_two

MOST_PAIRED = 8
"""Most heads of a group whose products tensor cores compute, two heads at a time."""


@dataclass(frozen=True)
class Plane:
    """The 4-bit or the 2-bit codes of a sketch, as templates see them."""

    name: str
    """Name of its pointer: "fine" or "coarse"."""
    fields: Sequence[Field]
    first: int
    """Place of its first weight among those of a head."""

    @property
    def size(self) -> str:
        """Name of the constant that is its number of bytes."""
        return f"{self.name.upper()}_BYTES"

    @property
    def columns(self) -> str:
        """Name of the constant that is its number of bytes, padded."""
        return f"{self.name.upper()}_COLUMNS"

    @property
    def words(self) -> int:
        """Number of its words of four bytes."""
        return plane_bytes(self.fields) // 4

    @property
    def word_names(self) -> list[str]:
        """Name of a variable for each of its words."""
        return [f"{self.name}_{word}" for word in range(self.words)]

    def place(self, field: Field) -> int:
        """Return the place of a field's first weight: each field has as many as there are bytes."""
        return self.first + field.shift // field.bits * plane_bytes(self.fields)


def operands_of(sketches: Sequence[Plane]) -> list[Operand]:
    """Return the operands of the products of a head."""
    return [
        Operand(
            word,
            field.shift,
            "0x" + 4 * f"{2**field.bits - 1:02x}",
            plane.place(field) // 4 + number,
        )
        for plane in sketches
        for field in plane.fields
        for number, word in enumerate(plane.word_names)
    ]


def planes_of(head_dim: int) -> tuple[Plane, ...]:
    """Return the planes of a sketch of keys of this length."""
    fine, coarse = planes(head_dim)
    return Plane("fine", fine, 0), Plane("coarse", coarse, 2 * plane_bytes(fine))


def weight_columns(head_dim: int) -> int:
    """Return the number of weights of a head, padded."""
    fine, coarse = planes(head_dim)
    return power_of_two(2 * plane_bytes(fine) + 4 * plane_bytes(coarse), 16)


def emit_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that load and score the sketches of consecutive tokens."""
    shared = library("sketch", "words_of", "dot4", "load_bytes", "load_weights")
    return [*shared, *_scores(spec, planes_of(spec.head_dim), "sketches", "token")]


def emit_page_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that load and score the means of pages, which have 4-bit codes alone."""
    return _scores(spec, planes_of(spec.head_dim)[:1], "pages", "page")


def emit_listed_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that score sketches of tokens that lie anywhere."""
    return _scores(spec, planes_of(spec.head_dim), None, "listed")


def _scores(spec: AttentionSpec, sketches: Sequence[Plane], of: str | None, kind: str) -> list[str]:
    """Return the functions that load sketches, unless `of` is None, and those that score them."""
    operands = operands_of(sketches)
    words = [word for plane in sketches for word in plane.word_names]
    values = {
        "kind": kind,
        "planes": sketches,
        "words": words,
        "operands": operands,
        "paired": kind != "listed" and spec.group <= MOST_PAIRED,
        "instructions": pair_instructions(operands, words, weight_columns(spec.head_dim)),
        "constraints": pair_constraints(len(words)),
        "pack": PACK,
    }
    loads = [] if of is None else [fill("lychee/load_sketches.py.jinja", spec, of=of, **values)]
    scores = [fill(f"lychee/{each}.py.jinja", spec, **values) for each in ("products", "shares")]
    return [*loads, *scores]
