"""Forms in which a cache holds the numbers of its keys and values.

| format | beside the numbers | bytes of a number, in groups of 32 beside bfloat16 |
|---|---|---|
| None | | those of the model |
| "fp8" | | 1 |
| "int8" | scales [B, H, L, D/32] | 1 1/16 |
| "int4" | scales and least numbers [B, H, L, D/32] | 5/8 |

A group is 32 channels of one token and head, or as many as divide both 32 and the head_dim. Its
scale has the dtype of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 32
"""Largest number of channels that share a scale."""


class NumberFormat:
    """Numbers as the model computes them."""

    beside: tuple[str, ...] = ()
    """Names of the tensors that are held beside the numbers."""

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return what is held of keys or values [B, H, T, D]: numbers, and tensors beside them."""
        return (states,)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """Return keys or values [B, H, T, D] of this dtype from what is held of them."""
        return parts[0]


class Float8(NumberFormat):
    """Floats of 8 bits, 4 of them for the exponent; beyond 448 they are cut."""

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return what is held of keys or values [B, H, T, D]: numbers."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        return (states.clamp(-largest, largest).to(torch.float8_e4m3fn),)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return keys or values [B, H, T, D] of this dtype from what is held of them."""
        return parts[0].to(dtype)


class Int8(NumberFormat):
    """Integers from -127 to 127, with a scale for each group of channels of a token."""

    beside = ("scales",)

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return what is held of keys or values [B, H, T, D]: numbers and scales."""
        groups = _grouped(states)
        scales = _scales(groups.abs().amax(-1) / 127, states.dtype)
        numbers = (groups / scales[..., None].float()).round().clamp(-127, 127)
        return numbers.to(torch.int8).flatten(-2), scales

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return keys or values [B, H, T, D] of this dtype from what is held of them."""
        numbers, scales = parts
        groups = numbers.float().unflatten(-1, (scales.shape[-1], -1))
        return (groups * scales[..., None].float()).flatten(-2).to(dtype)


class Int4(NumberFormat):
    """Integers from 0 to 15, with a scale and a least number for each group of channels of a token.

    A byte holds channel d in its lower bits, and channel d + D/2 in its upper ones.
    """

    beside = ("scales", "least")

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return what is held of keys or values [B, H, T, D]: numbers, scales, least numbers.

        Raises `ValueError` if D is odd.
        """
        if states.shape[-1] % 2:
            raise ValueError(
                f'LycheeCache(dtype="int4") puts two channels into a byte, and this model has '
                f'{states.shape[-1]} channels: use dtype="int8"'
            )
        groups = _grouped(states)
        least = groups.amin(-1).to(states.dtype)
        spread = groups.amax(-1) - least.float()
        scales = _scales(spread / 15, states.dtype)
        numbers = ((groups - least[..., None].float()) / scales[..., None].float()).round()
        lower, upper = numbers.clamp(0, 15).to(torch.uint8).flatten(-2).chunk(2, -1)
        return lower + upper * 16, scales, least

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return keys or values [B, H, T, D] of this dtype from what is held of them."""
        pairs, scales, least = parts[0].int(), parts[1].float(), parts[2].float()
        numbers = torch.cat((pairs % 16, pairs // 16), -1).float()
        groups = numbers.unflatten(-1, (scales.shape[-1], -1))
        return (groups * scales[..., None] + least[..., None]).flatten(-2).to(dtype)


FORMATS: dict[str | None, NumberFormat] = {
    None: NumberFormat(),
    "fp8": Float8(),
    "int8": Int8(),
    "int4": Int4(),
}
"""Formats by the names that a `LycheeCache` knows."""


def _grouped(states: Tensor) -> Tensor:
    """Return keys or values [B, H, T, D] as float32 [B, H, T, D/G, G]."""
    return states.float().unflatten(-1, (-1, math.gcd(states.shape[-1], GROUP)))


def _scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales of this dtype, none of them zero; those that are NaN stay so."""
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def bits(buffer: Tensor) -> Tensor:
    """Return `buffer`, or its bits as integers if operators do not take such floats."""
    return buffer.view(torch.uint8) if buffer.dtype is torch.float8_e4m3fn else buffer
