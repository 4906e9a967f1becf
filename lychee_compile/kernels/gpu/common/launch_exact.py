"""Launch the kernels that read every visible key. No host sync."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.gpu.common.device import overlaps
from lychee_compile.kernels.gpu.common.launch_common import Scratch, combine, launch
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import MOST_SPLITS, Tuning, tuning_for


def run_exact(
    module: ModuleType, operands: AttentionOperands, tuning: Tuning | None = None
) -> Tensor:
    """Return attention over all visible keys: [B, Hq, T, Dv]."""
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
    return combine(module, operands, scratch, splits, early)
