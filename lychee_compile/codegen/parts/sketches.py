"""Functions that load sketches and score them: what scans of tokens, pages and lists share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.gpu.lychee.layout import Field, plane_bytes, planes

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
    shared = ["load_bytes", "load_weights", "codes", "words_of", "dot4"]
    return [
        *library("sketch", *shared[: 3 if spec.group > WORDS_HEADS else 5]),
        _fill("load_sketches", spec, sketches, of="sketches"),
        _fill("products", spec, sketches, of="token"),
        _shares(spec, sketches, "token_shares", "tokens", "token_products"),
    ]


def emit_page_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that load and score the means of pages, which have 4-bit codes alone."""
    means = planes_of(spec.head_dim)[:1]
    return [
        _fill("load_sketches", spec, means, of="pages"),
        _fill("products", spec, means, of="page"),
        _shares(spec, means, "page_shares", "pages", "page_products"),
    ]


def emit_listed_sketches(spec: AttentionSpec) -> list[str]:
    """Return the functions that score sketches of tokens that lie anywhere."""
    sketches = planes_of(spec.head_dim)
    return [
        _fill("listed_products", spec, sketches),
        _shares(spec, sketches, "listed_shares", "listed", "listed_products"),
    ]


def _shares(
    spec: AttentionSpec, sketches: Sequence[Plane], name: str, of: str, products: str
) -> str:
    return _fill("shares", spec, sketches, name=name, of=of, products=products)


def _fill(template: str, spec: AttentionSpec, sketches: Sequence[Plane], **values: object) -> str:
    by_words = spec.group <= WORDS_HEADS
    path = f"lychee/{template}.py.jinja"
    words = [word for plane in sketches for word in plane.word_names]
    return fill(path, spec, planes=sketches, words=words, by_words=by_words, **values)
