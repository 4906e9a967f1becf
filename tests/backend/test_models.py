"""Decoders of transformers through the backend: with everything read, logits are dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_decoders import EVERYTHING, PROMPT, STEPS, decode, model_of, transformers

OFTEN = {
    ("bloom", "dynamic"),
}
"""Models and kinds of cache that are tried in every run."""


def combinations() -> Iterator[Any]:
    """Models, their attention and cache; most of them are thorough."""
    models = [(name, "sdpa") for name in ("llama", "qwen3", "mistral", "gemma3", "gpt2")]
    models += [(name, "eager") for name in ("llama", "gemma2", "gpt_oss", "bloom")]
    for model in models:
        for kind in ("static", "dynamic"):
            left_out = (model[0], kind) not in OFTEN or model == ("llama", "eager")
            yield pytest.param(*model, kind, marks=pytest.mark.thorough if left_out else ())


@pytest.mark.parametrize(
    "padding",
    [
        pytest.param([0], marks=pytest.mark.thorough, id="one"),
        pytest.param([0, 13, 60], id="ragged"),
    ],
)
@pytest.mark.parametrize(("name", "attention", "kind"), list(combinations()))
@torch.no_grad()
def test_everything_read_is_dense(
    name: str, attention: str, kind: str, padding: list[int], without_inductor: None
) -> None:
    model = model_of(name, attention)
    compiled = torch.compile(model, backend="lychee", options=EVERYTHING)
    got = decode(model, compiled, kind, padding)
    expected = decode(model, model, kind, padding)
    assert torch._dynamo.utils.counters["lychee"]["sparse"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.thorough
@torch.no_grad()
def test_generate_gives_the_dense_tokens() -> None:
    model = model_of("llama")
    ids = torch.randint(1, 128, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    given = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": 2 * STEPS,
        "pad_token_id": 0,
    }
    dense = model.generate(ids, disable_compile=True, **given)
    # The cache has one slot less than there are tokens, the budget one less again: enough for all
    # steps but the last.
    options = {**EVERYTHING, "budget": PROMPT + 2 * STEPS - 2}
    config = transformers.CompileConfig(backend="lychee", mode=None, options=options)
    config._compile_all_devices = True
    for _ in range(2):  # the second call meets a cache of the same shape
        sparse = model.generate(ids, cache_implementation="static", compile_config=config, **given)
        assert torch.equal(sparse[:, :-1], dense[:, :-1])
    assert torch._dynamo.utils.counters["lychee"]["sparse"] == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
