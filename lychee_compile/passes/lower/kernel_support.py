"""Whether generated kernels can run on the operands of an attention, in words for the user."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from importlib.util import find_spec

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.methods import policies_with_kernels
from lychee_compile.kernels.operators.decode import KERNEL_DEVICES
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import value_of

LARGEST_HEAD = 256
"""Largest size of a key or a value."""
OLDEST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: the first with bfloat16."""

_REFERENCE = "reference=True runs it slowly, in plain PyTorch"


class NoKernel(Exception):  # noqa: N818  the attention stays as it is
    """There is no kernel for an attention; the message says why, in words."""


def runs_kernels(attention: Attention, config: IndexConfig) -> bool:
    """Whether decoding runs generated kernels where this attention is."""
    device = value_of(attention.query.node).device.type
    return device in KERNEL_DEVICES and not config.reference


def decodes(attention: Attention) -> bool:
    """Whether few enough queries ask, as kernels for decoding expect."""
    query_len = attention.query_len
    return isinstance(query_len, int) and query_len <= LONGEST_QUERY


def no_sparse_kernel(
    config: IndexConfig, policies: Collection[str] | None = None, what: str = ""
) -> str | None:
    """Why no kernel selects as the options ask for; `policies` have one for `what`."""
    lacks = f"has no kernel{what}"
    policies = policies_with_kernels() if policies is None else policies
    if config.policy not in policies:
        known = " and ".join(map(repr, policies))
        have = "have" if len(policies) > 1 else "has"
        return f"option policy={config.policy!r} {lacks}: {known} {have} one; {_REFERENCE}"
    if config.epsilon is not None:
        return f"option epsilon={config.epsilon:g} {lacks}: None does; {_REFERENCE}"
    return None


def check_supported(attention: Attention) -> None:
    """Raises `NoKernel` where neither an exact nor a sparse kernel can run."""
    query, key, value = (
        value_of(each.node) for each in (attention.query, attention.key, attention.value)
    )
    reason = no_kernels_on(query.device)
    if reason is not None:
        raise NoKernel(reason)
    for name, operand in (("keys", key), ("values", value)):
        if operand.dtype != query.dtype:
            raise NoKernel(f"{name} are {operand.dtype} and queries {query.dtype}: no kernel")
        if operand.device != query.device:
            raise NoKernel(f"{name} are on {operand.device} and queries on {query.device}")
    roles = attention.roles
    for name, axes in (("key", roles.head_dim), ("value", roles.value_dim)):
        size = static(attention.size(axes), f"the size of a {name}")
        if size > LARGEST_HEAD:
            raise NoKernel(f"the size of a {name}, {size}, is over {LARGEST_HEAD}: no kernel")


@lru_cache(maxsize=16)
def no_kernels_on(device: torch.device) -> str | None:
    """Why kernels cannot run on a device; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: there are no kernels without it"
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"no kernels for {name} yet: they are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, each)) for each in (capability, OLDEST_CAPABILITY))
        return f"{name} has compute capability {have}: kernels need {need}"
    return None


def static(size: object, name: str) -> int:
    """A size that a kernel is generated for. Raises `NoKernel` where only a call tells it."""
    if not isinstance(size, int):
        raise NoKernel(f"{name}, {size}, is not known when compiling")
    return size
