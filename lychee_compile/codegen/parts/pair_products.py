"""Instructions by which tensor cores multiply the codes of sketches by the weights of two heads.

A thread has tokens of its own, and gets the products of these. `mma.m16n8k32` wants another layout:
a row of 32 codes is spread over four threads. Sums do not depend on the order of codes, so four
threads give it eight codes each of a token of their own, as if these were one row. Columns keep the
tokens apart: column 2 t + h has the weights of head h for the codes of thread t, and 0 for those of
the others. Thread t gets columns 2 t and 2 t + 1, the products of its token with both heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PACK = 4
"""Number of tokens of a thread that the instructions take at a time."""


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


def pair_constraints(words: int) -> str:
    """Return the constraints of the operands, if a sketch has so many packed words.

    The operands are products of both heads, int32; packed words; and the address of the weights.
    """
    return ",".join(["=r"] * (2 * PACK) + ["r"] * (words * PACK) + ["l"] * PACK)


def pair_instructions(codes: Sequence[Operand], words: Sequence[str], row: int) -> str:
    """Return the PTX instructions for `PACK` tokens of each thread.

    `words` are the packed words of a sketch by name, and a head has `row` bytes of weights.
    """
    numbered = [(words.index(each.word), each) for each in codes]
    return "\n".join(["{", *_weights(codes, len(words), row), *_tokens(numbered), "}"])


def _weights(codes: Sequence[Operand], words: int, row: int) -> Iterator[str]:
    """Yield the instructions that load the weights of the thread's column, for its own codes."""
    count = -(-(1 + max(each.weights for each in codes)) // 4) * 4
    address = (2 + words) * PACK
    yield f".reg .b32 lane, column, other, weight<{count}>, code<4>, sum<4>;"
    yield ".reg .b64 place;"
    yield ".reg .pred own;"
    yield "mov.u32 lane, %laneid;"
    yield "shr.u32 column, lane, 2;"
    yield "shr.u32 other, lane, 3;"
    yield "xor.b32 other, other, lane;"
    yield "and.b32 other, other, 3;"
    yield "setp.eq.u32 own, other, 0;"
    yield "and.b32 column, column, 1;"
    yield f"mad.wide.u32 place, column, {row}, ${address};"
    yield from (f"mov.b32 weight{number}, 0;" for number in range(count))
    for number in range(0, count, 4):
        four = ", ".join(f"weight{number + each}" for each in range(4))
        yield f"@own ld.global.v4.b32 {{{four}}}, [place+{4 * number}];"


def _tokens(codes: Sequence[tuple[int, Operand]]) -> Iterator[str]:
    """Yield the instructions that multiply, two tokens of each thread at a time."""
    sums = "{sum0, sum1, sum2, sum3}"
    for token in range(0, PACK, 2):
        yield from (f"mov.b32 sum{number}, 0;" for number in range(4))
        for start in range(0, len(codes), 2):
            two = codes[start : start + 2]
            for half in range(2):
                for row in range(2):
                    yield from _code(f"code{2 * half + row}", two[half : half + 1], token + row)
            weights = [f"weight{each.weights}" for _, each in two]
            yield (
                "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
                f"{sums}, {{code0, code1, code2, code3}}, {{{weights[0]}, {weights[-1]}}}, {sums};"
            )
        for row in range(2):
            yield f"mov.b32 ${token + row}, sum{2 * row};"
            yield f"mov.b32 ${PACK + token + row}, sum{2 * row + 1};"


def _code(name: str, codes: Sequence[tuple[int, Operand]], token: int) -> Iterator[str]:
    """Yield the instructions that unpack four codes of a token; without codes, 0."""
    if not codes:
        yield f"mov.b32 {name}, 0;"
    for word, each in codes:
        source = f"${(2 + word) * PACK + token}"
        if each.shift:
            yield f"shr.u32 {name}, {source}, {each.shift};"
            source = name
        yield f"and.b32 {name}, {source}, {each.mask};"
