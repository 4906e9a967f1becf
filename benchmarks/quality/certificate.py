"""Truth of certificates on random keys, and how much they prove on a real model's keys.

    python -m benchmarks.quality.certificate [--cases 100000] [--captures CAPTURE ...]

The first table compares bounds of the missed share with the share that is truly missed, in float64,
over random and adversarial keys; the exit status is 1 if a bound is too low. Another table for each
capture shows the share of queries and heads certified at 10 %, by budget, and the tokens that
`epsilon=0.1` reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lychee_compile.evaluate.tensors import Capture, SiteTensors
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.adaptive import certified_attention
from lychee_compile.kernels.reference.attention import attend
from lychee_compile.kernels.reference.certificate import log_unread_bound, missed_share
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import Operands, ScoreInputs
from lychee_compile.kernels.reference.selection import Selection, select

BATCH, KV_HEADS, GROUP, QUERIES = 8, 4, 4, 8
CASES_AT_ONCE = BATCH * KV_HEADS * GROUP * QUERIES
EPSILON = 0.1


def _one_huge(key: Tensor) -> Tensor:
    key[:, :, key.shape[2] // 2] *= 1e4
    return key


def _in_topics(key: Tensor) -> Tensor:
    topic = key[:, :, :5].repeat_interleave(40, 2)[:, :, : key.shape[2]]
    return 4 * topic + 0.3 * key


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda key: key,
    "a common direction": lambda key: key + 10,
    "topics": _in_topics,
    "duplicates": lambda key: key[:, :, :1].expand_as(key).clone(),
    "zero vectors": lambda key: 0 * key,
    "one outlier": _one_huge,
    "huge norms": lambda key: 1e6 * key,
    "tiny norms": lambda key: 1e-6 * key,
    "channels of many sizes": lambda key: key * torch.logspace(-3, 3, key.shape[3]),
    "fp16 at its limits": lambda key: 65504 * key.sign(),
    "one opposite key": lambda key: torch.where(torch.arange(key.shape[2])[:, None] == 77, -9, key),
}


def missed(query: Tensor, key: Tensor, selection: Selection) -> Tensor:
    """Return the share of the softmax mass that is not read, float64 [B, Hq, Tq]."""
    heads = key.shape[1]
    group = query.shape[1] // heads
    wide = key.double().repeat_interleave(group, 1)
    share = (selection.scale * query.double() @ wide.transpose(-1, -2)).softmax(-1)
    read = selection.token_mask().repeat_interleave(group, 1)
    return share.masked_fill(read, 0).sum(-1).clamp(max=1)


def certify(index: KVIndex, query: Tensor, key: Tensor, selection: Selection) -> Tensor:
    """Return the certificates of a selection: [B, Hq, Tq]."""
    _, log_read = attend(Operands(query, key, key, None, selection.scale), selection)
    bound = log_unread_bound(index, query, selection)
    return missed_share(key, query, replace(selection, log_unread_bound=bound), log_read)


def random_case(seed: int, kind: str) -> tuple[int, int]:
    """Return (certificates, violated ones) for one cache that is read at a random budget."""
    generator = torch.Generator().manual_seed(seed)
    head_dim = (8, 64, 80)[seed % 3]
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed // 3 % 3]
    key = torch.randn(BATCH, KV_HEADS, 200, head_dim, generator=generator)
    key = KINDS[kind](key).clamp(-65504, 65504).to(dtype)
    size = 3 * torch.rand(1, generator=generator)
    query = (
        size * torch.randn(BATCH, KV_HEADS * GROUP, QUERIES, head_dim, generator=generator)
    ).to(dtype)
    budget = int(torch.randint(30, 200, (), generator=generator))
    config = IndexConfig(
        budget=budget, sinks=4, recent=16, policy=("lychee", "quest")[seed // 9 % 2]
    )
    index = make_index(BATCH, KV_HEADS, head_dim, config, key.device)
    for end in (150, 171, 200):  # a prompt, then chunks that are grafted
        index.extend(key, torch.full((BATCH,), end))
        index.complete(key)
    inputs = ScoreInputs(query, key, 200, None, head_dim**-0.5)
    selection = select(index, inputs, budget)
    wrong = missed(query, key, selection) > certify(index, query, key, selection).double()
    return wrong.numel(), int(wrong.sum())


def prove(cases: int, console: Console) -> int:
    """Print certificates over random keys, and return how many were violated."""
    table = Table("keys", "certificates", "violated", title="Certificates against float64")
    rounds = -(-cases // (CASES_AT_ONCE * len(KINDS)))
    violated = 0
    for number, kind in enumerate(track(KINDS, "Random keys")):
        results = [random_case(1000 * number + seed, kind) for seed in range(rounds)]
        counts = [sum(column) for column in zip(*results, strict=True)]
        violated += counts[1]
        table.add_row(kind, f"{counts[0]:,}", str(counts[1]))
    console.print(table)
    return violated


def by_budget(capture: Capture, budgets: list[int], console: Console) -> None:
    """Print how much is certified at each budget, and the tokens that certify everything."""
    title = f"{capture.text}, {len(capture.token_ids):,} tokens"
    table = Table("budget", "certified at 10 %", "missed", "with epsilon: tokens", title=title)
    for budget in budgets:
        rows = [_at_budget(capture, site, budget) for site in capture.sites]
        certified, lost, tokens = torch.tensor(rows).mean(0).tolist()
        table.add_row(f"{budget:,}", f"{certified:.1%}", f"{lost:.1%}", f"{tokens:,.0f}")
    console.print(table)


def _at_budget(capture: Capture, site: SiteTensors, budget: int) -> tuple[float, float, float]:
    """Return (certified share, mean missed share, mean tokens with epsilon) of one attention."""
    key, value = site.key.float(), site.value.float()
    config = IndexConfig(budget=budget)
    index = make_index(1, key.shape[1], key.shape[3], config, key.device)
    if capture.strengths is not None:
        slots = torch.arange(len(capture.strengths))[None]
        index.strengths.note(slots, capture.strengths[None])
    rows = []
    for step, length in enumerate(capture.lengths.tolist()):
        query, keys = site.query[:, :, step : step + 1].float(), key[:, :, :length]
        index.extend(keys, torch.tensor([length]))
        index.complete(keys)
        operands = Operands(query, keys, value[:, :, :length], None, site.scale)
        selection = select(index, operands.score_inputs, budget)
        share = certify(index, query, keys, selection)
        lost = missed(query, keys, selection)
        _, wider, _ = certified_attention(index, operands, budget, EPSILON)
        read = wider.token_mask().sum(-1).double().mean()
        rows.append([(share <= EPSILON).double().mean(), lost.mean(), read])
    certified, lost, read = torch.tensor(rows).mean(0).tolist()
    return certified, lost, read


def main() -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--captures", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--budgets", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192]
    )
    arguments = parser.parse_args()
    console = Console()
    violated = prove(arguments.cases, console)
    for path in arguments.captures:
        by_budget(Capture.load(path), arguments.budgets, console)
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())
