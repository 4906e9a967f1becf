"""Instructions that multiply codes by the weights of two heads, carried out for one warp."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lychee_compile.codegen.parts import sketches
from lychee_compile.codegen.parts.pair_products import PACK, pair_constraints, pair_instructions

LANES = np.arange(32)


class Warp:
    """Registers of 32 threads, each an array [32], and the bytes that they load from."""

    def __init__(self, operands, memory):
        self.registers = {f"${number}": value for number, value in enumerate(operands)}
        self.registers["%laneid"] = LANES
        self.memory = memory

    def run(self, text):
        for line in text.splitlines():
            own, name, operands = re.fullmatch(r"(@own )?([\w.]+|[{}])\s*(.*?);?", line).groups()
            if name not in ("{", "}", ".reg"):
                self.step(name.split(".")[0], re.findall(r"{.*?}|\[.*?\]|[^,\s]+", operands), own)

    def step(self, name, operands, own):
        to, *sources = operands
        if name == "ld":
            self.load(to, sources[0], self["own"] if own else LANES >= 0)
        elif name == "mma":
            self.multiply(to, *(self[each] for each in sources))
        else:
            self.registers[to] = self.result(name, [self[each] for each in sources])

    def result(self, name, values):
        return {
            "mov": lambda value: value + 0 * LANES,
            "shr": lambda value, by: value >> by,
            "and": lambda one, other: one & other,
            "xor": lambda one, other: one ^ other,
            "setp": np.equal,
            "mad": lambda one, other, third: one * other + third,
        }[name](*values)

    def load(self, names, place, own):
        register, offset = re.fullmatch(r"\[(\w+)\+(\d+)\]", place).groups()
        for number, name in enumerate(re.findall(r"\w+", names)):
            at = np.where(own, self[register] + int(offset) + 4 * number, 0)
            self.registers[name] = np.where(own, self.memory[at // 4], self[name])

    def multiply(self, to, rows, weights, sums):
        """Do mma.m16n8k32 by the layout that the PTX manual gives for 8-bit operands."""
        matrix, right = np.zeros((16, 32), int), np.zeros((32, 8), int)
        for lane in LANES:
            group, thread = lane // 4, lane % 4
            for number in range(4):
                row, column = group + 8 * (number % 2), 4 * thread + 16 * (number // 2)
                matrix[row, column : column + 4] = bytes_of(rows[number][lane], np.uint8)
            for number in range(2):
                column = 4 * thread + 16 * number
                right[column : column + 4, group] = bytes_of(weights[number][lane], np.int8)
        product = matrix @ right
        for number, name in enumerate(re.findall(r"\w+", to)):
            found = product[LANES // 4 + 8 * (number // 2), LANES % 4 * 2 + number % 2]
            self.registers[name] = sums[number] + found

    def __getitem__(self, name):
        if name.startswith("{"):
            return [self[each] for each in re.findall(r"[\w$]+", name)]
        return self.registers[name] if name in self.registers else int(name, 0)


def bytes_of(word, dtype):
    return np.array([word], np.int64).astype(np.uint32).view(dtype).astype(int)


@pytest.mark.parametrize("head_dim", [128, 72, 16, 256])
@pytest.mark.parametrize("kind", ["token", "page"])
def test_products_are_those_of_codes_and_weights(head_dim, kind):
    planes = sketches.planes_of(head_dim)[: 1 if kind == "page" else 2]
    names = [word for plane in planes for word in plane.word_names]
    operands = sketches.operands_of(planes)
    row = sketches.weight_columns(head_dim)
    random = np.random.default_rng(head_dim)
    packed = random.integers(0, 2**32, (len(names), PACK, 32))
    weights = random.integers(-128, 128, (2, row)).astype(np.int8)
    arguments = [0 * LANES] * (2 * PACK) + [*packed.reshape(-1, 32)] + [0 * LANES] * PACK
    assert len(pair_constraints(len(names)).split(",")) == len(arguments)
    warp = Warp(arguments, weights.reshape(-1).view(np.uint32).astype(np.int64))
    warp.run(pair_instructions(operands, names, row))
    for head in range(2):
        for token in range(PACK):
            expected = sum(
                bytes_of(
                    packed[names.index(each.word), token, lane] >> each.shift & int(each.mask, 0),
                    np.uint8,
                )
                @ weights[head, 4 * each.weights : 4 * each.weights + 4].astype(int)
                * (lane == LANES)
                for each in operands
                for lane in LANES
            )
            assert (warp[f"${head * PACK + token}"] == expected).all(), (head, token)
