"""Compile the kernels of a module at the same time, each in a thread, before any of them runs.

Triton compiles a kernel when it is launched. Without this, the kernels of one attention would wait
for each other; most of the time of compiling is spent outside of Python.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

THREADS = 8
"""Most threads that compile: a module has no more kernels."""


def compile_together(module: ModuleType, launch: Callable[[Any], object]) -> None:
    """Compile the kernels that `launch` launches of its argument; nothing runs on the device.

    A failure is logged and not raised: the launches themselves compile what is missing, or raise.
    """
    try:
        # Triton's mode may outlive an interruption: it gets a context of its own.
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
    """A module whose kernels are compiled for their arguments when launched, and not run."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._module, name)
        return _Kernel(attribute) if hasattr(attribute, "warmup") else attribute


class _Kernel:
    """A kernel of such a module."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.arg_names: Sequence[str] = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compiled(*arguments: Any, **options: Any) -> None:
            self._kernel.warmup(*arguments, grid=grid, **options)

        return compiled
