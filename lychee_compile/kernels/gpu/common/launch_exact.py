"""Launch the kernels that read every visible key. No host sync."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.gpu.common.device import overlaps
from lychee_compile.kernels.gpu.common.launch_common import Scratch, combine, launch, log_weight
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import MOST_SPLITS, Tuning, tuning_for


def run_exact(
    module: ModuleType, operands: AttentionOperands, tuning: Tuning | None = None
) -> Tensor:
    """Return attention over all visible keys: [B, Hq, T, Dv]."""
    scratch, splits, early = _attend_all(module, operands, tuning)
    return combine(module, operands, scratch, splits, early)


def log_weight_of_all(module: ModuleType, operands: AttentionOperands) -> Tensor:
    """Return log2 of the sum of the weights of all visible keys, float32 [B, Hq, T]."""
    scratch, _, _ = _attend_all(module, operands, None)
    return log_weight(operands, scratch)


def _attend_all(
    module: ModuleType, operands: AttentionOperands, tuning: Tuning | None
) -> tuple[Mapping[str, Tensor], int, bool]:
    """Launch `attend_all`; return what it leaves, its programs a row, and if kernels overlap."""
    tuning = tuning or tuning_for(module, "exact", operands)
    rows, kv_len = operands.rows, operands.kv_len
    splits = max(1, min(tuning.programs // rows, -(-kv_len // tuning.keys), MOST_SPLITS))
    wanted = Scratch()
    wanted.want_parts(operands, splits)
    scratch = wanted.allocate(operands.query.device)
    early = overlaps(operands.query.device)
    arguments = {
        **operands.arguments(module),
        **scratch,
        "splits": splits,
        "KEYS": tuning.keys,
        "EARLY": early,
    }
    launch(
        module.attend_all,
        (rows, splits),
        arguments,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
    return scratch, splits, early
