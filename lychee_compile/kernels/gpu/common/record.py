"""Record fingerprints of all keys of a cache, for an index that notices when keys change."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.operands import key_arguments

RECORDED = 64
"""Slots that one program of `record_fingerprints` hashes."""


def record_fingerprints(module: ModuleType, key: Tensor, fingerprints: Tensor, end: int) -> None:
    """Hash the keys in the slots [0, end) of `key` [B, Hkv, L, D] into `fingerprints`.

    These are int32 [B, Hkv, slots], those of the index. `key` may have fewer batch rows.
    """
    kv_heads = key.shape[1]
    arguments = {
        **key_arguments(key),
        "fingerprints": fingerprints,
        "end": end,
        "slots": fingerprints.shape[2],
        "kv_heads": kv_heads,
    }
    if end:
        grid = -(-end // RECORDED), key.shape[0] * kv_heads
        launch(module.record_fingerprints, grid, arguments, num_warps=4)


def compare_keys(module: ModuleType, key: Tensor, header: Tensor, fingerprints: Tensor) -> None:
    """Take the trust in an index away if one of the keys that it knows is not as it was indexed.

    `key` [B, Hkv, L, D] are computed from what is stored. The device compares all of them, and
    nobody waits for it.
    """
    batch, kv_heads, kv_len, _ = key.shape
    arguments = {
        **key_arguments(key),
        "header": header,
        "fingerprints": fingerprints,
        "slots": fingerprints.shape[2],
        "kv_heads": kv_heads,
        "kv_len": kv_len,
    }
    if kv_len:
        grid = -(-kv_len // RECORDED), batch * kv_heads
        launch(module.compare_keys, grid, arguments, num_warps=4)
