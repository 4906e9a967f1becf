"""nanoGPT's attention, products and a softmax by hand: a fused prefill, then sparse steps.

    python examples/nanogpt.py

`models/nano_gpt.py` holds the model: a triangular buffer as the mask, and a cache that grows by
concatenation. The prefill becomes one scaled dot-product attention, which makes no score matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from models.nano_gpt import VOCABULARY, NanoGPT, Past
from showing import Decoded, console, decoder_options, show_decoded
from torch import Tensor

import lychee_compile

WIDTH = 64
Forward = Callable[..., tuple[Tensor, Past]]


def generate(forward: Forward, prompt: Tensor, count: int) -> Tensor:
    """The next `count` tokens, int64 [B, count]."""
    logits, past = forward(prompt)
    tokens = [logits.argmax(-1, keepdim=True)]
    while len(tokens) < count:
        logits, past = forward(tokens[-1], past)
        tokens.append(logits.argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Decoded:
    """Generate twice; the tokens of both, and what was read."""
    given = decoder_options(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    model = NanoGPT(layers=2, width=WIDTH, block_size=given.context + given.new_tokens)
    for block in model.blocks:  # random queries attend to all alike, as trained ones do not
        block.attention.query_key_value.weight[:WIDTH] *= 12
    model = model.eval().to(given.device)
    prompt = torch.randint(VOCABULARY, (1, given.context), device=given.device)

    dense = generate(model, prompt, given.new_tokens)

    options = {"budget": given.budget, "reference": given.reference}
    compiled = torch.compile(model, backend="lychee", options=options)
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = generate(compiled, prompt, given.new_tokens)

    decoded = Decoded(dense, sparse, recorder.calls, lychee_compile.reports())
    screen = console()
    show_decoded(screen, decoded)
    error = (compiled(prompt)[0] - model(prompt)[0]).abs().max().item()
    screen.print(f"Prefill, logits: largest difference {error:.1e}")
    return decoded


if __name__ == "__main__":
    main(sys.argv[1:])
