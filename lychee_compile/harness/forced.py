"""Likelihoods of given tokens by `generate()`, which is forced to choose them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lychee_compile.generation.forced import Forced


def forced_logits(model: Any, prompt: Tensor, forced: Tensor) -> Tensor:
    """Return the logits [N, vocabulary] before each of the tokens `forced`, int64 [N].

    `prompt` is int64 [1, L]; its last token and the forced ones but the last go through single
    decoding steps, if the model was prepared with a cut prompt.
    """
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(forced),
        do_sample=False,
        eos_token_id=[],  # a forced end of the text ends nothing
        pad_token_id=0,
        logits_processor=[Forced(prompt.shape[1], forced)],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(output.logits)
