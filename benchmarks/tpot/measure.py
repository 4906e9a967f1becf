"""Time per token of one way to decode, at one context length and batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from benchmarks.common.llama_model import llama_config
from benchmarks.common.status import FAILED, SKIPPED
from benchmarks.tpot.records import Record
from benchmarks.tpot.ways import WAYS, Way
from lychee_compile import backend, torch_private
from lychee_compile.cli.bench.filled_cache import filled_cache
from lychee_compile.cli.bench.steps import greedy_step, seconds_per_step
from lychee_compile.passes.lower import kernel_modules

STEPS = 16
"""Number of steps of a round."""
ROOM = 256
"""Number of slots of a cache that are empty at first."""
SPARE = 6 << 30
"""Bytes that a model's activations, CUDA graphs and the index of its first layers may take."""


def llama(layers: int, hidden: int, device: torch.device) -> Any:
    """Return a Llama with random weights, bfloat16 on a GPU and float32 elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return LlamaForCausalLM(llama_config(layers, hidden)).eval()
    finally:
        torch.set_default_dtype(before)


def measure(model: Any, name: str, batch: int, context: int, budget: int) -> Record:
    """Return the record of one cell; an error becomes a record, too."""
    way, record = WAYS[name], Record(name, batch, context)
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info()[0], _cache_bytes(model, batch, context)
        if needed + SPARE > free:
            record.status, record.note = SKIPPED, f"a cache of {needed / 1e9:.0f} GB does not fit"
            return record
        torch.cuda.reset_peak_memory_stats()
    try:
        _measure(model, way, record, budget)
    except Exception as error:  # noqa: BLE001  other cells are still to be measured
        record.status = FAILED
        record.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    if on_gpu:
        record.peak_gigabytes = torch.cuda.max_memory_allocated() / 1e9
    return record


def _measure(model: Any, way: Way, record: Record, budget: int) -> None:
    model.set_attn_implementation(way.attention)
    filled = max(record.context - ROOM, 1)
    cache = filled_cache(model, record.batch, filled, record.context)
    step = greedy_step(model, way.compiled(model.forward, budget), cache)
    token = torch.ones(record.batch, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        with _timed_compilation() as spent:
            started = time.perf_counter()
            token = step(token)
            record.first_step_seconds = time.perf_counter() - started
        record.inductor_seconds, record.lychee_seconds = spent["inductor"], spent["lychee"]
        record.kernel_seconds = spent["kernels"]
        record.milliseconds = 1e3 * seconds_per_step(step, token, STEPS)
    record.graph_skips = counters["inductor"]["cudagraph_skips"]
    record.sites = {
        kind: counters["lychee"][kind]
        for kind in ("sparse", "exact", "kept")
        if counters["lychee"][kind]
    }


@contextmanager
def _timed_compilation() -> Iterator[dict[str, float]]:
    """Yield the seconds spent in Inductor, in our backend around it, and in trying kernels."""
    spent = {"inductor": 0.0, "lychee": 0.0, "kernels": 0.0}

    def timed(owner: Any, name: str, kind: str) -> Any:
        call = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            started, before = time.perf_counter(), spent["inductor"]
            result = call(*args, **kwargs)
            spent[kind] += time.perf_counter() - started
            if kind == "lychee":
                spent[kind] -= spent["inductor"] - before
            return result

        return patch.object(owner, name, run)

    with (
        timed(torch_private, "inductor", "inductor"),
        timed(backend, "analyse", "lychee"),
        timed(backend, "_compile_rewritten", "lychee"),
        timed(kernel_modules, "try_kernels", "kernels"),
    ):
        yield spent


def _cache_bytes(model: Any, batch: int, context: int) -> int:
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * batch * context * model.dtype.itemsize
