"""Likelihoods of given tokens by `generate()`, which is forced to choose them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Forced(LogitsProcessor):
    """Logits processor that makes greedy decoding choose the tokens `forced`, int64 [N]."""

    def __init__(self, prompt_length: int, forced: Tensor) -> None:
        self._prompt_length = prompt_length
        self._forced = forced

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, float [1, vocabulary], that allow the next forced token alone."""
        step = input_ids.shape[1] - self._prompt_length
        return torch.full_like(scores, -torch.inf).index_fill_(1, self._forced[step : step + 1], 0)


def forced_logits(model: Any, prompt: Tensor, forced: Tensor, **settings: Any) -> Tensor:
    """Return the logits [N, vocabulary] before each of the tokens `forced`, int64 [N].

    `prompt` is int64 [1, L]; its last token and the forced ones but the last go through single
    decoding steps, if the model was prepared with a cut prompt. `settings` are those of
    `generate()`, such as a cache with a part of the prompt.
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
        **settings,
    )
    return torch.cat(output.logits)
