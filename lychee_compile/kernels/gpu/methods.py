"""The policies that have kernels on a GPU, and the method that runs each generated module.

A policy that is declared as levels has kernels that are made from its declaration. Any other has a
method of its own; the record of one that this package has is attached to the policy of the same
name when this module is imported. `codegen/module.py` puts the text of the kernels together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.layout import IndexLayout
from lychee_compile.kernels.gpu.common.method import GpuMethod
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.method import LevelMethod
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.lychee.method import LycheeMethod
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.policies.registry import (
    GpuKernels,
    Policy,
    attach_kernels,
    find_policy,
    policies,
)

Ability = Literal["notices_writes", "covers_mass", "certifies", "computes_keys"]
"""Abilities of kernels: to notice that others have written a cache, to end a choice at a share
of the softmax, to bound the share that is not read, to compute keys from what is stored."""
BUILT_IN: dict[str, GpuMethod] = {"lychee": LycheeMethod()}
"""The methods of this package that are written by hand, by the name of their policy."""

for _name, _method in BUILT_IN.items():
    attach_kernels(_name, _method)


def policies_with_kernels() -> tuple[str, ...]:
    """Return the policies that have kernels for decoding.

    For a prefill every policy has them that has a form for it.
    """
    return tuple(each.name for each in policies() if _method_of(each) is not None)


def gpu_method(policy: str) -> GpuMethod:
    """Return how a policy's kernels are run.

    Raises ValueError for a policy without kernels, TypeError for a record that is no `GpuMethod`.
    """
    record = find_policy(policy)
    method = None if record is None else _method_of(record)
    if method is None:
        known = ", ".join(policies_with_kernels())
        raise ValueError(f"policy {policy!r} has no GPU kernels; those that have are {known}")
    checked = _checked.get(policy)
    if checked is not method or checked is None:
        if not isinstance(method, GpuMethod):
            raise TypeError(f"policy {policy!r}: {method!r} is no GpuMethod")
        checked = _checked[policy] = method
    return checked


def _method_of(policy: Policy) -> GpuKernels | None:
    """Return the method of a policy; None if it has no kernels."""
    if policy.gpu is None and policy.levels is not None:
        attach_kernels(policy.name, LevelMethod(policy.name))
        return gpu_method(policy.name)
    return policy.gpu


def able(policy: str, ability: Ability) -> bool:
    """Return True if a policy's kernels have an ability.

    A method says so by an attribute of that name; without one they do not have it.
    """
    return bool(getattr(gpu_method(policy), ability, False))


def measures_for_certificates(policy: str) -> bool:
    """Return True if the index of a policy has parts that modules with certificates alone need."""
    return isinstance(gpu_method(policy), LycheeMethod)


def method_of_kernel(kernel: str) -> GpuMethod:
    """Return how the kernels of a generated module are run: the module names its policy."""
    return gpu_method(load(kernel).POLICY)


def layout_for(kernel: str, key: Tensor) -> IndexLayout:
    """Return the layout of the index that a module reads, for a cache `key` [B, Hkv, L, D]."""
    method, settings = method_of_kernel(kernel), settings_of(kernel)
    if isinstance(method, LevelMethod):
        return LevelLayout.over(key, method.policy, settings)
    if isinstance(method, LycheeMethod):
        if measures(kernel):
            return SketchLayout.over(key, measured=True)
        return SketchLayout.over(key, settings, load(kernel).FLAT_TOKENS)
    return method.layout_of(key)


def measures(kernel: str) -> bool:
    """Return True if a module needs an index that tells how far keys are from their sketches."""
    return hasattr(load(kernel), "measure")


def settings_of(kernel: str) -> GroupSettings | None:
    """Return the settings of the groups of a generated module; None if they do not vary."""
    settings = getattr(load(kernel), "SETTINGS", None)
    return None if settings is None else GroupSettings(*settings)


def new_index(layout: IndexLayout, device: torch.device) -> DeviceIndex:
    """Return an empty index, which is not trusted."""
    with torch.inference_mode(False):  # graphs write to it in every mode
        return gpu_method(layout.policy).new_index(layout, device)


_checked: dict[str, GpuMethod] = {}
"""Methods that were found to be a `GpuMethod`, which takes longer than a step has time for."""
