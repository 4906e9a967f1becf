"""Time per token of one way to decode, at one context length and batch."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, StaticCache

from benchmarks.common.llama_model import filled_cache, llama_config
from benchmarks.tpot.records import FAILED, SKIPPED, Record
from benchmarks.tpot.ways import WAYS, Way
from lychee_compile import backend, torch_private
from lychee_compile.passes.lower import kernel_modules

WARM_UP, STEPS, ROUNDS = 8, 16, 5
ROOM = 256
"""Slots of a cache that are empty at first."""
SPARE = 6 << 30
"""Bytes that a model's activations, CUDA graphs and the index of its first layers may take."""


def llama(layers: int, hidden: int, device: torch.device) -> Any:
    """Random weights, bfloat16 on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return LlamaForCausalLM(llama_config(layers, hidden)).eval()
    finally:
        torch.set_default_dtype(before)


def measure(model: Any, name: str, batch: int, context: int, budget: int) -> Record:
    """One record; whatever goes wrong is a record, too."""
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
    held = max(record.context - ROOM, 1)
    cache = filled_cache(model, record.batch, held, record.context)
    forward = way.compiled(model.forward, budget)
    token = torch.ones(record.batch, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        with _timed_compilation() as spent:
            started = time.perf_counter()
            token = _step(forward, cache, token)
            record.first_step_seconds = time.perf_counter() - started
        record.inductor_seconds, record.lychee_seconds = spent["inductor"], spent["lychee"]
        record.kernel_seconds = spent["kernels"]
        for _ in range(WARM_UP):
            token = _step(forward, cache, token)
        times = []
        for _ in range(ROUNDS):
            _synchronise(token)
            started = time.perf_counter()
            for _ in range(STEPS):
                token = _step(forward, cache, token)
            _synchronise(token)
            times.append((time.perf_counter() - started) / STEPS)
    record.milliseconds = 1e3 * statistics.median(times)
    record.graph_skips = counters["inductor"]["cudagraph_skips"]
    record.sites = {
        kind: counters["lychee"][kind]
        for kind in ("sparse", "exact", "kept")
        if counters["lychee"][kind]
    }


def _step(forward: Callable[..., Any], cache: StaticCache, token: Tensor) -> Tensor:
    """The next token, greedily; nothing waits for it."""
    logits = forward(token, past_key_values=cache, use_cache=True).logits
    return logits[:, -1:].argmax(-1).clone()


@contextmanager
def _timed_compilation() -> Iterator[dict[str, float]]:
    """Seconds spent in Inductor, in our backend around it, and of these in trying kernels."""
    spent = {"inductor": 0.0, "lychee": 0.0, "kernels": 0.0}

    def timed(owner: Any, name: str, kind: str) -> Any:
        call = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            started, before = time.perf_counter(), spent["inductor"]
            made = call(*args, **kwargs)
            spent[kind] += time.perf_counter() - started
            if kind == "lychee":
                spent[kind] -= spent["inductor"] - before
            return made

        return patch.object(owner, name, run)

    with (
        timed(torch_private, "inductor", "inductor"),
        timed(backend, "analyse", "lychee"),
        timed(backend, "run", "lychee"),
        timed(kernel_modules, "try_kernels", "kernels"),
    ):
        yield spent


def _cache_bytes(model: Any, batch: int, context: int) -> int:
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * batch * context * model.dtype.itemsize


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
