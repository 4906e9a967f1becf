"""Keys and values that are recovered as expressions are those that the graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_caches import FORMS, Sizes
from strategies import DTYPES, seeds
from torch import Tensor
from tracing import Traced

from lychee_compile.kernels.reference.loads import Load as Evaluated
from lychee_compile.passes.detect.caching.caches import CacheBinding, bind_cache, find_writes
from lychee_compile.passes.detect.caching.load_text import load_text
from lychee_compile.passes.detect.caching.loaded_caches import bind_loaded, load_of_values
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.detect.caching.parts import separate_parts
from lychee_compile.passes.detect.detect import find_attention
from lychee_compile.passes.graph.normalise import normalise

PLAIN = ("layers in one tensor", "values beside keys", "heads of values behind those of keys")


@st.composite
def sizes(draw: Any, name: str) -> Sizes:
    return Sizes(
        batch=1 if name == "pages" else draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        slots=8 * draw(st.integers(3, 5)),
        head_dim=draw(st.sampled_from([8, 16, 24])),
        dtype=draw(st.sampled_from(DTYPES)),
    )


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


def close(got: Tensor, want: Tensor) -> None:
    rough = {"atol": 3e-2, "rtol": 2e-2} if want.dtype != torch.float32 else {}
    torch.testing.assert_close(got, want, **rough)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=max(2, settings.default.max_examples // 9))
@given(data=st.data(), seed=seeds)
def test_an_expression_gives_what_the_graph_computes(name: str, data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    graph = Graph(name, data.draw(sizes(name)))
    plain = bind_cache(graph.attention, graph.graph, graph.writes)
    found = bind_loaded(graph.attention, graph.graph, graph.writes)
    if name in PLAIN:
        assert isinstance(plain, CacheBinding)
        assert found is None
        return
    assert found is not None
    assert found.load is not None
    assert found.tokens_written == 1
    assert len(found.watched) + 1 == len({leaf for _, leaf in found.load.leaves})
    close(graph.evaluated(found.load, graph.keys), graph.keys)
    values = load_of_values(graph.attention, graph.graph, graph.writes)
    if values is not None:
        close(graph.evaluated(values, graph.values), graph.values)
