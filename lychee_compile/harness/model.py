"""The model `lychee` of lm-evaluation-harness: a transformers model, prepared for this backend."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is not usable here ({error}): pip install 'lychee_compile[lm-eval]'"
    ) from error
from tqdm import tqdm

from lychee_compile.generation.prepare import prepare
from lychee_compile.generation.settings import OWN
from lychee_compile.harness.forced import forced_logits
from lychee_compile.options import OptionError, Options

QUESTION_TOKENS = 64
"""Number of tokens at the end of a context that are decoded sparsely, unless the user says more."""
_OF_HARNESS = ("mode", "tokenizer")
"""Options of the backend whose names lm-evaluation-harness takes for itself, or does not need."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Text of context and continuation, and the tokens of both."""


@register_model("lychee")
class LycheeLM(HFLM):
    """A causal language model whose generations and likelihoods are decoded sparsely.

    `model_args` are those of the model `hf`, all options of the backend but `mode` and `tokenizer`,
    those of `prepare`, and:

    - `question_tokens`: the last tokens of a context, which are decoded one by one like the
      continuation. The tokens before them are the document. It is read densely, or sparsely with
      `prefill=sparse`.

    Rows are decoded one at a time. Raises `OptionError` for a wrong option and for another batch
    size than 1.
    """

    def __init__(
        self,
        pretrained: Any,
        question_tokens: int = QUESTION_TOKENS,
        batch_size: int | str | None = 1,
        **arguments: Any,
    ) -> None:
        if str(batch_size or 1) != "1":
            raise OptionError(
                f"batch_size={batch_size}: the model lychee decodes one row at a time"
            )
        if question_tokens < 0:
            raise OptionError(f"question_tokens={question_tokens}: at least 0 is needed")
        own = {each.name for each in fields(Options)} - {*_OF_HARNESS} | {*OWN}
        options = {name: arguments.pop(name) for name in own & {*arguments}}
        super().__init__(pretrained, backend="causal", batch_size=1, **arguments)
        self._question_tokens = question_tokens
        self.prepared = prepare(self.model, **options)
        """The model with its `generate()`; `restore()` gives the plain one back."""

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,  # noqa: ARG002  as the method of the class
    ) -> list[tuple[float, bool]]:
        """Return for each request the continuation's log-likelihood, and if it is greedy."""
        answers = []
        for text, context, continuation in tqdm(
            requests, disable=disable_tqdm or self.rank != 0, desc="Decoding continuations"
        ):
            answers.append(self._likelihood(context, continuation))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[-1])
        return answers

    @torch.no_grad()
    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Decode the end of a context and a continuation token by token."""
        text = [*context, *continuation][-(self.max_length + 1) :]
        asked = min(self._question_tokens, max(len(text) - len(continuation) - 1, 0))
        ids = torch.tensor(text, device=self.device)
        document, forced = ids[: -len(continuation) - asked], ids[-len(continuation) - asked :]
        logits = forced_logits(self.model, document[None], forced)[asked:]
        return _score(logits, forced[asked:])


def _score(logits: Tensor, tokens: Tensor) -> tuple[float, bool]:
    """Return the log-likelihood of tokens [N] under logits [N, vocabulary], and if it is greedy."""
    shares = logits.float().log_softmax(-1)
    chosen = shares.gather(1, tokens[:, None])
    return float(chosen.sum()), bool((shares.argmax(-1) == tokens).all())
