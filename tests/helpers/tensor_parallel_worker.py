"""Work of each of two processes in the tests of tensor parallelism: decode, and say what it saw.

The processes meet in a file, so that no port is taken.
"""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

RANKS = 2
PROMPT, STEPS, SLOTS = 200, 4, 256
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 8, 4, 8
SMALL_BUDGET = {"budget": 64, "sinks": 4, "recent": 16, "chunk": (4, 8), "boundaries": "fixed"}
EVERYTHING = {**SMALL_BUDGET, "budget": SLOTS - 1}
LONGEST_RUN = 200  # seconds

Outcome = dict[str, Any]
Step = Callable[[Tensor], Tensor]


def run_on_ranks(task: str, folder: Path) -> list[Outcome]:
    """Run a task of this file in as many processes as there are ranks; what each came to.

    Once for each folder, whoever asks for it.
    """
    kept = [folder / f"{task}_{rank}.pt" for rank in range(RANKS)]
    with locked(folder):
        if not all(path.exists() for path in kept):
            _run(task, folder)
    return [torch.load(path) for path in kept]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(task: str, folder: Path) -> None:
    context = torch.multiprocessing.spawn(_rank, (task, folder), nprocs=RANKS, join=False)
    try:
        deadline = time.monotonic() + LONGEST_RUN
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{task} takes more than {LONGEST_RUN} s"
    finally:
        for process in context.processes:
            process.kill()


def _rank(rank: int, task: str, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / task}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    try:
        with torch.no_grad():
            outcome = TASKS[task](folder)
        torch.save(outcome, folder / f"{task}_{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def prompt() -> Tensor:
    return torch.randint(0, 128, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def greedy(prefill: Step, step: Step) -> tuple[Tensor, Tensor]:
    """Return tokens [STEPS] and logits [STEPS, vocabulary]: the prompt at once, then one by one."""
    logits = prefill(prompt())[0, -1]
    tokens, seen = [], []
    for _ in range(STEPS):
        logits = step(logits.argmax().view(1, 1))[0, -1]
        tokens.append(logits.argmax())
        seen.append(logits)
    return torch.stack(tokens), torch.stack(seen)


def decode_llama(model: Any, forward: Callable[..., Any], kind: str) -> tuple[Tensor, Tensor]:
    """Decode greedily over a cache of transformers, after an eager prefill."""
    from cache_names import CACHE
    from transformers import DynamicCache, StaticCache

    static = kind == "static"
    cache = StaticCache(model.config, max_cache_len=SLOTS) if static else DynamicCache()
    return greedy(
        lambda ids: model(ids, **{CACHE: cache}).logits,
        lambda ids: forward(ids, **{CACHE: cache}).logits,
    )


def compile_for(kind: str, model: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    """Compile `model` so that one graph serves a dynamic cache from the first step on."""
    dynamic = True if kind == "dynamic" else None
    return torch.compile(model, backend="lychee", options=options, dynamic=dynamic)


def _observed(decode: Callable[[], tuple[Tensor, Tensor]]) -> Outcome:
    """Return what decoding gave, what the backend said of it and how many keys each head read."""
    import lychee_compile

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with lychee_compile.record() as recorder:
        tokens, logits = decode()
    sites = [site for report in lychee_compile.reports() for site in report.sites]
    return {
        "tokens": tokens,
        "logits": logits,
        "counted": dict(torch._dynamo.utils.counters["lychee"]),
        "decisions": {site.decision for site in sites},
        "heads": {(site.query_heads, site.kv_heads) for site in sites},
        "calls": len(recorder.calls),
        "most_read": max((int(call.tokens_read.max()) for call in recorder.calls), default=0),
        "heads_read": {call.tokens_read.shape[1] for call in recorder.calls},
    }


def _without_inductor() -> Callable[[], None]:
    """Compile by AOTAutograd alone, as the fixture of this name does; call what is given to end."""
    from torch._dynamo.backends.debugging import aot_eager

    from lychee_compile import torch_private

    inductor = torch_private.inductor
    torch_private.inductor = lambda gm, inputs, mode, patches: aot_eager(gm, list(inputs))

    def end() -> None:
        torch_private.inductor = inductor

    return end


def sharded_llama(folder: Path, inductor: bool = False) -> dict[str, Outcome]:
    """Decode with a saved model over every kind of cache, sharded by the plan of transformers."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto", tp_size=RANKS)
    model = LlamaForCausalLM.from_pretrained(
        folder, distributed_config=plan, dtype=torch.float32
    ).eval()

    def outcome(kind: str, options: dict[str, Any]) -> Outcome:
        compiled = compile_for(kind, model, options)
        return _observed(lambda: decode_llama(model, compiled, kind))

    end = _without_inductor() if not inductor else lambda: None
    outcomes = {
        "dynamic": outcome("dynamic", EVERYTHING),
        "static, small budget": outcome("static", SMALL_BUDGET),
        "dynamic, small budget": outcome("dynamic", SMALL_BUDGET),
        "static": outcome("static", EVERYTHING),
    }
    compiled = compile_for("static", model, EVERYTHING)  # it is: as long as nothing was reset
    outcomes["collectives"] = {
        "eager": _collectives_of_a_step(model, model),
        "lychee": _collectives_of_a_step(model, compiled),
    }
    end()
    return outcomes


def inductors_llama(folder: Path) -> dict[str, Outcome]:
    """Decode as `sharded_llama` does, but through Inductor."""
    return sharded_llama(folder, inductor=True)


def _collectives_of_a_step(model: Any, forward: Callable[..., Any]) -> Counter[str]:
    """Return how often each collective of gloo runs in a decoding step."""
    from cache_names import CACHE
    from torch.profiler import ProfilerActivity, profile
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=SLOTS)
    model(prompt(), **{CACHE: cache})
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        forward(torch.zeros(1, 1, dtype=torch.int64), **{CACHE: cache})
    names = [event.name for event in seen.events() or ()]
    return Counter(name for name in names if name.startswith("gloo:"))


class Attention(nn.Module):
    """One attention and its residual over a static cache; `reduce` sums what ranks computed."""

    def __init__(self, reduce: Callable[[Tensor], Tensor] = lambda partial: partial) -> None:
        super().__init__()
        self.words = nn.Embedding(128, WIDTH)
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 128, bias=False)
        self.reduce = reduce

    def forward(self, ids: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return logits [B, T, 128] of `ids` [B, T] at `positions` [T], over [B, heads, L, D]."""
        x = self.words(ids)
        q, k, v = (
            project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        visible = torch.arange(keys.shape[2]) <= positions[:, None]
        read = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
        return self.head(x + self.reduce(self.output(read.transpose(1, 2).flatten(2))))


def decode_attention(
    model: nn.Module, forward: Callable[..., Tensor], heads: int
) -> tuple[Tensor, Tensor]:
    """Decode greedily with `Attention` over caches of `heads` heads."""
    keys, values = (torch.zeros(1, heads, SLOTS, HEAD_DIM) for _ in range(2))
    at = 0

    def step(call: Callable[..., Tensor]) -> Step:
        def run(ids: Tensor) -> Tensor:
            nonlocal at
            positions = torch.arange(at, at + ids.shape[1])
            at += ids.shape[1]
            return call(ids, positions, keys, values)

        return run

    return greedy(step(model), step(forward))


def seeded_attention(reduce: Callable[[Tensor], Tensor] = lambda partial: partial) -> Attention:
    """Return an attention with the same weights in every process."""
    torch.manual_seed(0)
    return Attention(reduce)


def _slice_by_hand(model: Attention) -> Attention:
    """Keep this rank's heads: rows of the first projections, columns of the last."""
    rank = dist.get_rank()
    for layer, dim in [(model.query, 0), (model.key, 0), (model.value, 0), (model.output, 1)]:
        layer.weight = nn.Parameter(layer.weight.chunk(RANKS, dim)[rank].contiguous())
    return model


def _functional_reduce(partial: Tensor) -> Tensor:
    return funcol.all_reduce(partial, "sum", dist.group.WORLD)


def _reduce_in_place(partial: Tensor) -> Tensor:
    dist.all_reduce(partial)
    return partial


def _parallelized(model: Attention) -> nn.Module:
    """PyTorch's own tensor parallelism: parameters are DTensors."""
    columns, rows = ColwiseParallel, RowwiseParallel
    plan = {"query": columns(), "key": columns(), "value": columns(), "output": rows()}
    return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)


def sharded_attention(folder: Path) -> dict[str, Outcome]:
    """Decode with an attention by hand, sharded in each way people do that."""
    models = {
        "functional all_reduce": _slice_by_hand(seeded_attention(_functional_reduce)),
        "all_reduce in place": _slice_by_hand(seeded_attention(_reduce_in_place)),
        "parallelize_module": _parallelized(seeded_attention()),
    }
    end = _without_inductor()
    outcomes = {}
    for name, model in models.items():
        for budget, options in {"": EVERYTHING, ", small budget": SMALL_BUDGET}.items():

            def decode(model: nn.Module = model, options: Any = options) -> tuple[Tensor, Tensor]:
                compiled = torch.compile(model, backend="lychee", options=options)
                return decode_attention(model, compiled, KV_HEADS // RANKS)

            outcomes[name + budget] = _observed(decode)
    end()
    return outcomes


TASKS: dict[str, Callable[[Path], dict[str, Outcome]]] = {
    "sharded_llama": sharded_llama,
    "inductors_llama": inductors_llama,
    "sharded_attention": sharded_attention,
}
