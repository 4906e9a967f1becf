"""The operators that run generated kernels, as PyTorch sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import SIZE, Cache, compiled, grow
from torch import Tensor
from torch._inductor import compile_fx

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Captured, S, SparseSpec
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.common.module_cache import load, store
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex
from lychee_compile.kernels.operators import decode as decode_operators

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

DIM, LENGTH = 8, 90


def kernel(sparse: bool) -> str:
    """Return a module for keys up to `length[0]`."""
    element = sympy.Indexed(sympy.IndexedBase(sympy.Symbol("length", integer=True)), 0)
    spec = AttentionSpec(
        dtype="float32",
        group=2,
        head_dim=DIM,
        value_dim=DIM,
        score=S / 2,
        visible=sympy.Le(KV, element),
        captured=(Captured("length", "int64", 1),),
        extra=True,
        sparse=SparseSpec("lychee", 40, 4, 16, 16, 65536) if sparse else None,
    )
    return store(emit_module(spec), spec.name).stem


def operands() -> tuple[Any, ...]:
    """Return query, key, value, what is captured, and an extra logit."""
    query, sink = torch.randn(1, 4, 2, DIM), torch.randn(4, 1)
    key, value = torch.randn(2, 1, 2, 100, DIM)
    return query, key, value, [torch.tensor([LENGTH])], sink


def dense(query: Tensor, key: Tensor, value: Tensor, captured: list[Tensor], sink: Tensor) -> Any:
    scores = query @ key.repeat_interleave(2, 1).mT / 2
    scores = scores.masked_fill(torch.arange(100) > captured[0], -torch.inf)
    extra = sink.expand(1, 4, 2)[..., None]
    weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    return weights @ value.repeat_interleave(2, 1)


def arguments(kind: str) -> tuple[Any, ...]:
    """Return the arguments of one operator; the caller keeps alive what stands for the index."""
    given, positions = operands(), torch.tensor([LENGTH - 1, LENGTH])
    if kind == "exact":
        return (*given, kernel(sparse=False))
    if kind == "sparse":
        index = SketchIndex(SketchLayout.over(given[1]), given[1].device)
        return (*given, positions, index.state, kernel(sparse=True))
    return (*given, positions, OWNER.tensor, kernel(sparse=True))


OWNER = GrowingCacheIndex()
OPERATORS = {
    "exact": decode_operators.exact_decode,
    "sparse": decode_operators.sparse_decode,
    "growing": decode_operators.growing_sparse_decode,
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_opcheck(kind: str) -> None:
    torch.library.opcheck(OPERATORS[kind], arguments(kind))


@pytest.mark.parametrize("kind", OPERATORS)
def test_without_a_trusted_index_every_visible_key_is_read(kind: str) -> None:
    given = arguments(kind)
    torch.testing.assert_close(OPERATORS[kind](*given), dense(*given[:5]), atol=1e-5, rtol=1e-5)


def test_fixed_and_growing_indexes_give_the_same() -> None:
    given, owner = operands(), GrowingCacheIndex()
    query, key, value, captured, sink = given
    name, positions = kernel(sparse=True), torch.tensor([LENGTH - 1, LENGTH])
    index = SketchIndex(SketchLayout.over(key), key.device)
    index.build(load(name), key, [LENGTH + 1] * key.shape[0])
    owner.index_for(key, positions)
    owner.after_call(key, CacheUse(name, lambda cache: cache, 2, None, "lychee"))
    rest = (captured, sink, positions)
    fixed = decode_operators.sparse_decode(query, key, value, *rest, index.state, name)
    growing = decode_operators.growing_sparse_decode(query, key, value, *rest, owner.tensor, name)
    assert owner.trusted
    assert not torch.allclose(fixed, dense(*given), atol=1e-3)
    assert torch.equal(fixed, growing)
    assert owner.tensor[1] == 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.Graph]]:
    """The graphs that Inductor lowers, once all its passes have run."""
    seen: list[torch.fx.Graph] = []
    passes = compile_fx._recursive_post_grad_passes

    def noting(gm: torch.fx.GraphModule, *given: Any, **more: Any) -> None:
        passes(gm, *given, **more)
        seen.append(gm.graph)

    monkeypatch.setattr(compile_fx, "_recursive_post_grad_passes", noting)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield seen


def copies(graph: torch.fx.Graph, size: int) -> list[torch.fx.Node]:
    """Operators that make or fill a tensor of as many numbers as `size`, those of caches aside."""
    makes = ("clone", "copy", "copy_", "index_put", "index_copy", "slice_scatter", "_to_copy")
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and getattr(node.target, "_opname", "") in makes
        and node.meta["val"].numel() >= size
        and len(set(node.all_input_nodes)) > (node.target._opname == "copy_")
    ]


def called(graph: torch.fx.Graph, name: str) -> int:
    return sum(name in str(node.target) for node in graph.nodes)


def test_a_cache_is_written_and_read_in_place(graphs: list[torch.fx.Graph]) -> None:
    cache, step = Cache().fill(90), compiled()
    torch.testing.assert_close(*cache.step(step), atol=1e-5, rtol=1e-5)
    cache.step(step)
    (graph,) = graphs
    assert called(graph, "lychee.sparse_decode.default") == 1
    assert not called(graph, "auto_functionalized")
    assert not copies(graph, cache.keys.numel())


def test_exact_decode_reads_in_place_too(graphs: list[torch.fx.Graph]) -> None:
    cache = Cache().fill(90)
    torch.testing.assert_close(*cache.step(compiled(budget=None)), atol=1e-5, rtol=1e-5)
    (graph,) = graphs
    assert called(graph, "lychee.exact_decode.default") == 1
    assert not copies(graph, cache.keys.numel())


def test_a_growing_cache_is_not_copied_either(
    graphs: list[torch.fx.Graph],
) -> None:
    step = compiled(grow)
    query, (keys, values) = torch.randn(1, 4, 1, DIM), torch.randn(2, 1, 2, 90, DIM)
    for _ in range(3):
        _, keys, values = step(query, keys, values, *torch.randn(2, 1, 2, 1, DIM))
    graph = graphs[-1]
    assert called(graph, "lychee.growing_sparse_decode.default") == 1
    assert called(graph, "lychee.append.default") == 2
    assert not called(graph, "aten.cat")
    assert not called(graph, "auto_functionalized")
    assert not copies(graph, keys.numel() // 2)


def test_heads_repeated_by_hand_and_tokens_before_heads_are_read_where_they_lie(
    graphs: list[torch.fx.Graph],
) -> None:
    def step(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        keys.index_copy_(1, positions, new[0])
        values.index_copy_(1, positions, new[1])
        wide = [each.transpose(1, 2).repeat_interleave(2, 1) for each in (keys, values)]
        mask = (torch.arange(keys.shape[1]) <= positions[:, None])[None, None]
        return F.scaled_dot_product_attention(query, *wide, mask)

    keys, values = torch.randn(2, 1, SIZE, 2, DIM)
    given = (torch.randn(1, 4, 1, DIM), torch.tensor([100]), *torch.randn(2, 1, 1, 2, DIM))
    expected = step(given[0], keys.clone(), values.clone(), *given[1:])
    got = compiled(step)(given[0], keys, values, *given[1:])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    (graph,) = graphs
    assert called(graph, "lychee.sparse_decode.default") == 1
    assert not copies(graph, keys.numel())


def test_copies_are_seen() -> None:
    """The search for copies, which the tests above rely on, finds them."""
    graph = torch.fx.Graph()
    given = graph.placeholder("keys")
    aten = torch.ops.aten
    for target, operands in (
        (aten.clone.default, (given,)),
        (aten.copy_.default, (given, given)),
        (aten.neg.default, (given,)),
    ):
        node = graph.call_function(target, operands)
        node.meta["val"] = torch.empty(10)
    assert [node.name for node in copies(graph, 10)] == ["clone_default"]
    assert not copies(graph, 11)
