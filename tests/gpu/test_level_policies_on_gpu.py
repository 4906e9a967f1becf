"""Declared policies under compiled kernels, at the sizes models have; needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decode_problems import Sizes
from level_steps import Case, Steps, follow

import lychee_compile
from lychee_compile.kernels.gpu.methods import policies_with_kernels
from lychee_compile.kernels.policies.registry import levels_of, policies, reads_chunks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POLICIES = [each.name for each in policies()
            if each.levels is not None and each.name in policies_with_kernels()]  # fmt: skip
UNEVEN = [each for each in POLICIES if levels_of(each).uneven]
SLOTS, HEADS, GROUP, HEAD_DIM = 8192, 2, 4, 128
HISTORY = ["step", "step", "rewind", "step", "rewind far", "written by another", "step"]
CASES = {
    "llama": {"sizes": Sizes(2, 2, 4, 1, 32768, 128, 128), "dtype": "bfloat16"},
    "rows": {"sizes": Sizes(2, 2, 4, 1, 20000, 64, 64), "dtype": "float16", "mask": "rows"},
    "soft-cap in a window": {
        "sizes": Sizes(1, 1, 8, 3, 9001, 80, 64), "score": "soft-cap", "mask": "padded",
    },
    "holes and slopes": {
        "sizes": Sizes(1, 2, 3, 2, 9000, 96, 64), "score": "slopes", "mask": "mask by head",
        "dtype": "bfloat16", "extra": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", [each for each in CASES if "slopes" not in each])
@pytest.mark.parametrize("policy", UNEVEN)
def test_kernels_of_uneven_groups_choose_as_the_plain_form_does(policy: str, case: str) -> None:
    given = Case(policy, budget=1024, sinks=16, recent=64, device="cuda", **CASES[case])
    history = [*HISTORY[:4], "refit", *HISTORY[4:]]
    follow(Steps(given, given.sizes.kv_len - 300), history)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [each for each in POLICIES if each not in UNEVEN])
def test_kernels_choose_as_the_plain_form_does(policy: str, case: str) -> None:
    given = Case(policy, budget=1024, sinks=16, recent=64, device="cuda", **CASES[case])
    follow(Steps(given, given.sizes.kv_len - 300), HISTORY)


def decode(query, keys, values, position, key, value):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    mask = (torch.arange(keys.shape[2], device="cuda") <= position[:, None])[None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


class Decoder:
    """Decoding through `torch.compile` over a static cache, each step in a CUDA graph."""

    def __init__(self, policy: str, budget: int) -> None:
        lychee_compile.reset()
        torch._dynamo.reset()
        self.random = torch.Generator("cuda").manual_seed(0)
        options = {"policy": policy, "budget": budget, "dense_layers": 0, "mode": "reduce-overhead"}
        self.compiled = torch.compile(decode, backend="lychee", options=options)
        self.keys, self.values = (self.randn(1, HEADS, SLOTS, HEAD_DIM) for _ in range(2))
        for cache in (self.keys, self.values):  # else no CUDA graph may write to it
            torch._dynamo.mark_static_address(cache)

    def randn(self, *shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self.random, device="cuda")
        return numbers.to(torch.bfloat16)

    def step(self, position: int, query: torch.Tensor | None = None) -> torch.Tensor:
        """Write a token at a slot and attend with `query` [1, Hq, 1, D]; None: a random one."""
        query = self.randn(1, HEADS * GROUP, 1, HEAD_DIM) if query is None else query
        self.given = (
            query, self.keys, self.values, torch.tensor([position], device="cuda"),
            self.randn(1, HEADS, 1, HEAD_DIM), self.randn(1, HEADS, 1, HEAD_DIM),
        )  # fmt: skip
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(*self.given).clone()

    def dense(self, position: int) -> torch.Tensor:
        """Return dense attention of the last query; nothing is written, which would be noticed."""
        held = slice(position + 1)
        keys, values = self.keys[:, :, held], self.values[:, :, held]
        return F.scaled_dot_product_attention(self.given[0], keys, values, enable_gqa=True)


@pytest.mark.parametrize("policy", [each for each in POLICIES if not reads_chunks(each)])
@torch.no_grad()
def test_a_cuda_graph_finds_what_matters(policy: str) -> None:
    """It lies in one group of the coarsest level; all queries of a step look for it.

    Chunks are left out: one that has a part of it alone may rank far below the other.
    """
    decoder, levels = Decoder(policy, 1024), levels_of(policy).levels
    size = max((level.groups.size for level in levels), default=16)
    size = 16 if policy in UNEVEN else size
    one = decoder.randn(1, HEADS, 1, HEAD_DIM)
    strength = 30 * HEAD_DIM**0.5 / one.float().square().sum(-1, keepdim=True)
    place = 3000 // size * size if levels else 6700
    decoder.keys[:, :, place : place + size] = (one * strength).to(torch.bfloat16)
    expected = decoder.values[:, :, place : place + size].float().mean(2, keepdim=True)
    expected = expected.repeat_interleave(GROUP, 1)
    query = one.repeat_interleave(GROUP, 1)
    for position in (*range(7000, 7040), *range(7010, 7020)):
        output = decoder.step(position, query).float()
        torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_cuda_graph_is_sparse_and_dense_if_all_fits(policy: str) -> None:
    for budget, is_dense in ((SLOTS - 1, True), (1024, False)):
        decoder, gaps = Decoder(policy, budget), []
        for position in range(7000, 7030):
            output = decoder.step(position)
            gaps.append(float((output - decoder.dense(position)).abs().max()))
        assert gaps[0] < 2e-3
        assert max(gaps) < 2e-3 if is_dense else min(gaps[4:]) > 4e-3
