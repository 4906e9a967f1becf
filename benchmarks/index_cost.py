"""What the index of a cache costs: its memory, to build it after a prefill, to follow each step.

    python -m benchmarks.index_cost [--contexts 32k 128k] [--budget 1024] [--json PATH]

One layer of Llama-3.1-8B's shape, batch 1, bfloat16. The prefill is that of the layer with dense,
causal SDPA. A step is the layer's products with its weights and its sparse attention, each in a
CUDA graph; following it is what that attention takes longer for the newest key to be sketched, and
a share of fitting the newest block anew, which happens whenever its keys have doubled.
`--device cpu --contexts 512 --hidden 512` tries it out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaModel

from benchmarks.common.llama_model import llama_config
from benchmarks.decode.options import tokens
from benchmarks.decode.ours import sparse_module, sparse_step
from benchmarks.decode.problem import Inputs, Problem, make_inputs
from benchmarks.decode.records import commit, device_name, length_name, versions
from benchmarks.decode.timing import milliseconds, time_calls
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout

BUFFERS, SECONDS = 6, 0.15


@dataclass(frozen=True)
class Cost:
    """Of the index of one layer's keys."""

    context: int
    memory: float
    """Bytes of the index over those of keys and values."""
    prefill: float
    """Milliseconds of the layer's dense prefill."""
    build: float
    """Milliseconds to index what it left."""
    step: float
    """Microseconds of the layer's step of decoding."""
    sketch: float
    """Of these to sketch the newest key: below what can be measured it may be negative."""
    refit: float
    """Microseconds to fit the newest block anew."""
    refits: int
    """How often that happens while a block fills."""
    block: int
    """Tokens of a block."""

    @property
    def build_share(self) -> float:
        """Of the prefill."""
        return self.build / self.prefill

    @property
    def update_share(self) -> float:
        """Of a step."""
        return (self.sketch + self.refit * self.refits / self.block) / self.step


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    """Measure and show all lengths."""
    given = sys.argv[1:] if given is None else given
    chosen = parse(given)
    device = torch.device(chosen.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaModel(llama_config(1, chosen.hidden)).to(device, dtype).eval()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    costs = []
    for context in chosen.contexts:
        with console.status(length_name(context)):
            costs.append(measure(model, context, chosen.budget, device, dtype))
    console.print(device_name(device), table_of(costs))
    if chosen.json:
        save(chosen.json, costs, given, device)


def measure(
    model: LlamaModel, context: int, budget: int, device: torch.device, dtype: torch.dtype
) -> Cost:
    """All costs at one length."""
    ids = torch.randint(model.config.vocab_size, (1, context), device=device)
    prefill = milliseconds(lambda: model(ids, use_cache=False))
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    problem = Problem(1, context, *heads, dtype)
    buffers = [make_inputs(problem, device, seed) for seed in range(BUFFERS)]
    first = buffers[0]
    module = sparse_module(first.query, first.key, first.value, budget)
    indexes = [SketchIndex(SketchLayout.of(each.key), device) for each in buffers]
    build = milliseconds(partial(indexes[0].build, module, first.key, [context]))
    for index, each in zip(indexes[1:], buffers[1:], strict=True):
        index.build(module, each.key, [context])
    refit = milliseconds(partial(indexes[0].refit, module, first.key, [context]))

    def attention(writes: bool) -> float:
        return microseconds(
            [
                sparse_step(module, index, each.query, each.key, each.value, writes)
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


def refits_of_a_block(index: SketchIndex) -> int:
    """How often a block is fitted while tokens come one by one."""
    size = index.layout.block
    end, count = size, 0
    while (end := end + index.refit_after(end)) <= 2 * size:
        count += 1
    return count


def cache_bytes(inputs: Inputs) -> int:
    """Bytes of keys and values."""
    return sum(each.numel() * each.element_size() for each in (inputs.key, inputs.value))


def hidden(model: LlamaModel) -> Tensor:
    """What a layer is given for one token."""
    weight = model.embed_tokens.weight
    return torch.randn(1, weight.shape[1], dtype=weight.dtype, device=weight.device)


def layer_products(model: LlamaModel, token: Tensor) -> Tensor:
    """The products of one token with the weights of the layer."""
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    made = attention.q_proj(token)
    attention.k_proj(token)
    attention.v_proj(token)
    return mlp(attention.o_proj(made))


def microseconds(calls: Sequence[Any], device: torch.device) -> float:
    """Of one call, the calls in turn."""
    return time_calls(calls, device, SECONDS)[0].microseconds


def table_of(costs: Sequence[Cost]) -> Table:
    """One row for each length."""
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


def save(path: Path, costs: Sequence[Cost], given: Sequence[str], device: torch.device) -> None:
    """All that was measured, and with what."""
    made = {
        "device": device_name(device),
        "command": shlex.join(["python", "-m", "benchmarks.index_cost", *given]),
        "commit": commit(),
        "versions": versions(),
        "costs": [asdict(each) for each in costs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def parse(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contexts", type=tokens, nargs="+", default=[32768, 131072], metavar="N")
    add("--budget", type=tokens, default=1024, help="tokens that a step reads; 1024 by default")
    add("--hidden", type=int, default=4096, help="hidden size, 4096 by default")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--json", type=Path, metavar="PATH", help="write what was measured")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
