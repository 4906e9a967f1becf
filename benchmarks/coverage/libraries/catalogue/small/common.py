"""Words shared by the catalogues of small libraries."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import (
    Entry,
    Library,
    Made,
    floats,
)

EINOPS = ["einops", "einx", "loguru", "frozendict", "torch-einops-utils"]
SMALL = {"dim": 32, "depth": 2, "heads": 4}
WORDS = {"num_tokens": 64, "max_seq_len": 64, **SMALL}
SEQUENCE = floats(2, 32, 32)


def library(package: str, *entries: Entry, needs: tuple[str, ...] = ()) -> Library:
    """Return a library of one package, which needs a few others besides those for einops."""
    return Library(package, [package, *needs, *EINOPS], entries)


def entry(
    path: str, *inputs: Any, title: str = "", named: dict[str, Any] | None = None, **arguments: Any
) -> Entry:
    """Return an entry; the path ends with the class, `arguments` build it."""
    extra = arguments.pop("not_attentions", 0)
    name = path.rpartition(".")[2] + (f", {title}" if title else "")
    return Entry(name, Made(path, **arguments), inputs, named or {}, not_attentions=extra)


LOCAL = ("local-attention", "hyper-connections")
