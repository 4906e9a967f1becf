"""Functions that load sketches and score them: what scans of tokens, pages and lists share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.gpu.lychee.layout import Field, plane_bytes, planes

HELD_WORDS = 64
"""Most words of weights that the registers of each thread hold, for all of its tokens."""
WORDS_HEADS = 8
"""Most heads of a group for which a thread multiplies the codes of its tokens, four at a time.

It has all heads of a token, so that nothing is padded. Tensor cores multiply for larger groups.
"""


@dataclass(frozen=True)
class Plane:
    """The 4-bit or the 2-bit codes of a sketch, as templates see them."""

    name: str
    """Name of its pointer: "fine" or "coarse"."""
    fields: Sequence[Field]
    first: int
    """Place of its first weight among those of a head."""

    @property
    def bytes(self) -> str:
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


@dataclass(frozen=True)
class Operand:
    """Four codes in the bytes of a word, and where their weights are."""

    word: str
    """Name of the packed word."""
    shift: int
    """Lowest bit of a code in its byte."""
    mask: str
    """Bits of the codes in a word that is shifted, as a hexadecimal number."""
    weights: int
    """Place of the word of their weights among those of a head."""


def _operands(sketches: Sequence[Plane]) -> list[Operand]:
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


def weight_places(head_dim: int) -> int:
    """Return the number of weights of a head, those of padding included."""
    fine, coarse = planes(head_dim)
    return 2 * plane_bytes(fine) + 4 * plane_bytes(coarse)


def emit_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that load and score the sketches of consecutive tokens."""
    sketches = planes_of(spec.head_dim)
    shared = ["load_bytes", "load_weights", "codes"]
    return [
        *library("sketch", *shared, *(["words_of", "dot4"] if _by_words(spec) else [])),
        _fill("load_sketches", spec, sketches, of="sketches"),
        *_products(spec, sketches, "token"),
        _shares(spec, sketches, "tokens", "token"),
    ]


def emit_page_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that load and score the means of pages, which have 4-bit codes alone."""
    means = planes_of(spec.head_dim)[:1]
    return [
        _fill("load_sketches", spec, means, of="pages"),
        *_products(spec, means, "page"),
        _shares(spec, means, "pages", "page"),
    ]


def emit_listed_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that score sketches of tokens that lie anywhere."""
    sketches = planes_of(spec.head_dim)
    return [
        _fill("listed_products", spec, sketches),
        _fill("product_of_head", spec, sketches, of="listed", held=False),
        _shares(spec, sketches, "listed", "listed"),
    ]


def _products(spec: AttentionSpec, sketches: Sequence[Plane], of: str) -> list[str]:
    """Return the functions that multiply codes of tokens or pages by weights."""
    by_words = _by_words(spec)
    held = by_words and spec.group * len(_operands(sketches)) <= HELD_WORDS
    return [
        _fill("products", spec, sketches, of=of),
        *([_fill("codes_in_words", spec, sketches, of=of)] if by_words else []),
        _fill("product_of_head", spec, sketches, of=of, held=held),
    ]


def _shares(spec: AttentionSpec, sketches: Sequence[Plane], of: str, kind: str) -> str:
    names = {"name": f"{kind}_shares", "products": f"{kind}_products"}
    return _fill("shares", spec, sketches, of=of, **names)


def _by_words(spec: AttentionSpec) -> bool:
    return spec.group <= WORDS_HEADS


def _fill(template: str, spec: AttentionSpec, sketches: Sequence[Plane], **values: object) -> str:
    shared = {
        "planes": sketches,
        "words": [word for plane in sketches for word in plane.word_names],
        "operands": _operands(sketches),
        "by_words": _by_words(spec),
    }
    return fill(f"lychee/{template}.py.jinja", spec, **shared, **values)
