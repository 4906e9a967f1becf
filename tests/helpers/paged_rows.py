"""Rows of a server over pages of 8-bit keys, and what happens to rows and pages between steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from stored_caches import scaled
from torch import Tensor

ROWS, HEADS, GROUP, DIM, PAGE, SIZE, SHARED = 3, 2, 2, 16, 8, 96, 3
OPTIONS: dict[str, Any] = {"policy": "quest", "budget": 48, "sinks": 4, "recent": 16}
EVENTS = ("admit", "admit sharing", "leave", "pause", "move a page", "swap rows", "step")


def attend(
    query: Tensor, key: Tensor, value: Tensor, at: Tensor, numbers: Tensor, units: Tensor,
    table: Tensor,
) -> Tensor:  # fmt: skip
    """Write `key` [B, H, 1, D] at `at` [B, 1], and attend to all that `table` [B, P] lists."""
    write(key, at, numbers, units, table)
    keys = numbers[table].to(key.dtype) * units[table]
    mask = torch.arange(SIZE) <= at[:, None, :, None]
    keys = keys.transpose(1, 2).flatten(2, 3)
    return F.scaled_dot_product_attention(query, keys, value, attn_mask=mask, enable_gqa=True)


def write(key: Tensor, at: Tensor, numbers: Tensor, units: Tensor, table: Tensor) -> None:
    """Quantise `key` [B, H, T, D] to the pages of `at` [B, T]."""
    rows = torch.arange(len(table))[:, None]
    page, slot = table[rows, at // PAGE], at % PAGE
    number, unit = scaled(key.transpose(1, 2))
    numbers[page, :, slot] = number
    units[page, :, slot] = unit


class PagedRows:
    """Rows that decode together. An idle row writes to the page of its own number."""

    def __init__(self) -> None:
        pages = ROWS + SHARED + ROWS * SIZE // PAGE
        self.numbers = torch.zeros(pages, HEADS, PAGE, DIM, dtype=torch.int8)
        self.units = torch.zeros(pages, HEADS, PAGE, 1)
        self.table = torch.arange(ROWS)[:, None].repeat(1, SIZE // PAGE)
        self.at = torch.zeros(ROWS, 1, dtype=torch.int64)
        self.value = torch.eye(SIZE).expand(ROWS, HEADS, SIZE, SIZE)
        self.free = list(range(ROWS + SHARED, pages))
        self.own: list[list[int]] = [[] for _ in range(ROWS)]
        self.paused: set[int] = set()
        shared = torch.arange(ROWS, ROWS + SHARED)[None]
        self._write(torch.arange(SHARED * PAGE)[None], shared)

    def _write(self, at: Tensor, table: Tensor) -> None:
        """Write random keys as an eager prefill does."""
        write(torch.randn(1, HEADS, at.shape[1], DIM), at, self.numbers, self.units, table)

    def happen(self, event: str, row: int, number: int) -> None:
        """Let something happen to a row."""
        if event.startswith("admit"):
            self._leave(row)
            self._admit(row, 30 + number % 50, SHARED if "sharing" in event else 0)
        elif event == "leave":
            self._leave(row)
        elif event == "pause":
            self.paused ^= {row}
        elif event == "move a page" and self.own[row]:
            self._move(row, number % len(self.own[row]))
        elif event == "swap rows":
            self._swap(row, number % ROWS)

    def _admit(self, row: int, tokens: int, shared: int) -> None:
        self.table[row, :shared] = torch.arange(ROWS, ROWS + shared)
        while (shared + len(self.own[row])) * PAGE < tokens:
            self._give_page(row, shared)
        at = torch.arange(shared * PAGE, tokens)[None]
        self._write(at, self.table[row : row + 1])
        self.at[row] = tokens

    def _give_page(self, row: int, shared: int) -> None:
        page = self.free.pop(0)
        self.table[row, shared + len(self.own[row])] = page
        self.own[row].append(page)

    def _leave(self, row: int) -> None:
        self.free += self.own[row]
        self.own[row] = []
        self.table[row], self.at[row] = row, 0

    def _move(self, row: int, place: int) -> None:
        """Copy one of the pages of a row to another page, and list that."""
        old, new = self.own[row][place], self.free.pop(0)
        self.numbers[new], self.units[new] = self.numbers[old], self.units[old]
        self.table[row] = torch.where(self.table[row] == old, new, self.table[row])
        self.own[row][place] = new
        self.free.append(old)

    def _swap(self, row: int, other: int) -> None:
        """Let two rows change places."""
        order = list(range(ROWS))
        order[row], order[other] = other, row
        self.table, self.at = self.table[order], self.at[order]
        self.own = [self.own[each] for each in order]

    def given(self) -> tuple[Tensor, ...]:
        """Return the arguments of the next step."""
        for row in range(ROWS):
            shared = int((self.table[row] >= ROWS).sum()) - len(self.own[row])
            if self.own[row] and int(self.at[row]) // PAGE >= shared + len(self.own[row]):
                self._give_page(row, shared)
        query = 2 * torch.randn(ROWS, HEADS * GROUP, 1, DIM)
        key = torch.randn(ROWS, HEADS, 1, DIM)
        return query, key, self.value, self.at.clone(), self.numbers, self.units, self.table

    def go_on(self) -> None:
        """Let rows move on to the next token, but for those that pause, are idle or are full."""
        for row in range(ROWS):
            if self.own[row] and row not in self.paused and int(self.at[row]) < SIZE - 1:
                self.at[row] += 1

    def keys(self) -> Tensor:
        """Return all keys as attention reads them, [B, H, SIZE, D]."""
        keys = self.numbers[self.table].float() * self.units[self.table]
        return keys.transpose(1, 2).flatten(2, 3)
