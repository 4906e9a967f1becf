"""transformers' generate(), sparse from the second token on: two arguments, no other change.

    python examples/generate_llama.py
    python examples/generate_llama.py --model DIR --context 4000 --budget 1024

The model is a small random Llama, or any causal language model that transformers saved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from showing import Decoded, console, decoder_options, show_decoded
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    logging,
)

import lychee_compile


def random_llama(context: int) -> tuple[PreTrainedModel, Tensor]:
    """Two layers of grouped-query attention, and a prompt of `context` random tokens."""
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
    """A model of yours, and the first `context` tokens of a text."""
    text = "\n".join(topics.values())  # of Python's language reference
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    return AutoModelForCausalLM.from_pretrained(folder), ids.input_ids[:, :context]


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Decoded:
    """Generate twice; the tokens of both, and what was read."""
    parser = decoder_options(__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model that transformers saved")
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if given.model is None:
        model, ids = random_llama(given.context)
    else:
        model, ids = saved_model(given.model, given.context)
    model, ids = model.eval().to(given.device), ids.to(given.device)
    greedy = {"max_new_tokens": given.new_tokens, "do_sample": False, "eos_token_id": None}

    dense = model.generate(ids, **greedy)

    # On a GPU "mode": "reduce-overhead" among the options puts each step into a CUDA graph.
    options = {"budget": given.budget, "reference": given.reference}
    config = CompileConfig(backend="lychee", mode=None, options=options)
    config._compile_all_devices = True  # generate() compiles on accelerators alone, unless asked
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = model.generate(ids, **greedy, cache_implementation="static", compile_config=config)

    new = slice(ids.shape[1], None)
    decoded = Decoded(dense[:, new], sparse[:, new], recorder.calls, lychee_compile.reports())
    show_decoded(console(), decoded)
    return decoded


if __name__ == "__main__":
    main(sys.argv[1:])
