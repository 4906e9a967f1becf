"""Attentions for which generated kernels run, those for which none do, and the reports on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import DIM, GROUP, KV_HEADS, SIZE, SMALL, Cache, compiled, decode
from tiny_models import LAYERS, VOCABULARY, StaticKV, TinyDecoder
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.codegen import module
from lychee_compile.kernels.gpu import trial_run
from lychee_compile.passes import reasons
from lychee_compile.passes.lower import kernel_modules, kernel_support
from lychee_compile.passes.site import Site

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


def operands(
    query_len: int = 1, dim: int = DIM, value_dim: int = DIM, group: int = GROUP, size: int = SIZE
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and value cache that the graph only reads."""
    query = torch.randn(1, KV_HEADS * group, query_len, dim)
    return query, torch.randn(1, KV_HEADS, size, dim), torch.randn(1, KV_HEADS, size, value_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **given)


def only_site(function: Any, *inputs: Any, atol: float = 1e-5, **options: Any) -> Site:
    """Return the site of one attention, after checking that its first step is exact."""
    expected = function(*(each.clone() for each in inputs))
    got = compiled(function, **options)(*inputs)
    torch.testing.assert_close(got, expected, atol=atol, rtol=atol)
    (site,) = lychee_compile.reports()[-1].sites
    assert counters["lychee"][site.decision] == counters["lychee"]["found"] == 1
    return site


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"budget": None}, "budget=None asks for exact attention"),
        ({"policy": "oracle", "dense_layers": 0}, "no GPU kernel supports policy='oracle'"),
        (
            {"policy": "hisa", "epsilon": 0.1, "dense_layers": 0},
            "policy='hisa' leaves unread, so that nothing proves epsilon=0.1; set epsilon=None or",
        ),
    ],
)
def test_what_is_not_to_be_sparse_runs_an_exact_kernel(
    options: dict[str, Any], reason: str
) -> None:
    site = only_site(attend, *operands(3), **options)
    assert site.decision == "exact"
    assert reason in str(site.reason)
    assert site.kernel.startswith("decode_exact_f32_g2_d16_")


@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [
        (operands(dim=20), "decode_exact_f32_g2_d20_v16_"),
        (operands(dim=20, value_dim=20), "decode_exact_f32_g2_d20_"),
    ],
)
def test_keys_that_cannot_be_sketched_are_read_exactly(inputs: Any, kernel: str) -> None:
    site = only_site(attend, *inputs)
    assert site.decision == "exact"
    assert site.reason == reasons.HEAD_NOT_A_MULTIPLE(size=20, multiple=8)
    assert site.kernel.startswith(kernel)


def rolling(query: Tensor, keys: Tensor, values: Tensor, key: Tensor) -> Tensor:
    """Return a cache that keeps a window: every key changes its slot."""
    moved = keys.roll(-1, 2)
    moved[:, :, -1:] = key
    keys.copy_(moved)
    return attend(query, keys, values)


def test_a_rolling_cache_is_read_exactly() -> None:
    query, keys, values = operands()
    site = only_site(rolling, query, keys, values, torch.randn(1, KV_HEADS, 1, DIM))
    assert (site.decision, site.cache) == ("exact", "sliding")
    assert site.reason == reasons.CACHE_ROLLS()


def overwrite(slots: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a step that writes a token at the slot that `slots` works out of its position."""

    def step(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, new: Tensor) -> Tensor:
        slot = slots(position)
        keys.index_copy_(2, slot, new)
        values.index_copy_(2, slot, new)
        return attend(query, keys, values)

    return step


@pytest.mark.parametrize(
    ("slots", "operator"),
    [
        (lambda position: position % SIZE, "a remainder"),
        (lambda position: torch.fmod(position, SIZE - 4) + 4, "a remainder"),
        (
            lambda position: torch.where(position < 4, position, 4 + (position - 4) % (SIZE - 4)),
            "a choice between positions",
        ),
        (
            lambda position: torch.where(position < SIZE, position, position - SIZE),
            "a choice between positions",
        ),
        (lambda position: position, None),
        (lambda position: torch.where(position % 2 == 0, position, SIZE - 1), None),
        (lambda position: position.clamp(max=SIZE - 1) - 1, None),
    ],
)
def test_a_cache_that_may_wrap_is_read_exactly(
    slots: Callable[[Tensor], Tensor], operator: str | None
) -> None:
    inputs = (*operands(), torch.tensor([SIZE - 2]), torch.randn(1, KV_HEADS, 1, DIM))
    site = only_site(overwrite(slots), *inputs)
    if operator is None:
        assert site.decision == "sparse"
    else:
        assert site.decision == "exact"
        assert site.reason == reasons.CACHE_MAY_WRAP(operator=operator)


def test_many_tokens_written_for_few_queries_are_no_decoding() -> None:
    cache = Cache()
    new = cache.fresh(40), torch.randn(1, KV_HEADS, 40, SIZE)
    query, positions = torch.randn(1, KV_HEADS * GROUP, 1, DIM), torch.arange(40)

    def last(query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        keys.index_copy_(2, rest[0], rest[1])
        values.index_copy_(2, rest[0], rest[2])
        return attend(query, keys, values)

    site = only_site(last, query, cache.keys, cache.values, positions, *new)
    assert site.decision == "exact"
    assert site.reason == reasons.MANY_TOKENS_WRITTEN(count=40, limit=16)
    torch._dynamo.reset()
    counters.clear()
    for each in (positions, *new):
        torch._dynamo.mark_dynamic(each, 0 if each is positions else 2)
    symbolic = only_site(last, query, cache.keys, cache.values, positions, *new)
    assert symbolic.reason is not None
    assert symbolic.reason.code == reasons.SIZE_SYMBOLIC.code


def kept(function: Any, *inputs: Any, **options: Any) -> Site:
    site = only_site(function, *inputs, **options)
    assert (site.decision, counters["lychee"]["kept"]) == ("kept", 1)
    assert "scaled_dot_product_attention" in site.kernel
    return site


def mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return queries in a wider dtype than keys, as is seldom written."""
    scores = query.float() @ key.repeat_interleave(GROUP, 1).float().mT * DIM**-0.5
    return scores.softmax(-1) @ value.repeat_interleave(GROUP, 1)


def test_what_no_kernel_is_for_stays_as_it_is_with_the_reason() -> None:
    query, key, value = operands()
    site = only_site(mixed, query, key.half(), value, atol=1e-3)
    assert site.decision == "kept"
    assert "keys are torch.float16 and queries torch.float32" in str(site.reason)
    torch._dynamo.reset()
    counters.clear()
    too_large = kept(attend, *operands(value_dim=264))
    assert too_large.reason == reasons.HEAD_TOO_LARGE(name="value", size=264, limit=256)


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        (operands(17), {}, "a query length of 17 is a prefill"),
        (operands(), {"budget": SIZE}, "is within the budget"),
        (operands(size=5), {}, "within the budget"),
        (operands(5, size=5), {"budget": None}, "budget=None"),
    ],
)
def test_what_decodes_nothing_long_stays_as_it_is_by_design(
    inputs: Any, options: dict[str, Any], reason: str
) -> None:
    site = kept(attend, *inputs, **options)
    assert reason in str(site.reason)
    assert site.by_design


def test_the_reference_runs_where_it_is_asked_for() -> None:
    site = only_site(attend, *operands(), reference=True, budget=SIZE - 1, atol=10)
    assert (site.decision, site.kernel) == ("sparse", "lychee::sparse_attention (reference)")


def test_without_triton_attention_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_support.no_kernels_on.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(kernel_support, "find_spec", lambda name: None)
        assert kept(attend, *operands()).reason == reasons.NO_TRITON()
    kernel_support.no_kernels_on.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 5), None, "compute capability 7.5, and kernels need 8.0"),
        ((9, 4), "6.2", "written for NVIDIA GPUs"),
        ((8, 0), None, None),
    ],
)
def test_old_and_other_gpus_have_no_kernels(
    capability: tuple[int, int],
    hip: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_support.no_kernels_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = kernel_support.no_kernels_on(torch.device("cuda", 0))
    kernel_support.no_kernels_on.cache_clear()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("stage", ["emit", "store", "run"])
def test_a_kernel_that_cannot_be_made_leaves_the_attention_as_it_was(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise ZeroDivisionError("a bug of ours\nand a lot of text")

    kernel_modules._stored.cache_clear()
    trial_run._tried.clear()
    place, name = {
        "emit": (kernel_modules, "emit_module"),
        "store": (kernel_modules, "store"),
        "run": (trial_run, "run_exact"),
    }[stage]
    monkeypatch.setattr(place, name, broken)
    if stage == "run":
        monkeypatch.setattr(trial_run, "new_index", broken)
    site = kept(attend, *operands())
    assert site.reason is not None
    assert site.reason.words.endswith("ZeroDivisionError: a bug of ours")
    assert site.reason.code == "kernel-failed"
    assert not site.by_design
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a bug of ours"):
        compiled(attend, strict=True)(*operands())
    kernel_modules._stored.cache_clear()


def test_where_only_the_sparse_kernel_fails_the_exact_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("out of shared memory")

    trial_run._tried.clear()
    monkeypatch.setattr(trial_run, "new_index", broken)
    site = only_site(attend, *operands())
    assert (site.decision, site.kernel[:13]) == ("exact", "decode_exact_")
    error = "RuntimeError: out of shared memory"
    assert site.reason == reasons.KERNEL_FAILED(kind="sparse", error=error)


def test_a_trial_that_found_no_memory_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError

    trial_run._tried.clear()
    with monkeypatch.context() as patched:
        patched.setattr(trial_run, "new_index", full)
        site = only_site(attend, *operands())
    assert site.decision == "sparse"


def test_a_prefill_of_unknown_length_stays_as_it_is() -> None:
    step = compiled()
    for length in (20, 30):
        cache = Cache()
        torch.testing.assert_close(*cache.step(step, length), atol=1e-5, rtol=1e-5)
    (site,) = lychee_compile.reports()[-1].sites
    assert not isinstance(site.query_len, int)
    assert (site.decision, site.by_design) == ("kept", True)
    assert site.reason == reasons.QUERY_LEN_SYMBOLIC(query_len=site.query_len)


def test_explain_names_the_kernel_and_its_source_can_be_read(tmp_path: Any) -> None:
    model, ids = TinyDecoder().eval(), torch.randint(0, VOCABULARY, (1, 1))
    cache = StaticKV.empty(1, SIZE)
    report = lychee_compile.explain(model, ids, cache=cache, options=SMALL, kernels=True)
    kernels = {site.kernel for site in report.sites}
    assert [site.decision for site in report.sites] == ["sparse"] * LAYERS
    (kernel,) = kernels  # layers that are alike share it
    assert kernel.startswith("decode_lychee_f32_g2_d8_b40_")
    sources = report.sources()
    assert set(sources) == kernels
    assert "def attend(" in sources[kernel]
    assert sources[kernel] == module.emit_module(_spec_of(kernel))
    assert kernel in str(report)
    page = report.to_html(tmp_path / "report.html").read_text()
    assert f"<summary><code>{kernel}</code></summary>" in page
    assert "def attend(" in page


def _spec_of(kernel: str) -> Any:
    """Return the specification that a kernel was generated from."""
    import sympy

    from lychee_compile.codegen.specification import KV, AttentionSpec, Captured, S, SparseSpec
    from lychee_compile.kernels.levels.groups import GroupSettings

    length = sympy.Symbol("given_length", integer=True)
    groups = GroupSettings(chunk=SMALL["chunk"], sinks=SMALL["sinks"])
    chosen = SparseSpec("lychee", 40, 4, 16, 16, 65536, groups=groups)
    visible = sympy.Le(KV, length)
    return AttentionSpec(
        "float32", 2, 8, 8, 8**-0.5 * S, visible, (Captured("given_length", "int64", 0),),
        sparse=chosen,
    )  # fmt: skip


def test_a_report_without_kernels_has_no_sources() -> None:
    report = lychee_compile.explain(decode, *_prefill())
    assert report.sources() == {}


def _prefill() -> tuple[Any, ...]:
    cache = Cache()
    query = torch.randn(1, KV_HEADS * GROUP, 30, DIM)
    values = torch.randn(1, KV_HEADS, 30, SIZE)
    return query, cache.keys, cache.values, torch.arange(30), cache.fresh(30), values
