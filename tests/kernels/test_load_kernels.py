"""Kernels compute keys and values as the plain form does."""

from __future__ import annotations

from types import ModuleType

import pytest
import sympy
import torch
import triton_interpreter
from recovered_loads import PLAIN, Graph
from stored_caches import FORMS, Sizes
from torch import Tensor

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.load_source import load_source
from lychee_compile.codegen.parts.loads import emit_loads
from lychee_compile.codegen.specification import KV, AttentionSpec, B, D, H, LoadSpec, S, Stored
from lychee_compile.kernels.gpu.common.module_cache import load, store
from lychee_compile.kernels.gpu.common.operands import parts_argument
from lychee_compile.passes.detect.caching.loaded_caches import bind_loaded, load_of_values
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.lower.loads.kernel_loads import load_specification

triton_interpreter.use()
pytestmark = pytest.mark.usefixtures("seeded", "kernel_folder")

MODULE = """
import triton
import triton.language as tl

HEAD_DIM = VALUE_DIM = tl.constexpr({channels})
DIM = WIDTH = tl.constexpr({padded})


{functions}


@triton.jit
def read_all({name}, output, tokens, heads, N: tl.constexpr):
    space, kv, d = tl.program_id(0), tl.arange(0, N)[:, None], tl.arange(0, DIM)[None, :]
    found = load_{name}(space // heads, space % heads, kv, d, kv < tokens, {name})
    place = output + (space * tokens + kv) * HEAD_DIM + d
    tl.store(place, found, mask=(kv < tokens) & (d < HEAD_DIM))
"""


def read_by_a_kernel(name: str, found: Load, graph: Graph, like: Tensor) -> Tensor:
    """Return keys or values as a kernel computes them."""
    batch, heads, tokens, channels = like.shape
    dtype = str(like.dtype).removeprefix("torch.")
    loads = {f"{name}s": load_specification(found, name)}
    spec = AttentionSpec(dtype, 1, channels, channels, S, **loads)
    functions = "\n\n\n".join(emit_loads(spec))
    text = MODULE.format(channels=channels, padded=32, name=name, functions=functions)
    module: ModuleType = load(store(text, "loads").stem)
    parts = [graph.found[leaf] for _, leaf in found.leaves]
    output = torch.empty_like(like, memory_format=torch.contiguous_format)
    module.read_all[(batch * heads,)](parts_argument(parts), output, tokens, heads, N=64)
    return output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [each for each in FORMS if each not in PLAIN])
def test_a_kernel_computes_what_the_plain_form_does(name: str, dtype: str) -> None:
    sizes = Sizes(1 if name == "pages" else 2, slots=40, head_dim=24, dtype=getattr(torch, dtype))
    graph = Graph(name, sizes)
    binding = bind_loaded(graph.attention, graph.writes)
    assert binding is not None
    assert binding.load is not None
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 8e-3, "atol": 1e-6}
    keys = graph.evaluated(binding.load, graph.keys)
    got = read_by_a_kernel("key", binding.load, graph, keys)
    torch.testing.assert_close(got, keys, **close)
    values = load_of_values(graph.attention, graph.writes)
    if values is not None:
        wanted = graph.evaluated(values, graph.values)
        torch.testing.assert_close(
            read_by_a_kernel("value", values, graph, wanted), wanted, **close
        )


def element(name: str, *indices: sympy.Expr | int) -> sympy.Indexed:
    return sympy.Indexed(sympy.IndexedBase(name), *indices)


def test_the_parts_of_a_rotation_are_read_at_once() -> None:
    low, high = element("x", B, H, KV, D + 8), element("x", B, H, KV, D - 8)
    load = LoadSpec(
        sympy.Piecewise((low, D < 8), (high, True)), (Stored("x", "int8", (None, None, None, 16)),)
    )
    source = load_source(load, "HEAD_DIM", 16)
    (read,) = source.reads
    assert "tl.where(d < 8, d + 8, d - 8)" in read.address
    assert read.mask == "there & (d < HEAD_DIM)"
    assert source.bytes_read == 16


def test_an_element_that_may_lie_outside_is_read_where_it_counts() -> None:
    latent, rotated = element("x", B, KV, D), element("y", B, KV, D - 12)
    tensors = Stored("x", "float16", (None, None, 12)), Stored("y", "float16", (None, None, 4))
    load = LoadSpec(sympy.Piecewise((latent, D < 12), (rotated, True)), tensors)
    masks = [each.mask for each in load_source(load, "HEAD_DIM", 16).reads]
    assert masks == ["there & (d < HEAD_DIM) & (d < 12)", "there & (d < HEAD_DIM) & (d >= 12)"]


@pytest.mark.parametrize(
    ("expression", "dtype", "why"),
    [
        (element("x", B, H, KV, D), "float64", "float64 is no dtype of numbers"),
        (sympy.Function("g")(element("x", B, H, KV, D)), "int8", "no Triton form of g"),
        (element("x", B, H, KV + sympy.Symbol("s0"), D), "int8", "s0 is no variable"),
    ],
)
def test_what_has_no_triton_form_is_told(expression: sympy.Expr, dtype: str, why: str) -> None:
    load = LoadSpec(expression, (Stored("x", dtype, (None,) * 4),))
    with pytest.raises(Unprintable, match=why):
        load_source(load, "HEAD_DIM", 16)
