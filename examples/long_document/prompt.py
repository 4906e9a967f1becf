"""Token ids of what the model reads and is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from examples.long_document.task import Task


@dataclass(frozen=True)
class Prompt:
    """Token ids of a document and of a question, int64 [1, tokens] each."""

    document: torch.Tensor
    question: torch.Tensor
    fact: range | None = None
    """Positions of the planted fact in `document`; None if no fact was planted."""

    def to(self, device: str) -> Prompt:
        """Return the same prompt on another device."""
        return Prompt(self.document.to(device), self.question.to(device), self.fact)


def encode(task: Task, tokenizer: Any) -> Prompt:
    """Return the tokens of `task`."""

    def ids(text: str, special: bool = True) -> torch.Tensor:
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special)
        return torch.as_tensor(encoded.input_ids)

    fact: range | None = None
    if task.fact_start is not None:
        start = ids(task.document[: task.fact_start]).shape[1]
        rest = task.document[task.fact_start :].partition("\n\n")[0]
        fact = range(start, start + ids(rest, special=False).shape[1])
    return Prompt(ids(task.document), ids(task.question, special=False), fact)
