"""Captures without a model: random tensors with the structure that attention has."""

from __future__ import annotations

import torch

from lychee_compile.evaluate.tensors import Capture, SiteTensors


def synthetic_capture(
    length: int = 600,
    steps: int = 4,
    *,
    sites: int = 1,
    query_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    topics: int = 12,
    softcap: float | None = None,
    boundaries: bool = True,
    seed: int = 0,
) -> Capture:
    """Keys that wander between topics, a sentence on each, and queries about one topic.

    Neighbouring keys are alike, sentences end at boundaries of known strength, all keys share an
    offset and the first is a sink, as in real models.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ends = torch.rand(length, generator=generator) < 0.08
    sentence = ends.long().cumsum(0) - ends.long()
    about = torch.randint(topics, (int(sentence.max()) + 1,), generator=generator)[sentence]
    made = []
    for number in range(sites):
        centres = 2 * normal(kv_heads, topics, head_dim)
        key = centres[:, about] + 0.7 * normal(kv_heads, length, head_dim)
        key += normal(kv_heads, 1, head_dim)
        asked = torch.randint(topics, (steps,), generator=generator)
        group = query_heads // kv_heads
        query = 0.4 * centres[:, asked].repeat_interleave(group, 0) + normal(
            query_heads, steps, head_dim
        )
        key[:, 0] = 0.5 * query.mean(1).unflatten(0, (kv_heads, group)).mean(1)
        value = normal(kv_heads, length, head_dim)
        made.append(
            SiteTensors(
                f"layers.{number}", query[None], key[None], value[None], head_dim**-0.5, softcap
            )
        )
    strengths = (2 * ends).to(torch.uint8) if boundaries else None
    positions = torch.arange(length - steps, length)
    return Capture(tuple(made), positions, about, strengths, "synthetic", "synthetic")
