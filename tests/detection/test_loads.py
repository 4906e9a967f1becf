"""Keys and values that are recovered as expressions are those that the graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovered_loads import PLAIN, Graph
from stored_caches import FORMS, Sizes
from strategies import seeds
from torch import Tensor

from lychee_compile.kernels.operators.reference import DTYPES
from lychee_compile.passes.detect.caching.caches import CacheBinding, bind_cache
from lychee_compile.passes.detect.caching.loaded_caches import bind_loaded, load_of_values


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


def close(got: Tensor, want: Tensor) -> None:
    rough = {"atol": 3e-2, "rtol": 2e-2} if want.dtype != torch.float32 else {}
    torch.testing.assert_close(got, want, **rough)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=max(2, settings.default.max_examples // 9))
@given(data=st.data(), seed=seeds)
def test_an_expression_gives_what_the_graph_computes(name: str, data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    graph = Graph(name, data.draw(sizes(name)))
    plain = bind_cache(graph.attention, graph.writes)
    found = bind_loaded(graph.attention, graph.writes)
    if name in PLAIN:
        assert isinstance(plain, CacheBinding)
        assert found is None
        return
    assert found is not None
    assert found.load is not None
    assert found.tokens_written == 1
    assert len(found.watched) + 1 == len({leaf for _, leaf in found.load.leaves})
    close(graph.evaluated(found.load, graph.keys), graph.keys)
    values = load_of_values(graph.attention, graph.writes)
    if values is not None:
        close(graph.evaluated(values, graph.values), graph.values)
