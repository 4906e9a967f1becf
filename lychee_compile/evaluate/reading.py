"""One question asked of a model that has read its document: densely, or through the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lychee_compile.boundaries import BoundaryTable
from lychee_compile.evaluate.models import LanguageModel, fork
from lychee_compile.evaluate.task_texts import Question
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import CacheWrite
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.runtime.cache_registry import registry

TOKEN_DIM = 2
"""Of the keys in a cache of transformers, [B, Hkv, L, D]."""


@dataclass(frozen=True)
class Encoded:
    """A question's token ids, int64 [T] each."""

    document: Tensor
    question: Tensor
    answer: Tensor

    @property
    def decoded(self) -> Tensor:
        """The tokens that are decoded: the last of the answer is predicted, not read."""
        return torch.cat((self.question, self.answer[:-1]))


@dataclass(frozen=True)
class Reading:
    """What the model made of a question and its answer, given the right tokens up to each."""

    predicted: Tensor
    """The likeliest token at each place of the answer, int64 [A]."""
    expected: Tensor
    """The answer, int64 [A]."""
    log_likelihood: float
    """Of the whole answer."""
    log_probs: Tensor
    """float32 [T, vocabulary], of the token after each one decoded."""

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives the answer: its choices are these until it errs."""
        return torch.equal(self.predicted, self.expected)

    def agreement(self, other: Reading) -> float:
        """Share of the answer's places where both find the same token likeliest."""
        return (self.predicted == other.predicted).double().mean().item()

    def divergence(self, other: Reading) -> float:
        """Mean Kullback-Leibler divergence from `other` over question and answer, in nats."""
        p, q = other.log_probs, self.log_probs
        return (p.exp() * (p - q)).sum(-1).mean().item()


def encode(question: Question, model: LanguageModel) -> Encoded:
    """The tokens of a question; a token that spans question and answer counts to the answer."""
    document = model.encode(question.document)
    asked = model.encode(question.question, special=False)
    whole = model.encode(question.question + question.answer, special=False)
    same = 0
    while same < min(len(asked), len(whole) - 1) and asked[same] == whole[same]:
        same += 1
    return Encoded(document, whole[:same], whole[same:])


@torch.no_grad()
def read_densely(model: LanguageModel, cache: Any, encoded: Encoded) -> Reading:
    """Question and answer in one dense pass over the document in `cache`, which stays as it is."""
    tokens = encoded.decoded[None].to(model.device)
    logits = model.model(tokens, past_key_values=fork(cache)).logits[0]
    return _reading(logits, encoded)


@torch.no_grad()
def read_sparsely(
    forward: Callable[..., Any],
    model: LanguageModel,
    cache: Any,
    encoded: Encoded,
    config: IndexConfig,
) -> Reading:
    """Question and answer decoded token by token through the compiled `forward`.

    `config` is that of the options it was compiled with; `cache` stays as it is.
    """
    note_document(cache, encoded.document, config, model.boundaries)
    branch = fork(cache)
    logits = [
        forward(token[None, None].to(model.device), past_key_values=branch).logits[0]
        for token in encoded.decoded
    ]
    return _reading(torch.cat(logits), encoded)


def note_document(cache: Any, token_ids: Tensor, config: IndexConfig, table: BoundaryTable) -> None:
    """Do for a cache that was filled eagerly what a prefill through the backend does.

    It notes which boundaries the tokens make; an eager prefill shows them to nobody.
    """
    for layer in cache.layers:
        keys = layer.keys
        if keys is None or keys.dim() != 4 or keys.shape[TOKEN_DIM] != len(token_ids):
            continue  # a sliding window, or a layer without keys
        entry = registry.acquire(keys, config, TOKEN_DIM, lambda: ReferenceCacheIndex(config))
        owner = entry.owner
        assert isinstance(owner, ReferenceCacheIndex)
        owner.strength_of = table.lookup
        slots = torch.arange(len(token_ids), device=keys.device)[None]
        strengths = table.lookup(token_ids[None].to(keys.device))
        first = torch.zeros(1, dtype=torch.int64, device=keys.device)
        write = CacheWrite(first, slots, strengths)
        owner.index_for(keys).update(keys, write, build=False)
        registry.release(keys, config, entry, TOKEN_DIM)


def _reading(logits: Tensor, encoded: Encoded) -> Reading:
    """`logits` [T, vocabulary] follow each decoded token."""
    log_probs = logits.float().log_softmax(-1)
    answer = encoded.answer.to(logits.device)
    of_answer = log_probs[-len(answer) :]
    likelihood = of_answer.gather(-1, answer[:, None]).sum().item()
    return Reading(of_answer.argmax(-1).cpu(), encoded.answer, likelihood, log_probs)
