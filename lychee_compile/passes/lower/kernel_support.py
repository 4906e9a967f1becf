"""Facts that tell if generated kernels can run on an attention; reasons are words for the user."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from importlib.util import find_spec

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.methods import GPU_METHODS
from lychee_compile.kernels.operators.decode import KERNEL_DEVICES
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caches import CacheBinding
from lychee_compile.passes.graph.dataflow import shape_of, static_size, value_of

PREFILL_KERNELS = ("lychee",)
"""Policies that have kernels for a prefill."""
LARGEST_HEAD = 256
"""Largest size of a key or a value."""
OLDEST_CAPABILITY = (8, 0)
"""Lowest compute capability of an NVIDIA GPU that has kernels: the first with bfloat16."""

_REFERENCE = "reference=True runs it slowly, in plain PyTorch"


class NoKernel(Exception):  # noqa: N818  the attention stays as it is
    """No kernel can be generated for an attention; the message says why, in words."""


def runs_kernels(attention: Attention, config: IndexConfig) -> bool:
    """True if generated kernels, and not the reference, run on the device of this attention."""
    device = value_of(attention.query.node).device.type
    return device in KERNEL_DEVICES and not config.reference


def decodes(attention: Attention) -> bool:
    """True if there are few enough query positions for the kernels that decode."""
    query_len = attention.query_len
    return isinstance(query_len, int) and query_len <= LONGEST_QUERY


def no_decode_method(config: IndexConfig) -> str | None:
    """Return why no decode kernel selects keys as the options ask for; None if one does."""
    return _no_method(config, GPU_METHODS, "")


def no_prefill_method(config: IndexConfig) -> str | None:
    """Return why no prefill kernel selects keys as the options ask for; None if one does."""
    return _no_method(config, PREFILL_KERNELS, " for whole sequences")


def _no_method(config: IndexConfig, policies: Collection[str], what: str) -> str | None:
    """Return why no kernel of these `policies`, which are for `what`, does as options ask for."""
    lacks = f"has no kernel{what}"
    if config.policy not in policies:
        known = " and ".join(map(repr, policies))
        have = "have" if len(policies) > 1 else "has"
        return f"option policy={config.policy!r} {lacks}: {known} {have} one; {_REFERENCE}"
    if config.epsilon is not None:
        return f"option epsilon={config.epsilon:g} {lacks}: None does; {_REFERENCE}"
    return None


def no_kernel(attention: Attention) -> str | None:
    """Return why neither an exact nor a sparse kernel can run; None if nothing speaks against it.

    Device, dtypes and sizes are looked at. Only an attempt tells if their layout can be read.
    """
    query, key, value = (
        value_of(each.node) for each in (attention.query, attention.key, attention.value)
    )
    reason = no_kernels_on(query.device)
    if reason is not None:
        return reason
    for name, operand in (("keys", key), ("values", value)):
        if operand.dtype != query.dtype:
            return f"{name} are {operand.dtype} and queries {query.dtype}: no kernel"
        if operand.device != query.device:
            return f"{name} are on {operand.device} and queries on {query.device}"
    return _no_kernel_of_size(attention)


def _no_kernel_of_size(attention: Attention) -> str | None:
    roles = attention.roles
    for name, axes in (("key", roles.head_dim), ("value", roles.value_dim)):
        try:
            size = static(attention.size(axes), f"the size of a {name}")
        except NoKernel as error:
            return str(error)
        if size > LARGEST_HEAD:
            return f"the size of a {name}, {size}, is over {LARGEST_HEAD}: no kernel"
    return None


def no_gpu_index(attention: Attention, binding: CacheBinding, config: IndexConfig) -> str | None:
    """Return why the policy's index cannot be kept for a cache; None if nothing speaks against it.

    The policy has a decode kernel, and `no_kernel` found nothing.
    """
    head_dim = static(attention.size(attention.roles.head_dim), "the size of a key")
    multiple = GPU_METHODS[config.policy].multiple
    if head_dim % multiple:
        return (
            f"the size of a key, {head_dim}, is no multiple of {multiple}: "
            "there is no sparse kernel for it"
        )
    try:
        tokens_written(binding)
    except NoKernel as error:
        return str(error)
    device = value_of(attention.key.node).device
    if binding.positions is not None and value_of(binding.positions).device != device:
        return "the positions that are written are not on the device of the cache"
    return None


def tokens_written(binding: CacheBinding) -> int:
    """Return how many tokens a call writes to the cache; 0 if it only reads.

    Raises `NoKernel` if they are unknown when compiling, or more than a decoding step writes.
    """
    if binding.written is None:
        return 0
    node, dim = binding.written
    count = static_size(shape_of(node)[dim])
    if count is None or count > LONGEST_QUERY:
        raise NoKernel(f"{shape_of(node)[dim]} tokens are written at once: that is no decoding")
    return count


@lru_cache(maxsize=16)
def no_kernels_on(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device; None if they can."""
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
    """Return a size that a kernel is generated for. Raises `NoKernel` if it is symbolic."""
    if not isinstance(size, int):
        raise NoKernel(f"{name}, {size}, is not known when compiling")
    return size
