"""Captures without a model: random tensors with the structure that attention has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lychee_compile.evaluate.tensors import Capture, SiteTensors

TOPICS = 12
"""Number of topics between which keys wander."""


@dataclass(frozen=True)
class Heads:
    """Sizes of one synthetic attention."""

    query: int = 4
    kv: int = 2
    head_dim: int = 16


def synthetic_capture(
    length: int = 600,
    steps: int = 4,
    *,
    sites: int = 1,
    heads: Heads = Heads(),
    softcap: float | None = None,
    boundaries: bool = True,
    seed: int = 0,
) -> Capture:
    """Return keys that wander between topics, a sentence on each, and queries about one topic.

    Neighbouring keys are alike, sentences end at boundaries of known strength, all keys share an
    offset and the first is a sink, as in real models.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(length, generator=generator) < 0.08
    sentence = ends.long().cumsum(0) - ends.long()
    topics = torch.randint(TOPICS, (int(sentence.max()) + 1,), generator=generator)[sentence]
    attentions = tuple(
        _site(f"layers.{number}", topics, steps, heads, softcap, generator)
        for number in range(sites)
    )
    strengths = (2 * ends).to(torch.uint8) if boundaries else None
    positions = torch.arange(length - steps, length)
    return Capture(attentions, positions, topics, strengths, "synthetic", "synthetic")


def _site(
    name: str,
    topics: torch.Tensor,
    steps: int,
    heads: Heads,
    softcap: float | None,
    generator: torch.Generator,
) -> SiteTensors:
    """Return one attention over keys about `topics`, int64 [L]."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    head_dim, group = heads.head_dim, heads.query // heads.kv
    centres = 2 * normal(heads.kv, TOPICS, head_dim)
    key = centres[:, topics] + 0.7 * normal(heads.kv, len(topics), head_dim)
    key += normal(heads.kv, 1, head_dim)
    topic_of_query = torch.randint(TOPICS, (steps,), generator=generator)
    query = 0.4 * centres[:, topic_of_query].repeat_interleave(group, 0)
    query = query + normal(heads.query, steps, head_dim)
    key[:, 0] = 0.5 * query.mean(1).unflatten(0, (heads.kv, group)).mean(1)
    value = normal(heads.kv, len(topics), head_dim)
    return SiteTensors(name, query[None], key[None], value[None], head_dim**-0.5, softcap)
