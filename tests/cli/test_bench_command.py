"""`bench`: ways to decode side by side, over caches that were filled without a prompt."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

pytest.importorskip("transformers")

from saved_configurations import save_gemma, save_llama
from transformers import AutoConfig

from lychee_compile.__main__ import main
from lychee_compile.cli.bench import measure, memory
from lychee_compile.cli.bench.filled_cache import filled_cache
from lychee_compile.cli.bench.whole_buffer import attend_to_all
from lychee_compile.cli.caches import cache_bytes
from lychee_compile.cli.configurations import new_model
from lychee_compile.evaluate.cache_argument import cache_argument

CPU = torch.device("cpu")


def bench(folder, arguments):
    given = ["--random-weights", "--device", "cpu", *shlex.split(arguments)]
    return main(["bench", str(folder), *given])


@pytest.mark.usefixtures("uncompiled_graphs")
def test_dense_and_sparse_decoding_are_measured_in_one_run(tmp_path, capsys):
    folder = save_llama(tmp_path, layers=2)
    ways = "--ways eager,lychee --new-tokens 3 --budget 90"
    assert bench(folder, f"--context 160 --batch 2 {ways} --json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["random_weights"]
    assert "not a prompt" in content["cache"]
    cells = {(cell["way"], cell["context"]): cell for cell in content["cells"]}
    assert set(cells) == {(way, n) for way in ("eager", "lychee") for n in (160,)}
    for (way, context), cell in cells.items():
        assert (cell["status"], cell["batch"]) == ("measured", 2), cell["note"]
        assert cell["milliseconds"] > 0
        assert cell["tokens_per_second"] == pytest.approx(2000 / cell["milliseconds"])
        assert cell["cache_bytes"] == 2 * 2 * 2 * 2 * 8 * 4 * context
        assert cell["attentions"] == ({"sparse": 2} if way == "lychee" else {})


def test_what_cannot_run_is_one_line_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    folder = save_gemma(tmp_path, layers=2)
    monkeypatch.setattr(
        measure, "free_bytes", lambda _: 2 * memory.cache_bytes(new_gemma(folder), 1, 160)
    )
    assert bench(folder, "--context 160 --batch 1,8 --ways eager,flash --new-tokens 3") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "eager, batch 8, context 160: skipped: a cache of" in shown
    assert "flash, batch 1, context 160: skipped: its attention has a window" in shown
    assert "eager, batch 1, context 160" in shown
    assert "/s skipped" in shown


def new_gemma(folder):
    return new_model(AutoConfig.from_pretrained(folder), torch.float32, CPU)


def test_running_out_of_memory_is_told(tmp_path, capsys, monkeypatch):
    def too_large(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't "
                           "allocate memory: you tried to allocate 1 bytes.")  # fmt: skip

    monkeypatch.setattr(measure, "filled_cache", too_large)
    folder = save_llama(tmp_path, layers=2)
    assert bench(folder, "--context 160 --ways eager --new-tokens 3") == 0
    assert "eager, batch 1, context 160: skipped: out of memory" in capsys.readouterr().out


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("save", [save_llama, save_gemma])
def test_a_filled_cache_looks_like_one_after_a_prompt(save, tmp_path):
    config = AutoConfig.from_pretrained(save(tmp_path))
    model = new_model(config, torch.float32, CPU)
    cache = filled_cache(model, 2, 120, 128)
    expected = memory.cache_bytes(model, 2, 128)
    assert sum(map(cache_bytes, cache.layers)) == expected
    argument = cache_argument(model)
    for layer in cache.layers:
        assert int(layer.cumulative_length) == 120
        assert layer.keys.std() > 0
    before = cache.layers[0].keys.clone()
    token = torch.ones(2, 1, dtype=torch.int64)
    logits = model(token, **{argument: cache}).logits
    assert logits.isfinite().all()
    changed = (cache.layers[0].keys != before).any(-1).any(0).any(0)
    assert changed.sum() == 1 if save is save_llama else changed.any()


def test_attention_over_a_whole_buffer_is_dense_attention():
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    output, _ = attend_to_all(torch.nn.Identity(), query, key, value, None, scaling=0.3)
    wide = [each.repeat_interleave(2, 1) for each in (key, value)]
    weights = (0.3 * query @ wide[0].mT).softmax(-1)
    torch.testing.assert_close(output, (weights @ wide[1]).transpose(1, 2))
    with pytest.raises(NotImplementedError, match="a window, a soft-cap or a bias"):
        attend_to_all(torch.nn.Identity(), query, key, value, None, sliding_window=4)
