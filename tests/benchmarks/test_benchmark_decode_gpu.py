"""The benchmark of one decode attention on a GPU: all of it that a CPU can run."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.common import memory, timing
from benchmarks.common import problem as problems
from benchmarks.common.lengths import length_name, tokens
from benchmarks.common.memory import Bandwidth
from benchmarks.common.problem import Problem
from benchmarks.common.status import FAILED, SKIPPED, UNAVAILABLE
from benchmarks.common.timing import Timing
from benchmarks.decode import baselines, gpu, measure, options, ours, plot, table
from benchmarks.decode.records import Record, Report
from benchmarks.decode.variants import FORCED, VARIANTS, Variant

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")
SETUP = measure.Setup(CPU, budget=16, most_buffers=3, seconds=0.001)
BASELINES = [variant for variant in VARIANTS if variant.forms is not None]
LLAMA = Problem(1, 131072, 32, 8, 128, torch.bfloat16)


def small(batch=2, heads=4, kv_heads=2, context=200, dtype=torch.float32):
    return Problem(batch, context, heads, kv_heads, 16, dtype)


def parse(line):
    return options.parse(["--device", "cpu", *line.split()], "A benchmark.")


# Options


def test_defaults_are_the_shape_of_llama_8b():
    chosen = parse("")
    shape = [getattr(chosen, name) for name in options.SHAPE]
    assert shape == [32, 8, 128, "bfloat16", 1024]
    assert chosen.variants == [each.name for each in VARIANTS if each.name not in FORCED]
    on_gpu = options.CONTEXTS["cuda"]
    assert [length_name(each) for each in on_gpu] == [
        "8k", "16k", "32k", "64k", "128k", "256k", "512k",
    ]  # fmt: skip


def test_lengths_may_end_in_k():
    chosen = parse("--contexts 1k 1000 2K --budget 2k --batches 3")
    assert (chosen.contexts, chosen.budget, chosen.batches) == ([1024, 1000, 2048], 2048, [3])


def test_quick_is_less_of_everything_but_what_is_asked_for():
    usual, quick = parse(""), parse("--quick")
    assert len(quick.contexts) < len(usual.contexts)
    assert quick.seconds < usual.seconds
    assert parse("--quick --batches 7 --seconds 2").batches == [7]
    assert parse("--quick --seconds 2").seconds == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--heads 10 --kv-heads 4", ["--heads 10", "--kv-heads 4"]),
        ("--contexts 8x", ["--contexts", "'8x'"]),
        ("--contexts 0k", ["--contexts", "'0k'"]),
        ("--batches 0", ["--batches", "'0'"]),
        ("--seconds -1", ["--seconds", "'-1'"]),
        ("--seconds nan", ["--seconds", "'nan'"]),
        ("--variants flash", ["--variants", "flash", "sdpa-flash"]),
        ("--dtype float8", ["--dtype", "float8", "bfloat16"]),
    ],
)
def test_options_that_make_no_sense(line, words, capsys):
    with pytest.raises(SystemExit):
        parse(line)
    message = capsys.readouterr().err
    assert all(word in message for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu" in capsys.readouterr().err


# Inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_spread_and_attention_is_neither_flat_nor_one_token(dtype):
    problem = Problem(2, 4096, 8, 2, 64, dtype)
    inputs = problems.make_inputs(problem, CPU, 0)
    wide = inputs.key.double().repeat_interleave(problem.group, 1)
    scores = inputs.query.double() @ wide.mT / math.sqrt(problem.head_dim)
    assert scores.std(-1).sub(problems.SPREAD).abs().max() < 0.1
    best = scores.softmax(-1).sort(-1, descending=True).values
    assert 0.5 < best[..., :128].sum(-1).mean() < 0.98
    assert best[..., 0].mean() < 0.5


def test_buffers_differ_and_come_again():
    first, again, other = (problems.make_inputs(small(), CPU, seed) for seed in (0, 0, 1))
    for name in ("query", "key", "value"):
        mine = getattr(first, name)
        assert torch.equal(mine, getattr(again, name))
        assert not torch.equal(mine, getattr(other, name))
        assert not torch.equal(mine[0], mine[1])


def test_the_reference_is_attention_in_float64():
    problem = small(batch=3)
    inputs = problems.make_inputs(problem, CPU, 0)
    double = (getattr(inputs, name).double() for name in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(*double, enable_gqa=True)
    rows = problems.checked_rows(problem)
    assert rows == [0, 2]
    exact = problems.reference(inputs, rows)
    torch.testing.assert_close(exact, expected[rows])
    assert problems.relative_error(expected, exact, rows) < 1e-12
    assert problems.relative_error(2 * expected, exact, rows) == pytest.approx(1)
    expected[1] = math.nan
    assert problems.relative_error(expected, exact, rows) < 1e-12
    expected[2] = math.nan
    assert math.isnan(problems.relative_error(expected, exact, rows))


def test_as_many_buffers_as_flush_l2_and_fit():
    count = problems.buffer_count
    l2, free = 50 << 20, 80e9
    assert count(33 << 20, 10 << 20, l2, free, 32) == 20  # 20 x 10 MB are four times 50 MB
    assert count(33 << 20, 10 << 20, l2, free, 8) == 8
    assert count(1 << 30, 1 << 30, l2, free, 32) == 2
    assert count(10**10, 1 << 20, l2, free, 32) == 4  # half of the memory
    assert count(6 * 10**10, 1 << 20, l2, free, 32) == 1
    assert count(8 * 10**10, 1 << 20, l2, free, 32) == 0


# Variants


@pytest.mark.parametrize("variant", BASELINES, ids=lambda variant: variant.name)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_a_baseline_is_exact(variant, heads, dtype):
    problem = small(heads=heads[0], kv_heads=heads[1], dtype=dtype)
    buffers = [problems.make_inputs(problem, CPU, seed) for seed in range(2)]
    forms = variant.prepare(buffers, 16)
    assert forms
    for calls in forms.values():
        for call, inputs in zip(calls, buffers, strict=True):
            exact = problems.reference(inputs, [0, 1])
            error = problems.relative_error(call(), exact, [0, 1])
            assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("forms", ["flex_forms", "masked_forms"])
def test_compiled_baselines_trace_whole_and_anew_for_each_shape(forms, monkeypatch):
    def compiled(attend, _):
        return torch.compile(attend, backend="aot_eager", dynamic=False, fullgraph=True)

    monkeypatch.setattr(baselines, "_compiled", compiled)
    for context in (128, 200, 256):
        buffers = [problems.make_inputs(small(context=context), CPU, seed) for seed in range(3)]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        (calls,) = getattr(baselines, forms)(buffers).values()
        for call, inputs in zip(calls, buffers, strict=True):
            exact = problems.reference(inputs, [0])
            assert problems.relative_error(call(), exact, [0]) < 1e-5
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bytes_read():
    everything = 2 * 131072 * 8 * 128 * 2
    read = {variant.name: variant.bytes_read(LLAMA, 1024) for variant in VARIANTS}
    for name in ("sdpa-flash", "sdpa-gqa", "flex", "sdpa-mask", "lychee-exact"):
        assert read[name] == everything
    attended = 2 * 1024 * 8 * 128 * 2
    assert attended < read["lychee-sparse"] < everything / 8
    assert attended < read["quest"] < everything / 8
    assert ours.bytes_read("lychee-sparse", replace(LLAMA, batch=3), 1024) == (
        3 * read["lychee-sparse"]
    )
    assert ours.bytes_read("quest", LLAMA, 131072) == everything


def test_repeating_heads_takes_memory():
    extra = {variant.name: variant.extra_bytes(LLAMA) for variant in VARIANTS}
    assert extra.pop("sdpa-mask") == 4 * LLAMA.cache_bytes()
    assert set(extra.values()) == {0}


# Measuring


def test_measured_variants():
    records = measure.measure(small(), BASELINES, SETUP)
    assert [record.variant for record in records] == [variant.name for variant in BASELINES]
    for record in records:
        assert record.status == "measured"
        assert record.microseconds == record.timings[record.form].microseconds > 0
        assert record.error < 1e-5
        assert record.bytes_read == small().cache_bytes()
        took = record.timings[record.form]
        assert took.low <= took.microseconds <= took.high
        assert took.replays >= timing.LEAST_REPLAYS


def outcome(forms=None, setup=SETUP, problem=None, **fields):
    """Return the record of a made-up variant beside a baseline, which must not be disturbed."""
    odd = Variant("flex", "odd", forms, **fields)
    record, beside = measure.measure(problem or small(), [odd, BASELINES[1]], setup)
    assert beside.status == "measured"
    return record


def raising(error):
    def call():
        raise error

    return lambda buffers: {"only": [call for _ in buffers]}


def test_what_goes_wrong_is_a_record():
    failed = outcome(raising(ValueError("first line\nsecond")))
    assert (failed.status, failed.note) == (FAILED, "ValueError: first line")
    assert outcome(raising(torch.OutOfMemoryError("no room"))).status == SKIPPED
    assert outcome(raising(NotImplementedError("no operator"))).status == FAILED


@pytest.mark.parametrize("exact", [True, False])
def test_wrong_outputs_have_no_time(exact):
    def forms(value):
        return lambda buffers: {"only": [lambda: value * torch.ones(2, 4, 1, 16)] * len(buffers)}

    lost = outcome(forms(math.nan), exact=exact)
    assert (lost.status, lost.microseconds) == (FAILED, None)
    assert "nan" in lost.note
    assert outcome(forms(1.0), exact=exact).status == (FAILED if exact else "measured")


def test_a_form_that_fails_leaves_the_other():
    def forms(buffers):
        return {
            **raising(RuntimeError("no kernel"))(buffers),
            **baselines.gqa_forms(buffers),
        }

    record = outcome(forms)
    assert (record.status, record.form) == ("measured", "default backend")


def test_the_fastest_form_counts(monkeypatch):
    def timed(calls, device, seconds):
        return calls[0]()

    def forms(buffers):
        exact = problems.reference(buffers[0], [0, 1])
        slow, fast = (Timing(time, time, time, 1, 5) for time in (9.0, 3.0))
        return {"slow": [lambda: (slow, 0 * exact)], "fast": [lambda: (fast, exact)]}

    monkeypatch.setattr(measure, "time_calls", timed)
    (record,) = measure.measure(small(), [Variant("flex", "odd", forms)], SETUP)
    assert (record.form, record.microseconds, record.error) == ("fast", 3.0, 0.0)
    assert set(record.timings) == {"slow", "fast"}


def test_variants_of_ours_that_do_not_exist(monkeypatch):
    def prepare(name, query, key, value, budget):
        raise NotImplementedError(f"{name} has no kernel")

    monkeypatch.setattr(ours, "prepare", prepare)
    record = outcome()
    assert (record.status, record.note) == (UNAVAILABLE, "flex has no kernel")


def test_variants_of_ours_are_given_their_buffers(monkeypatch):
    given = []

    def prepare(name, query, key, value, budget):
        given.append((name, key, budget))
        return lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    monkeypatch.setattr(ours, "prepare", prepare)
    record = outcome(exact=False)
    assert (record.status, record.form) == ("measured", "generated kernels")
    assert [(name, budget) for name, _, budget in given] == [("flex", 16)] * record.buffers
    assert len({key.data_ptr() for _, key, _ in given}) == record.buffers > 1


def test_what_does_not_fit_is_skipped(monkeypatch):
    def leave(size):
        monkeypatch.setattr(measure, "free_bytes", lambda device: size)

    size, masked = small().cache_bytes(), BASELINES[3]
    leave(size)
    for record in measure.measure(small(), BASELINES, SETUP):
        assert (record.status, record.microseconds) == (SKIPPED, None)
        assert "are free" in record.note
    leave(int(1.5 * size))
    flash, copying = measure.measure(small(), [BASELINES[0], masked], SETUP)
    assert (flash.status, copying.status) == ("measured", SKIPPED)
    assert "copies of keys and values" in copying.note


def test_bandwidth_is_of_this_world():
    measured = memory.measure_bandwidth(CPU, 0.01)
    assert 1e7 < measured.read < 1e13
    assert 1e7 < measured.copy < 1e13


# Reports


def fabricated():
    """Return made-up times: two batches, three contexts, one variant missing, one too large."""
    report = Report(
        device="A GPU",
        device_bytes=80 * 10**9,
        l2_bytes=50 << 20,
        versions={"torch": "2.11.0", "triton": "3.6.0"},
        commit="0123456789ab",
        command="python -m benchmarks.decode.gpu",
        shape={"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "budget": 1024},
        bandwidth=Bandwidth(read=3e12, copy=2.8e12),
    )
    for batch in (1, 16):
        for context in (8192, 131072, 1000):
            dense = 4096 * batch * context
            flash = Timing(dense / 2e6, dense / 3e6, dense / 1e6, 20, 100)
            report.records += [
                Record("sdpa-flash", batch, context, form="enable_gqa",
                       microseconds=flash.microseconds, timings={"enable_gqa": flash},
                       bytes_read=dense, error=2.5e-3, buffers=6, l2_passes=4.0),
                Record("sdpa-mask", batch, context, SKIPPED, "copies are 1 GB"),
                Record("lychee-sparse", batch, context, microseconds=10.0, bytes_read=3 * 10**6,
                       error=0.05, buffers=3, l2_passes=1.5),
                Record("quest", batch, context, UNAVAILABLE, "no kernel"),
            ]  # fmt: skip
    return report


def printed(renderable):
    console = Console(width=160, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_speedups_and_shares():
    report = fabricated()
    sparse = report.find("lychee-sparse", 1, 131072)
    flash = 4096 * 131072 / 2e6
    assert report.speedup(sparse, ["sdpa-flash", "sdpa-mask"]) == pytest.approx(flash / 10)
    assert report.speedup(sparse, ["sdpa-mask"]) is None
    report.records.append(Record("sdpa-gqa", 1, 131072, microseconds=20.0))
    assert report.speedup(sparse, ["sdpa-flash", "sdpa-gqa"]) == 2.0
    assert report.find("lychee-sparse", 2, 131072) is None
    assert sparse.share(report.bandwidth) == pytest.approx(0.1)
    assert report.find("quest", 1, 131072).share(report.bandwidth) is None
    assert (report.batches, report.contexts) == ([1, 16], [1000, 8192, 131072])


def test_tables():
    lines = printed(table.tables(fabricated(), 1)).splitlines()
    times, readings = [line.split() for line in lines if line.strip().startswith("128k")]
    missing = ["does", "not", "fit"]
    absent = ["not", "available"]
    assert times == ["128k", "268.4", "1.00x", *missing, "~10.0", "26.84x", *absent]
    assert readings == ["128k", "537", "67%", "2.5e-03", *missing, "3.0", "10%", "5.0e-02", *absent]
    text = "\n".join(lines)
    assert "Batch 1:" in text
    assert "sdpa + mask, repeat_kv does not fit: copies are 1 GB (8k, 128k, 1,000)" in text
    assert "quest (ours) not available: no kernel (8k, 128k, 1,000)" in text
    assert "~ lychee sparse" in text
    assert "~ sdpa flash" not in text
    order = [line.split()[0] for line in lines if line.strip()[:1].isdigit()]
    assert order == ["1,000", "8k", "128k"] * 2


def test_the_heading_names_device_and_versions():
    text = table.heading(fabricated())
    for words in ("A GPU", "torch 2.11.0", "triton 3.6.0", "0123456789ab", "3,000 GB/s", "1,024"):
        assert words in text


def test_the_plot_has_two_panels_a_batch(tmp_path):
    pytest.importorskip("matplotlib")
    report = fabricated()
    figure = plot.draw(report)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["sdpa flash", "lychee sparse"]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    times, faster = figure.axes[0].lines[1], figure.axes[2].lines[1]
    assert list(times.get_xdata()) == [1000, 8192, 131072]
    assert list(times.get_ydata()) == [10.0] * 3
    expected = [4096 * context / 2e6 / 10 for context in (1000, 8192, 131072)]
    assert list(faster.get_ydata()) == pytest.approx(expected)
    path = tmp_path / "made" / "decode.png"
    plot.save_plot(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    report = fabricated()
    report.records = [each for each in report.records if each.variant == "quest"]
    plot.save_plot(report, tmp_path / "none.svg")
    assert (tmp_path / "none.svg").exists()


def test_json_holds_everything(tmp_path):
    report, path = fabricated(), tmp_path / "made" / "decode.json"
    report.save(path)
    read = json.loads(path.read_text())
    assert (read["device"], read["commit"], read["shape"]["budget"]) == (
        "A GPU", "0123456789ab", 1024,
    )  # fmt: skip
    assert read["bandwidth"] == {"read": 3e12, "copy": 2.8e12}
    first, skipped, sparse = read["records"][:3]
    assert first["timings"]["enable_gqa"]["replays"] == 100
    assert (skipped["status"], skipped["microseconds"]) == (SKIPPED, None)
    assert sparse["bandwidth_share"] == pytest.approx(0.1)


def test_lengths_have_names():
    names = [length_name(length) for length in (1000, 1024, 1536, 524288)]
    assert names == ["1,000", "1k", "1,536", "512k"]


# The command


@pytest.mark.thorough
def test_the_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def prepare(name, query, key, value, budget):
        raise NotImplementedError(f"{name} has no kernel here")

    monkeypatch.setattr(ours, "prepare", prepare)
    line = ["--device", "cpu", "--contexts", "64", "100", "--batches", "2", "--seconds", "0.001"]
    line += ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--buffers", "2"]
    written = ["--json", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png")]
    assert gpu.main(line + written) == 0
    text = capsys.readouterr().out
    assert "4 query heads, 2 KV heads, head_dim 16, bfloat16" in text
    assert "quest (ours) not available: quest has no kernel here (64, 100)" in text
    made = json.loads((tmp_path / "d.json").read_text())
    assert made["command"].startswith("python -m benchmarks.decode.gpu --device cpu --contexts 64")
    assert made["versions"]["torch"] == torch.__version__
    statuses = {(record["variant"], record["status"]) for record in made["records"]}
    usual = [each for each in VARIANTS if each.name not in FORCED]
    assert statuses == {(each.name, "measured" if each.forms else UNAVAILABLE) for each in usual}
    assert (tmp_path / "d.png").stat().st_size > 10_000


def test_a_failure_is_the_exit_status(monkeypatch, capsys):
    def prepare(name, query, key, value, budget):
        raise ValueError("a bug")

    monkeypatch.setattr(ours, "prepare", prepare)
    line = "--device cpu --contexts 64 --batches 1 --heads 2 --kv-heads 1 --head-dim 16"
    assert gpu.main([*line.split(), "--variants", "sdpa-gqa", "quest"]) == 1
    assert "quest (ours) failed: ValueError: a bug (64)" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "number"), [("8192", 8192), ("32k", 32768), ("2M", 2097152)])
def test_lengths_are_read_as_people_write_them(text: str, number: int) -> None:
    assert tokens(text) == number
