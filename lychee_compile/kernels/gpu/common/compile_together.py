"""Compile the kernels of a module at the same time, each in a thread, before any of them runs.

Triton compiles a kernel when it is launched, so that the kernels of one attention would wait for
each other; most of that time is spent outside of Python.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

THREADS = 8
"""At most: a module has no more kernels."""


def compile_together(module: ModuleType, launch: Callable[[Any], object]) -> None:
    """Compile what `launch` launches of the module that it is given; nothing runs on the device.

    Whatever fails here is left to the launches themselves: they compile what is missing, or raise.
    """
    try:
        # In a context of its own: Triton's mode may outlive an interruption.
        copy_context().run(_compile, module, launch)
    except Exception:
        logger.debug("%s is not compiled in threads", module.__name__, exc_info=True)


def _compile(module: ModuleType, launch: Callable[[Any], object]) -> None:
    import triton

    threads = max(1, min(os.cpu_count() or 1, THREADS))
    with (
        ThreadPoolExecutor(threads, "lychee_compile") as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        launch(_Unlaunched(module))


class _Unlaunched:
    """A module whose kernels, launched, are compiled for their arguments and not run."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return _Kernel(found) if hasattr(found, "warmup") else found


class _Kernel:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compiled(*arguments: Any, **options: Any) -> None:
            self._kernel.warmup(*arguments, grid=grid, **options)

        return compiled
