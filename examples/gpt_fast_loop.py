"""gpt-fast's loop: prefill, then one compiled function per token over the model's own cache.

    python examples/gpt_fast_loop.py

`models/gpt_fast.py` holds the model: buffers that `positions` says where to write, key heads
repeated for the query heads, a row of a precomputed mask. All that changes is `backend=`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from models.gpt_fast import VOCABULARY, WIDTH, Transformer
from showing import Decoded, console, decoder_options, show_decoded
from torch import Tensor

import lychee_compile

Step = Callable[[Transformer, Tensor, Tensor], Tensor]


def decode_one_token(model: Transformer, token: Tensor, position: Tensor) -> Tensor:
    """The likeliest token, [B, 1], after `token` [B, 1] at `position` [1]."""
    return model(token, position)[:, -1:].argmax(-1)


def generate(model: Transformer, prompt: Tensor, count: int, step: Step) -> Tensor:
    """The next `count` tokens, int64 [B, count]."""
    position = torch.arange(prompt.shape[1], device=prompt.device)
    tokens = [decode_one_token(model, prompt, position)]  # the prefill, uncompiled
    position = position[-1:] + 1
    for _ in range(count - 1):
        tokens.append(step(model, tokens[-1], position))
        position = position + 1
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Decoded:
    """Generate twice; the tokens of both, and what was read."""
    given = decoder_options(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    model = Transformer(layers=2).eval().to(given.device)
    for layer in model.layers:  # random queries attend to all alike, as trained ones do not
        layer.attention.query_key_value.weight[:WIDTH] *= 12
    model.setup_caches(1, given.context + given.new_tokens)
    prompt = torch.randint(VOCABULARY, (1, given.context), device=given.device)

    dense = generate(model, prompt, given.new_tokens, decode_one_token)

    # On a GPU "mode": "reduce-overhead" among the options puts each step into a CUDA graph.
    options = {"budget": given.budget, "reference": given.reference}
    compiled = torch.compile(decode_one_token, backend="lychee", fullgraph=True, options=options)
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = generate(model, prompt, given.new_tokens, compiled)

    decoded = Decoded(dense, sparse, recorder.calls, lychee_compile.reports())
    show_decoded(console(), decoded)
    return decoded


if __name__ == "__main__":
    main(sys.argv[1:])
