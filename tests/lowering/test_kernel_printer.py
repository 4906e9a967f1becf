"""Printed expressions, run by Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import sympy
import torch
from hypothesis import given, settings
from printed_terms import (
    CAPTURED,
    HEADS,
    KEYS,
    PRODUCTS,
    QUERIES,
    SIZES,
    TENSORS,
    bools,
    floats,
    ints,
)
from sympy import Eq, Indexed, IndexedBase, floor

from lychee_compile.codegen.printer import Unprintable, print_expression
from lychee_compile.codegen.specification import KV, KV_LEN, B, Captured, H, Q, S
from lychee_compile.kernels.gpu.common.module_cache import load, store
from lychee_compile.passes.symbolic.elementwise import Flag

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEVERAL = settings(max_examples=25) if DEVICE == "cuda" else settings()  # compiling takes time

PARAMETERS = [
    name
    for each in CAPTURED.values()
    for name in (each.name, *(f"{each.name}_stride_{dim}" for dim in range(each.rank)))
]
KERNEL = f"""import triton
import triton.language as tl


@triton.jit
def evaluate(
    products, output, kv_len,
    {", ".join(PARAMETERS)},
):
    b, q = tl.program_id(0), tl.program_id(1)
    h = tl.minimum(tl.arange(0, 4), {HEADS - 1})[:, None]
    kv = tl.arange(0, 8)[None, :]
    inside = kv < kv_len
    place = ((b * {HEADS} + h) * {QUERIES} + q) * kv_len + kv
    s = tl.load(products + place, mask=inside, other=0)
    tl.store(output + place, EXPRESSION, mask=inside)
"""


@pytest.fixture(scope="module", autouse=True)
def interpreted(tmp_path_factory):
    """Kernels decorated meanwhile run without a GPU, from a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYCHEE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def run(expression, dtype):
    """Evaluate a printed expression at all [B, H, Q, KV]."""
    text = print_expression(expression, CAPTURED, mask="inside")
    module = load(store(KERNEL.replace("EXPRESSION", text), "expression").stem)
    output = torch.empty(SIZES, dtype=dtype, device=DEVICE)
    tensors = [tensor.to(DEVICE) for tensor in TENSORS.values()]
    arguments = [each for tensor in tensors for each in (tensor, *tensor.stride())]
    module.evaluate[SIZES[0], QUERIES](PRODUCTS.to(DEVICE), output, KEYS, *arguments)
    return output.cpu()


@SEVERAL
@given(ints())
def test_integers_are_exact(term):
    assert torch.equal(run(term.expression, torch.int64), term.value), term.expression


@SEVERAL
@given(bools())
def test_truth_values(term):
    assert torch.equal(run(term.expression, torch.int64).bool(), term.value), term.expression


@SEVERAL
@given(floats())
def test_numbers(term):
    result = run(term.expression, torch.float32).double()
    torch.testing.assert_close(result, term.value.double(), rtol=0, atol=8 * term.error)


@pytest.mark.parametrize("number", [0.1, -1e-30, 3.4028234663852886e38, 1 / 3, 1e30])
def test_floats_survive_the_trip(number):
    expected = torch.tensor(number, dtype=torch.float32).expand(SIZES)
    assert torch.equal(run(sympy.Float(number), torch.float32), expected)
    assert float(print_expression(sympy.Float(number), {})) == number


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_the_ends_of_a_softcap():
    result = run(30 * sympy.tanh(S * 1000), torch.float32)
    assert torch.equal(result[PRODUCTS != 0], 30 * PRODUCTS[PRODUCTS != 0].sign())


@pytest.mark.parametrize(
    "expression", [(KV + 100_000 - Q) ** 2, KV * 10**9, (KV + 50_000) * (H + 50_000)]
)
def test_products_of_positions_do_not_overflow(expression):
    exact = sympy.lambdify((H, Q, KV), expression, "math")
    _, h, q, kv = torch.meshgrid(*(torch.arange(size) for size in SIZES), indexing="ij")
    assert torch.equal(run(expression, torch.int64), exact(h, q, kv))


def element(name, *indices):
    return Indexed(IndexedBase(name), *indices)


MASKED = "mask=inside, other=0"
READABLE = {
    sympy.Le(KV, Q + element("counts", B)): "kv <= q + tl.load(counts + b * counts_stride_0)",
    30 * sympy.tanh(S / 240): "30 * (1 - 2 / (tl.exp(s / 120) + 1))",
    S * 0.125: "0.125 * s",
    S / sympy.sqrt(80): "0.11180339887498948 * s",
    -S: "-s",
    Q - KV: "q - kv",
    3 * KV - 1: "3 * kv - 1",
    1 / (1 + sympy.exp(-S)): "1 / (1 + tl.exp(-s))",
    S**2 / 3: "(s * s) / 3",
    floor((Q + KV) / 16): "(kv + q) // 16",
    2 * floor(KV / 16) + S: "s + 2 * (kv // 16)",
    floor((Q - KV) / 16): "(q - kv - ((q - kv) % 16 + 16) % 16) // 16",
    sympy.Mod(KV, 8): "kv % 8",
    sympy.Mod(KV - Q, 8): "((kv - q) % 8 + 8) % 8",
    sympy.Max(Q - KV_LEN, 0): "tl.maximum(q - kv_len, 0)",
    Eq(KV, Q) | (KV < 3) & (Q > 4): "((q > 4) & (kv < 3)) | (kv == q)",
    ~Flag(element("flags", B, KV)): (
        f"~(tl.load(flags + b * flags_stride_0 + kv * flags_stride_1, {MASKED}) != 0)"
    ),
    Flag(sympy.Symbol("taken")): "tl.load(taken) != 0",
    element("half", 0, 1): "tl.load(half + half_stride_1).to(tl.float32)",
    element("table", H, sympy.Mod(KV - Q, 5)): (
        f"tl.load(table + h * table_stride_0 + (((kv - q) % 5 + 5) % 5) * table_stride_1, {MASKED})"
    ),
    S * sympy.Symbol("one"): "tl.load(one) * s",
    S - (Q - KV) * 2 ** (-H): "s - tl.exp2(tl.cast(-h, tl.float32)) * (q - kv)",
    sympy.Piecewise((S, KV <= Q), (-sympy.oo, True)): 'tl.where(kv <= q, s, float("-inf"))',
    sympy.Float(1e39): 'float("inf")',
    sympy.true: "True",
}


@pytest.mark.parametrize(("expression", "text"), READABLE.items(), ids=map(str, READABLE))
def test_text_is_readable(expression, text):
    assert print_expression(expression, CAPTURED, mask="inside") == text


def test_without_a_mask_nothing_is_masked():
    assert "mask" not in print_expression(element("brain", KV), CAPTURED)


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        (sympy.Function("score")(S), "score"),
        (sympy.erf(S), "erf"),
        (S ** sympy.Rational(1, 3), r"s\*\*\(1/3\)"),
        (sympy.Symbol("h_kv") + S, "h_kv"),
        (sympy.Symbol("kv") + S, "kv"),
        (element("unknown", KV), r"unknown\[kv\]"),
        (element("table", H), "table has 2 dimensions"),
        (element("brain", KV - Q), r"index kv - q of brain\[kv - q\]: it may be negative"),
        (element("brain", element("ids", B, KV)), r"index ids\[b, kv\]"),
        (element("brain", S), "index s"),
        (element("strange", KV), "strange is of complex64, not of bool, float16"),
        (sympy.Equivalent(KV < Q, H < 1), "Equivalent"),
        (sympy.I * S, "I is no real number"),
        (KV + sympy.nan, "nan"),
        (KV + 2**70, "64 bits"),
    ],
)
def test_what_has_no_form_is_named(expression, named):
    captured = CAPTURED | {"strange": Captured("strange", "complex64", 1)}
    with pytest.raises(Unprintable, match=named):
        print_expression(expression, captured)


def test_text_is_the_same_in_every_process():
    lines = """
import sympy
from lychee_compile.codegen.printer import print_expression
from lychee_compile.codegen.specification import KV, B, H, Q, S
low = sympy.Max(KV - Q, B, H, S, 3) + sympy.Min(B, Q, S) * H * S
seen = sympy.Xor(KV < Q, B < 1) | (KV <= H) & (Q <= 3) & sympy.Ne(KV, B)
print(print_expression(sympy.Piecewise((low, seen), (S, True)), {}))
"""
    printed = {
        subprocess.run(
            [sys.executable, "-c", lines],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(printed) == 1
