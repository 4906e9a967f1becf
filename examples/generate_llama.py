"""transformers' generate(), made sparse by one line.

    python examples/generate_llama.py
    python examples/generate_llama.py --model DIR --context 4000 --budget 1024

The model is a small random Llama, or any causal language model that transformers saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    logging,
)

import lychee_compile
from lychee_compile.recorder import Recorder
from lychee_compile.report.report import Report


@dataclass
class Generated:
    """Tokens of both runs, int64 [B, tokens], and what the sparse one read."""

    dense: Tensor
    sparse: Tensor
    recorder: Recorder
    reports: list[Report]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--model", type=Path, metavar="DIR", help="a model that transformers saved")
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    add("--context", type=int, default=2000, metavar="N", help="tokens of prompt (%(default)s)")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens to generate (%(default)s)")
    add("--budget", type=int, default=512, metavar="N", help="tokens read per step (%(default)s)")
    add("--reference", action="store_true", help="on a GPU, run the plain operators, not kernels")
    return parser.parse_args(arguments)


def random_llama(context: int) -> tuple[PreTrainedModel, Tensor]:
    """Return two layers of grouped-query attention, and a prompt of `context` random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.normal_()
    for layer in model.model.layers:  # random queries attend to all alike, as trained ones do not
        layer.self_attn.q_proj.weight *= 80
    return model, torch.randint(1000, (1, context))


def saved_model(folder: Path, context: int) -> tuple[PreTrainedModel, Tensor]:
    """Return the model in `folder`, and `context` tokens of Python's language reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids
    return AutoModelForCausalLM.from_pretrained(folder), ids[:, :context]


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Generated:
    """Generate densely and sparsely, and show what was read."""
    chosen = parse(arguments)
    logging.set_verbosity_error()
    if chosen.model is None:
        model, ids = random_llama(chosen.context)
    else:
        model, ids = saved_model(chosen.model, chosen.context)
    model, ids = model.eval().to(chosen.device), ids.to(chosen.device)
    greedy = {"max_new_tokens": chosen.new_tokens, "do_sample": False, "eos_token_id": None}

    dense = model.generate(ids, **greedy)

    # CUDA graphs, the default on a GPU, would hide from the recorder what is read.
    options = {"budget": chosen.budget, "reference": chosen.reference, "mode": "default"}
    lychee_compile.prepare(model, **options)
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = model.generate(ids, **greedy)

    new = slice(ids.shape[1], None)
    result = Generated(dense[:, new], sparse[:, new], recorder, lychee_compile.reports())
    show(result)
    return result


def show(result: Generated) -> None:
    """Print the reports, the tokens, and what each attention read, mean over steps and heads."""
    print(*dict.fromkeys(map(str, result.reports)), sep="\n\n")
    print("\ndense: ", *result.dense[0].tolist())
    print("lychee:", *result.sparse[0].tolist())
    agreeing = (result.dense == result.sparse).long().cumprod(1).sum(1).min()
    print(f"The first {agreeing} of {result.dense.shape[1]} tokens are the same.")
    print(result.recorder)


if __name__ == "__main__":
    main(sys.argv[1:])
