"""Everything that a policy of your own needs: import it from here, and from nowhere deeper.

A policy decides which keys a query reads. It has up to three forms:

Decoding, in plain PyTorch, on any device: a subclass of `KVIndex`, which follows the keys of one
cache and answers a `Question` at each step with `Runs` of slots. `GroupedIndex` is a `KVIndex` that
cuts the keys into groups of neighbours: a subclass says what summarises a group and what its score
is estimated to be. `IndexConfig` holds the options that an index may look at.

Prefill, in plain PyTorch, on any device: a function that answers a `PrefillQuestion` with the keys
that each tile of queries reads.

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
    "AttentionOperands",
    "AttentionSpec",
    "DeviceIndex",
    "Emit",
    "GpuMethod",
    "GroupedIndex",
    "IndexConfig",
    "IndexLayout",
    "IndexOperands",
    "IndexState",
    "KVIndex",
    "KeyGroups",
    "Part",
    "Policy",
    "PrefillChoice",
    "PrefillQuestion",
    "Question",
    "Runs",
    "SparseStep",
    "Tuning",
    "bytes_of",
    "emit_selection",
    "fill_text",
    "header_part",
    "launch",
    "policies",
    "power_of_two",
    "register_emitter",
    "register_policy",
    "sees_range",
    "views_of",
    "whole_scans",
]
