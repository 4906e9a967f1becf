"""A PyTorch compiler backend that makes attention over long contexts sparse.

`torch.compile(model, backend="lychee")` needs no import of this package; what is here looks into it
(`explain`, `reports`, `record`), configures it (`Options`, `boundary_table`), takes transformers'
`generate()` through it (`prepare`, `restore`), keeps keys and values for it (`LycheeCache`) or uses
its index by hand (`functional`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lychee_compile import functional
    from lychee_compile.backend import reset
    from lychee_compile.boundaries import BoundaryTable, boundary_table
    from lychee_compile.cache.lychee_cache import LycheeCache
    from lychee_compile.generation.prepare import prepare, restore
    from lychee_compile.inspection import explain, reports
    from lychee_compile.kernels.policies.registry import register_policy
    from lychee_compile.options import OptionError, Options
    from lychee_compile.recorder import record
    from lychee_compile.report.report import Report

_HOMES = {
    "BoundaryTable": "boundaries",
    "LycheeCache": "cache.lychee_cache",
    "OptionError": "options",
    "Options": "options",
    "Report": "report.report",
    "boundary_table": "boundaries",
    "explain": "inspection",
    "functional": "functional",
    "prepare": "generation.prepare",
    "record": "recorder",
    "register_policy": "kernels.policies.registry",
    "reports": "inspection",
    "reset": "backend",
    "restore": "generation.prepare",
}

__version__ = "0.2.0"
__all__ = [
    "BoundaryTable",
    "LycheeCache",
    "OptionError",
    "Options",
    "Report",
    "boundary_table",
    "explain",
    "functional",
    "prepare",
    "record",
    "register_policy",
    "reports",
    "reset",
    "restore",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: listing backends must not load a compiler."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    value = module if name == "functional" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
