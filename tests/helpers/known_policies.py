"""Policies that are registered for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.policies import registry


@contextmanager
def known_policies(stacks: Mapping[str, LevelStack]) -> Iterator[pytest.MonkeyPatch]:
    """Register declared policies by name, and forget them and all patches at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_policies", dict(registry._policies))
        for name, stack in stacks.items():
            registry.register_policy(name, stack)
        yield patch
