"""Facts that tell if generated kernels can run on an attention, and the reasons if they cannot."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.fx

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.methods import able, gpu_method, policies_with_kernels
from lychee_compile.kernels.operators.decode import KERNEL_DEVICES
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.kernels.policies.registry import reads_chunks
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.token_writes import RowSlots
from lychee_compile.passes.graph.dataflow import static_size, value_of
from lychee_compile.passes.lower.written_slots import wrapping_operator
from lychee_compile.passes.reasons import Reason, ReasonedError
from lychee_compile.torch_private import share_storage

LARGEST_HEAD = 256
"""Largest size of a key or a value."""
OLDEST_CAPABILITY = (8, 0)
"""Lowest compute capability of an NVIDIA GPU that has kernels: the first with bfloat16."""


class NoKernel(ReasonedError):  # noqa: N818  the attention stays as it is
    """No kernel can be generated for an attention."""


def check_in_place(name: str, stored: torch.fx.Node, node: torch.fx.Node) -> None:
    """Raise `NoKernel` if `node`, an operand of a launch, is a copy of what is `stored`.

    To bring a cache into another layout at every step would cost more than a kernel wins.
    """
    if not share_storage(value_of(stored), value_of(node)):
        raise NoKernel(reasons.COPIED_OPERAND(name=name))


def runs_kernels(attention: Attention, config: IndexConfig) -> bool:
    """True if generated kernels, and not the reference, run on the device of this attention."""
    device = value_of(attention.query.node).device.type
    return device in KERNEL_DEVICES and not config.reference


def decodes(attention: Attention) -> bool:
    """True if there are few enough query positions for the kernels that decode."""
    query_len = attention.query_len
    return isinstance(query_len, int) and query_len <= LONGEST_QUERY


def no_decode_method(config: IndexConfig) -> Reason | None:
    """Return why no decode kernel selects keys as the options ask for; None if one does."""
    policies = policies_with_kernels()
    if config.policy not in policies:
        known = " or ".join(map(repr, policies))
        return reasons.POLICY_NO_KERNEL(policy=config.policy, known=known)
    if config.coverage is not None and not able(config.policy, "covers_mass"):
        known = " or ".join(repr(each) for each in policies if able(each, "covers_mass"))
        return reasons.COVERAGE_NO_KERNEL(
            policy=config.policy, coverage=config.coverage, known=known
        )
    if config.boundaries == "tokens" and reads_chunks(config.policy):
        return reasons.BOUNDARIES_NO_KERNEL(policy=config.policy)
    if config.epsilon is not None and not able(config.policy, "certifies"):
        known = " or ".join(repr(each) for each in policies if able(each, "certifies"))
        return reasons.EPSILON_NO_BOUND(policy=config.policy, epsilon=config.epsilon, known=known)
    return None


def no_prefill_method(config: IndexConfig) -> Reason | None:
    """Return why no prefill kernel selects keys as the options ask for; None if one does."""
    if config.epsilon is not None:
        return reasons.EPSILON_NO_KERNEL(epsilon=config.epsilon)
    return None


def no_kernel(attention: Attention) -> Reason | None:
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
            return reasons.MIXED_DTYPES(name=name, dtype=operand.dtype, query_dtype=query.dtype)
        if operand.device != query.device:
            return reasons.MIXED_DEVICES(
                name=name, device=operand.device, query_device=query.device
            )
    return _no_kernel_of_size(attention)


def _no_kernel_of_size(attention: Attention) -> Reason | None:
    roles = attention.roles
    for name, axes in (("key", roles.head_dim), ("value", roles.value_dim)):
        try:
            size = static(attention.size(axes), f"the size of a {name}")
        except NoKernel as error:
            return error.reason
        if size > LARGEST_HEAD:
            return reasons.HEAD_TOO_LARGE(name=name, size=size, limit=LARGEST_HEAD)
    return None


def no_gpu_index(attention: Attention, binding: CacheBinding, config: IndexConfig) -> Reason | None:
    """Return why the policy's index cannot be kept for a cache; None if nothing speaks against it.

    The policy has a decode kernel, and `no_kernel` found nothing.
    """
    head_dim = static(attention.size(attention.roles.head_dim), "the size of a key")
    multiple = gpu_method(config.policy).multiple
    if head_dim % multiple:
        return reasons.HEAD_NOT_A_MULTIPLE(size=head_dim, multiple=multiple)
    try:
        tokens_written(binding)
    except NoKernel as error:
        return error.reason
    if (operator := wrapping_operator(binding)) is not None:
        return reasons.CACHE_MAY_WRAP(operator=operator)
    if binding.outside_dim is not None:
        return reasons.CACHE_VIEWED()
    device = value_of(attention.key.node).device
    slots = binding.slots.node if isinstance(binding.slots, RowSlots) else binding.slots
    if isinstance(slots, torch.fx.Node) and value_of(slots).device != device:
        return reasons.POSITIONS_DEVICE()
    return None


def tokens_written(binding: CacheBinding) -> int:
    """Return how many tokens a call writes to the cache; 0 if it only reads.

    Raises `NoKernel` if they are unknown when compiling, or more than a decoding step writes.
    """
    count = static_size(binding.tokens_written)
    if count is None:
        name = "the number of tokens written to the cache"
        raise NoKernel(reasons.SIZE_SYMBOLIC(name=name, size=binding.tokens_written))
    if count > LONGEST_QUERY:
        raise NoKernel(reasons.MANY_TOKENS_WRITTEN(count=count, limit=LONGEST_QUERY))
    return count


@lru_cache(maxsize=16)
def no_kernels_on(device: torch.device) -> Reason | None:
    """Return why kernels cannot run on a device; None if they can."""
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
    """Return a size that a kernel is generated for. Raises `NoKernel` if it is symbolic."""
    if not isinstance(size, int):
        raise NoKernel(reasons.SIZE_SYMBOLIC(name=name, size=size))
    return size
