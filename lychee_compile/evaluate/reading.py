"""One question to a model that has read its document: densely, or through the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lychee_compile.boundaries import BoundaryTable
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.evaluate.models import LanguageModel, fork
from lychee_compile.evaluate.task_texts import Question
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import CacheWrite
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.runtime.cache_registry import registry

SLACK = 16
"""Number of tokens that a free answer may have besides twice those of the expected one."""
TOKEN_DIM = 2
"""Axis of the tokens in keys of transformers' caches, [B, Hkv, L, D]."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a document, a question and its answer, int64 [T] each."""

    document: Tensor
    question: Tensor
    answer: Tensor

    @property
    def decoded(self) -> Tensor:
        """Tokens that are decoded; the last of the answer is predicted only."""
        return torch.cat((self.question, self.answer[:-1]))


@dataclass(frozen=True)
class Reading:
    """Predictions for a question and its answer, each after the right tokens before it."""

    predicted: Tensor
    """Likeliest token at each position of the answer, int64 [A]."""
    expected: Tensor
    """Right answer, int64 [A]."""
    log_likelihood: float
    """Log-likelihood of the whole answer."""
    log_probs: Tensor
    """Log-probabilities of the token after each decoded one, float32 [T, vocabulary]."""

    @property
    def exact(self) -> bool:
        """True if greedy decoding gives the answer: its choices are `predicted` until it errs."""
        return torch.equal(self.predicted, self.expected)

    def agreement(self, other: Reading) -> float:
        """Return the share of the answer's positions at which both predict the same token."""
        return (self.predicted == other.predicted).double().mean().item()

    def divergence(self, other: Reading) -> float:
        """Return the mean Kullback-Leibler divergence from `other` over all tokens, in nats."""
        p, q = other.log_probs, self.log_probs
        return (p.exp() * (p - q)).sum(-1).mean().item()


def encode(question: Question, model: LanguageModel) -> Encoded:
    """Return the tokens of a question; a token across its end belongs to the answer."""
    document = model.encode(question.document, special=not question.framed)
    asked = model.encode(question.question, special=False)
    whole = model.encode(question.question + question.answer, special=False)
    same = 0
    while same < min(len(asked), len(whole) - 1) and asked[same] == whole[same]:
        same += 1
    return Encoded(document, whole[:same], whole[same:])


@torch.no_grad()
def read_densely(model: LanguageModel, cache: Any, encoded: Encoded) -> Reading:
    """Read question and answer in one dense pass over the document in `cache`.

    `cache` stays as it is.
    """
    tokens = encoded.decoded[None].to(model.device)
    logits = model.model(tokens, **{cache_argument(model.model): fork(cache)}).logits[0]
    return _reading(logits, encoded)


@torch.no_grad()
def read_sparsely(
    forward: Callable[..., Any],
    model: LanguageModel,
    cache: Any,
    encoded: Encoded,
    config: IndexConfig,
) -> Reading:
    """Decode question and answer token by token through the compiled `forward`.

    `config` is that of the options with which it was compiled; `cache` stays as it is.
    """
    note_document(cache, encoded.document, config, model.boundaries)
    branch = {cache_argument(model.model): fork(cache)}
    logits = [
        forward(token[None, None].to(model.device), **branch).logits[0] for token in encoded.decoded
    ]
    return _reading(torch.cat(logits), encoded)


@torch.no_grad()
def answer_densely(
    model: LanguageModel, cache: Any, encoded: Encoded, wanted: Sequence[str]
) -> str:
    """Return what dense attention answers freely, as `answer_sparsely` does."""
    branch = fork(cache)
    argument = cache_argument(model.model)

    def forward(tokens: Tensor) -> Tensor:
        return model.model(tokens[None], **{argument: branch}).logits[0, -1]

    return _answer(forward, forward(encoded.question.to(model.device)), model, encoded, wanted)


@torch.no_grad()
def answer_sparsely(
    forward: Callable[..., Any],
    model: LanguageModel,
    cache: Any,
    encoded: Encoded,
    config: IndexConfig,
    wanted: Sequence[str],
) -> str:
    """Return the answer that the compiled `forward` decodes greedily after the question.

    It ends when it holds all `wanted` strings, or at an end token, or when it is about twice as
    long as the expected answer. `cache` stays as it is.
    """
    note_document(cache, encoded.document, config, model.boundaries)
    branch = fork(cache)
    argument = cache_argument(model.model)

    def step(token: Tensor) -> Tensor:
        return forward(token[None], **{argument: branch}).logits[0, -1]

    logits = [step(token[None].to(model.device)) for token in encoded.question][-1]
    return _answer(step, logits, model, encoded, wanted)


def found_share(answer: str, wanted: Sequence[str]) -> float:
    """Return the share of the `wanted` strings that an answer holds, in upper or lower letters."""
    return sum(each.lower() in answer.lower() for each in wanted) / len(wanted)


def _answer(
    step: Callable[[Tensor], Tensor],
    logits: Tensor,
    model: LanguageModel,
    encoded: Encoded,
    wanted: Sequence[str],
) -> str:
    """Return the text of greedy steps from `logits` [vocabulary] on; `step` takes a token [1]."""
    tokens: list[int] = []
    text = ""
    for _ in range(2 * len(encoded.answer) + SLACK):
        token = logits.argmax()[None]
        if int(token) in model.end_tokens:
            break
        tokens.append(int(token))
        text = model.tokenizer.decode(tokens)
        if found_share(text, wanted) == 1:
            break
        logits = step(token)
    return text


def note_document(cache: Any, token_ids: Tensor, config: IndexConfig, table: BoundaryTable) -> None:
    """Note the boundaries of a document whose cache was filled eagerly.

    A prefill through the backend notes the boundaries of its tokens; an eager one does not.
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
    """Return the reading by `logits` [T, vocabulary] after each decoded token."""
    log_probs = logits.float().log_softmax(-1)
    answer = encoded.answer.to(logits.device)
    of_answer = log_probs[-len(answer) :]
    likelihood = of_answer.gather(-1, answer[:, None]).sum().item()
    return Reading(of_answer.argmax(-1).cpu(), encoded.answer, likelihood, log_probs)
