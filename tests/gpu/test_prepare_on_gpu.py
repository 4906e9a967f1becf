"""`prepare` on a GPU: in every mode, `generate()` gives the tokens of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import generating
import pytest
import torch
from generating import EVERYTHING, Way, decoder

import lychee_compile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WAYS = (
    generating.greedy, generating.sampled, generating.beams, generating.padded,
    generating.chunked, generating.conversation, generating.lookup, generating.drafted,
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make models and tokens on the GPU."""
    drawn = generating.tokens

    def tokens(*given: int) -> torch.Tensor:
        with torch.device("cpu"):
            ids = drawn(*given)
        return ids.cuda()

    monkeypatch.setattr(generating, "tokens", tokens)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("cache", ["growing", "static", "dynamic"])
def test_a_mode_gives_the_tokens_of_the_plain_model(cache: str, prefill: str, way: Way) -> None:
    """A conversation brings a `DynamicCache` of its own; other modes get one of the kind."""
    kind: Any = "dynamic" if way is generating.conversation else None
    more = {"prefill": "sparse", "prefill_budget": 1.0} if prefill == "sparse" else {}
    dense = way(decoder(), kind, {})
    model = decoder()
    with lychee_compile.prepare(model, cache=cache, **EVERYTHING, **more):
        assert torch.equal(way(model, kind, {}), dense)
