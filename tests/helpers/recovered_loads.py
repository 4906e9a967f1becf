"""One step over a cache as the backend sees it, and what it stores, reads and computes."""

from __future__ import annotations

import torch
from stored_caches import FORMS, Sizes
from torch import Tensor
from tracing import Traced

from lychee_compile.kernels.reference.loads import Load as Evaluated
from lychee_compile.passes.detect.caching.caches import find_writes
from lychee_compile.passes.detect.caching.load_text import load_text
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.detect.caching.parts import separate_parts
from lychee_compile.passes.detect.detect import find_attention
from lychee_compile.passes.graph.normalise import normalise

PLAIN = ("layers in one tensor", "values beside keys", "heads of values behind those of keys")
"""Forms whose keys and values need no expression."""


class Graph:
    """One step over a cache as the backend sees it, and the values of all tensors after it."""

    def __init__(self, name: str, s: Sizes) -> None:
        form = FORMS[name]
        held = form.store(s)
        given = (s.query(), s.keys(1), s.keys(1), torch.tensor([9]))
        self.keys, self.values = form.step(*given[1:], *[each.clone() for each in held])
        traced = Traced(form.attend, *given, *held)
        written = normalise(traced.gm, traced.mode)
        separate_parts(traced.gm.graph)
        (self.attention,) = find_attention(traced.gm, written)
        self.graph = traced.gm.graph
        self.writes = find_writes(self.graph)
        runner = torch.fx.Interpreter(traced.gm, garbage_collect_values=False)
        runner.run(*given, *held)
        self.found = runner.env

    def evaluated(self, load: Load, like: Tensor) -> Tensor:
        text = load_text(load)
        assert text is not None
        tensors = tuple(self.found[leaf] for _, leaf in load.leaves)
        assert load.dtype == like.dtype
        return Evaluated(text, load.dtype, tensors, tuple(like.shape)).span(0, like.shape[2])
