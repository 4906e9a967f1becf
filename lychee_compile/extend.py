"""Everything that a policy of your own needs: import it from here, and from nowhere deeper.

A policy decides which keys a query reads. Declare it, and it runs on every device: a `LevelStack`
of `Level`s from coarse to fine: `Pages` of neighbouring keys and single `Tokens`, `Clusters` above
`Chunks`, or `TokenClusters`. A level says how a group of keys is summarised (`fields`) and how the
score of a group is estimated from that, both as expressions of `query`, `key`, `softmax_scale`,
`head_dim` and `field(name)`:

    best = dot(Max(query, 0), field("high")) + dot(Min(query, 0), field("low"))  # sympy's Max, Min
    pages = Level(Pages(16), best, fields={"low": least(key), "high": greatest(key)})
    register_policy("boxes", LevelStack((pages,)))

`dot` and `norm` sum over channels; `mean`, `least`, `greatest` and `weighted_mean` go over the keys
of a group; all else is elementwise. `Keep` says how much of a level goes on to the next one;
`DominantPairs` lets single tokens be scored by some of their channels. `describe` tells a
declaration in words. The plain PyTorch form and the kernels of a GPU are made from it.

What cannot be declared is written by hand, in up to three forms:

Decoding, in plain PyTorch, on any device: a subclass of `KVIndex`, which follows the keys of one
cache and answers a `Question` at each step with `Runs` of slots. `GroupedIndex` is a `KVIndex` that
cuts the keys into groups of neighbours: a subclass says what summarises a group and what its score
is estimated to be. `IndexConfig` holds the options that an index may look at.

Prefill, in plain PyTorch, on any device: a function that answers a `PrefillQuestion` with the keys
that each tile of queries reads. A `GroupUnion` is such a function for which a GPU has kernels: it
reads the `KeyGroups` that any of the `Askers` of a tile prefers.

Decoding by kernels of its own, on a GPU: a `GpuMethod`, which says how an index lies in memory
(`IndexLayout`, `IndexState`), builds it (`DeviceIndex`) and runs a step (`AttentionOperands`,
`IndexOperands`), and an emitter, a function from an `AttentionSpec` to the text of the kernels.
`header_part`, `bytes_of` and `views_of` lay an index out; `SparseStep` and `launch` run kernels;
`emit_selection` and `fill_text` write them.

    register_policy("mine", MyIndex)
    register_policy("mine", MyIndex, tiles=my_prefill_choice)
    register_policy("mine", MyIndex, gpu=MyMethod())
    register_emitter("mine", emit_my_kernels)

`torch.compile(model, backend="lychee", options={"policy": "mine"})` then uses it.
"""

from __future__ import annotations

from lychee_compile.codegen.module import Emit, register_emitter
from lychee_compile.codegen.parts.decode import emit_selection
from lychee_compile.codegen.parts.site import fill_text, sees_range
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep
from lychee_compile.kernels.gpu.common.layout import (
    IndexLayout,
    IndexOperands,
    IndexState,
    Part,
    bytes_of,
    header_part,
    views_of,
)
from lychee_compile.kernels.gpu.common.method import GpuMethod
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.levels.declaration import (
    DominantPairs,
    Keep,
    Level,
    LevelStack,
    Pages,
    Tokens,
)
from lychee_compile.kernels.levels.expressions import (
    count,
    dot,
    field,
    greatest,
    head_dim,
    key,
    least,
    mean,
    norm,
    query,
    softmax_scale,
    weighted_mean,
)
from lychee_compile.kernels.levels.groups import Chunks, Clusters, TokenClusters
from lychee_compile.kernels.levels.words import describe
from lychee_compile.kernels.policies.prefill.union import Askers, GroupUnion
from lychee_compile.kernels.policies.registry import Policy, policies, register_policy
from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.key_groups import KeyGroups
from lychee_compile.kernels.reference.prefill_question import PrefillChoice, PrefillQuestion
from lychee_compile.kernels.reference.question import Question, Runs
from lychee_compile.kernels.sizes import PAGE, SCAN_SLOTS, power_of_two, whole_scans

__all__ = [
    "PAGE",
    "SCAN_SLOTS",
    "Askers",
    "AttentionOperands",
    "AttentionSpec",
    "Chunks",
    "Clusters",
    "DeviceIndex",
    "DominantPairs",
    "Emit",
    "GpuMethod",
    "GroupUnion",
    "GroupedIndex",
    "IndexConfig",
    "IndexLayout",
    "IndexOperands",
    "IndexState",
    "KVIndex",
    "Keep",
    "KeyGroups",
    "Level",
    "LevelStack",
    "Pages",
    "Part",
    "Policy",
    "PrefillChoice",
    "PrefillQuestion",
    "Question",
    "Runs",
    "SparseStep",
    "TokenClusters",
    "Tokens",
    "Tuning",
    "bytes_of",
    "count",
    "describe",
    "dot",
    "emit_selection",
    "field",
    "fill_text",
    "greatest",
    "head_dim",
    "header_part",
    "key",
    "launch",
    "least",
    "mean",
    "norm",
    "policies",
    "power_of_two",
    "query",
    "register_emitter",
    "register_policy",
    "sees_range",
    "softmax_scale",
    "views_of",
    "weighted_mean",
    "whole_scans",
]
