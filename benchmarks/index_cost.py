"""Costs of a cache's index: its memory, building it after a prefill, following each step.

    python -m benchmarks.index_cost [--contexts 32k 128k] [--budget 1024] [--json PATH]

One layer of Llama-3.1-8B's shape, batch 1, bfloat16. The prefill is that of the layer with dense,
causal SDPA. A step is the layer's products with its weights and its sparse attention, each in a
CUDA graph. Following a step costs the time by which sketching the newest key prolongs that
attention, and a share of fitting the newest block anew, which happens whenever its keys have
doubled. `--device cpu --contexts 512 --hidden 512` tries the benchmark out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import LlamaModel

from benchmarks.common.decode_kernels import sketch_module, sketch_step
from benchmarks.common.lengths import length_name, positive, tokens
from benchmarks.common.llama_model import llama_config
from benchmarks.common.problem import Inputs, Problem, make_inputs
from benchmarks.common.provenance import device_name, provenance, write_json
from benchmarks.common.terminal import make_console
from benchmarks.common.timing import milliseconds, time_calls
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout

BUFFERS, SECONDS = 6, 0.15
"""Caches that calls rotate through, and the time of one measurement in seconds."""


@dataclass(frozen=True)
class Cost:
    """Costs of the index of one layer's keys."""

    context: int
    memory: float
    """Bytes of the index over those of keys and values."""
    prefill: float
    """Milliseconds of the layer's dense prefill."""
    build: float
    """Milliseconds to index the keys of that prefill."""
    step: float
    """Microseconds of the layer's step of decoding."""
    sketch: float
    """Microseconds of a step that sketching the newest key takes; noise may make it negative."""
    refit: float
    """Microseconds to fit the newest block anew."""
    refits: int
    """Number of refits while a block fills."""
    block: int
    """Tokens of a block."""

    @property
    def build_share(self) -> float:
        """Time to build the index, as a share of the prefill."""
        return self.build / self.prefill

    @property
    def update_share(self) -> float:
        """Time to follow one key, as a share of a step."""
        return (self.sketch + self.refit * self.refits / self.block) / self.step


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and show all lengths."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(arguments)
    device, console = torch.device(chosen.device), make_console()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaModel(llama_config(1, chosen.hidden)).to(device, dtype).eval()
    costs = []
    for context in chosen.contexts:
        with console.status(length_name(context)):
            costs.append(measure(model, context, chosen.budget, device, dtype))
    console.print(device_name(device), table_of(costs))
    if chosen.json:
        content = provenance("benchmarks.index_cost", arguments, device)
        write_json(chosen.json, content | {"costs": [asdict(each) for each in costs]})


def measure(
    model: LlamaModel, context: int, budget: int, device: torch.device, dtype: torch.dtype
) -> Cost:
    """Return all costs at one length."""
    ids = torch.randint(model.config.vocab_size, (1, context), device=device)
    prefill = milliseconds(lambda: model(ids, use_cache=False))
    buffers = layer_inputs(model, context, device, dtype)
    first = buffers[0]
    module = sketch_module(first.query, first.key, first.value, budget)
    indexes = [SketchIndex(SketchLayout.over(each.key), device) for each in buffers]
    build = milliseconds(partial(indexes[0].build, module, first.key, [context]))
    for index, each in zip(indexes[1:], buffers[1:], strict=True):
        index.build(module, each.key, [context])
    refit = milliseconds(partial(indexes[0].refit, module, first.key, [context]))

    def attention(writes: bool) -> float:
        return microseconds(
            [
                sketch_step(module, index, each.query, each.key, each.value, writes)
                for index, each in zip(indexes, buffers, strict=True)
            ],
            device,
        )

    sparse = attention(writes=True)
    products = microseconds([partial(layer_products, model, hidden(model))], device)
    return Cost(
        context,
        memory=indexes[0].layout.size / cache_bytes(first),
        prefill=prefill,
        build=build,
        step=products + sparse,
        sketch=sparse - attention(writes=False),
        refit=1e3 * refit,
        refits=refits_of_a_block(indexes[0]),
        block=indexes[0].layout.block,
    )


def layer_inputs(
    model: LlamaModel, context: int, device: torch.device, dtype: torch.dtype
) -> list[Inputs]:
    """Return the buffers that calls rotate through, in the shape of the model's attention."""
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    problem = Problem(1, context, *heads, dtype)
    return [make_inputs(problem, device, seed) for seed in range(BUFFERS)]


def refits_of_a_block(index: SketchIndex) -> int:
    """Return how often a block is fitted while tokens come one by one."""
    size = index.layout.block
    end, count = size, 0
    while (end := end + index.refit_after(end)) <= 2 * size:
        count += 1
    return count


def cache_bytes(inputs: Inputs) -> int:
    """Return the bytes of keys and values."""
    return sum(each.numel() * each.element_size() for each in (inputs.key, inputs.value))


def hidden(model: LlamaModel) -> Tensor:
    """Return a random input of a layer for one token, [1, hidden size]."""
    weight = model.embed_tokens.weight
    return torch.randn(1, weight.shape[1], dtype=weight.dtype, device=weight.device)


def layer_products(model: LlamaModel, token: Tensor) -> Tensor:
    """Compute the products of one token with the weights of the layer."""
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    query = attention.q_proj(token)
    attention.k_proj(token)
    attention.v_proj(token)
    return mlp(attention.o_proj(query))


def microseconds(calls: Sequence[Any], device: torch.device) -> float:
    """Return the microseconds of one call, while `calls` run in turn."""
    return time_calls(calls, device, SECONDS)[0].microseconds


def table_of(costs: Sequence[Cost]) -> Table:
    """Return a table with one row for each length."""
    table = Table(
        "context", "memory / KV", "prefill, ms", "build, ms", "share", "step, us", "sketch, us",
        "refit, us", "share", title="The index of one layer",
    )  # fmt: skip
    for each in costs:
        table.add_row(
            length_name(each.context), f"{each.memory:.1%}", f"{each.prefill:,.1f}",
            f"{each.build:.1f}", f"{each.build_share:.1%}", f"{each.step:.1f}",
            f"{each.sketch:.2f}", f"{each.refit:,.0f}", f"{each.update_share:.1%}",
        )  # fmt: skip
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contexts", type=tokens, nargs="+", default=[32768, 131072], metavar="N")
    add("--budget", type=tokens, default=1024, help="tokens that a step reads; 1024 by default")
    add("--hidden", type=positive, default=4096, help="hidden size, 4096 by default")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--json", type=Path, metavar="PATH", help="write what was measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
