"""Whether generated kernels can run on the operands of an attention, in words for the user."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from importlib.util import find_spec

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.methods import GPU_METHODS
from lychee_compile.kernels.operators.decode import KERNEL_DEVICES
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.reasons import Reason, ReasonedError, ReasonKind

LARGEST_HEAD = 256
"""Largest size of a key or a value."""
OLDEST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: the first with bfloat16."""


class NoKernel(ReasonedError):  # noqa: N818  the attention stays as it is
    """There is no kernel for an attention."""


def runs_kernels(attention: Attention, config: IndexConfig) -> bool:
    """Whether decoding runs generated kernels where this attention is."""
    device = value_of(attention.query.node).device.type
    return device in KERNEL_DEVICES and not config.reference


def decodes(attention: Attention) -> bool:
    """Whether few enough queries ask, as kernels for decoding expect."""
    query_len = attention.query_len
    return isinstance(query_len, int) and query_len <= LONGEST_QUERY


def no_sparse_kernel(
    config: IndexConfig,
    policies: Collection[str] = GPU_METHODS,
    lacking: ReasonKind = reasons.POLICY_NO_KERNEL,
) -> Reason | None:
    """Return why no kernel selects as the options ask for; None if one does.

    `policies` have a kernel, and `lacking` is the reason for the others.
    """
    if config.policy not in policies:
        return lacking(policy=config.policy, known=" or ".join(map(repr, policies)))
    if config.epsilon is not None:
        return reasons.EPSILON_NO_KERNEL(epsilon=config.epsilon)
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
            raise NoKernel(
                reasons.MIXED_DTYPES(name=name, dtype=operand.dtype, query_dtype=query.dtype)
            )
        if operand.device != query.device:
            raise NoKernel(
                reasons.MIXED_DEVICES(name=name, device=operand.device, query_device=query.device)
            )
    roles = attention.roles
    for name, axes in (("key", roles.head_dim), ("value", roles.value_dim)):
        size = static(attention.size(axes), f"the size of a {name}")
        if size > LARGEST_HEAD:
            raise NoKernel(reasons.HEAD_TOO_LARGE(name=name, size=size, limit=LARGEST_HEAD))


@lru_cache(maxsize=16)
def no_kernels_on(device: torch.device) -> Reason | None:
    """Why kernels cannot run on a device; None where they can."""
    if find_spec("triton") is None:
        return reasons.NO_TRITON()
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return reasons.GPU_VENDOR(name=name)
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, each)) for each in (capability, OLDEST_CAPABILITY))
        return reasons.GPU_TOO_OLD(name=name, have=have, need=need)
    return None


def static(size: object, name: str) -> int:
    """A size that a kernel is generated for. Raises `NoKernel` where only a call tells it."""
    if not isinstance(size, int):
        raise NoKernel(reasons.SIZE_SYMBOLIC(name=name, size=size))
    return size
