"""Tile sizes: the rule's fit any GPU, and what was measured goes before the rule."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lychee_compile.kernels.gpu.common import tuning
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import (
    FLIGHT_BYTES,
    LISTED_ROWS,
    PREFILL,
    REGISTERS,
    TileTuning,
    Tuning,
    candidates,
    is_tuned,
    remember,
    tile_tuning_for,
    tuning_for,
)
from lychee_compile.kernels.sizes import QUERY_TILE, power_of_two

MODULE = ModuleType("decode_exact_bf16_g4_d128")
sizes = st.integers(1, 32).map(lambda eighth: 8 * eighth)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
modes = st.sampled_from(["exact", "sparse"])


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    monkeypatch.setattr(tuning, "_tuned", {})


def operands(head_dim=128, value_dim=128, dtype=torch.bfloat16, batch=1, kv_len=4096):
    """Without memory: query [B, 8, 1, D], key [B, 2, L, D] and value [B, 2, L, Dv]."""
    empty = torch.empty(0, dtype=dtype)
    return AttentionOperands(
        empty.new_empty((batch, 8, 1, head_dim)),
        empty.new_empty(1).expand(batch, 2, kv_len, head_dim),
        empty.new_empty(1).expand(batch, 2, kv_len, value_dim),
    )


def bytes_in_flight(found, given):
    """Tiles that wait for the one in work, padded as kernels pad them."""
    row = sum(power_of_two(each.shape[-1], 16) for each in (given.key, given.value))
    row *= given.key.element_size()
    return (found.stages - 1) * found.keys * row


@given(sizes, sizes, dtypes, modes)
def test_tiles_fit_into_shared_memory(head_dim, value_dim, dtype, mode):
    these = operands(head_dim, value_dim, dtype)
    rule = tuning_for(MODULE, mode, these)
    assert bytes_in_flight(rule, these) <= FLIGHT_BYTES
    assert rule.keys >= 16
    assert rule.programs >= 1
    assert rule.stages >= 2


@given(sizes, sizes, dtypes, modes)
def test_the_rule_is_among_the_candidates(head_dim, value_dim, dtype, mode):
    these = operands(head_dim, value_dim, dtype)
    found = candidates(MODULE, mode, these)
    assert tuning_for(MODULE, mode, these) in found
    assert len(set(found)) == len(found)
    assert all(each.keys in (16, 32, 64, 128) and each.programs >= 1 for each in found)


@given(sizes, sizes, dtypes)
def test_tiles_of_queries_divide_a_tile_and_fit_into_registers(head_dim, value_dim, dtype):
    these = operands(head_dim, value_dim, dtype)
    rule, found = tile_tuning_for(MODULE, these), candidates(MODULE, PREFILL, these)
    assert rule in found
    assert len(set(found)) == len(found)
    width = power_of_two(value_dim, 16)
    for each in found:
        assert QUERY_TILE % each.rows == 0
        held = each.rows * (width + 2 * each.keys) / (32 * each.warps)
        assert held <= REGISTERS or each == rule


def test_what_was_measured_for_whole_sequences_counts_for_them_alone():
    these = operands()
    best = TileTuning(64, 32, 4, 3)
    remember(MODULE, PREFILL, these, best)
    assert tile_tuning_for(MODULE, these) == best
    assert isinstance(tuning_for(MODULE, "exact", these), Tuning)


def test_only_kernels_that_list_apart_have_the_rule_for_many_rows():
    lists = ModuleType("lists")
    lists.choose = None
    few, many = operands(), operands(batch=LISTED_ROWS)
    assert tuning_for(lists, "sparse", few) == tuning_for(MODULE, "sparse", few)
    assert tuning_for(MODULE, "sparse", many) == tuning_for(MODULE, "sparse", few)
    assert tuning_for(lists, "sparse", many) != tuning_for(MODULE, "sparse", many)
    assert tuning_for(lists, "exact", many) == tuning_for(MODULE, "exact", many)


def test_what_was_measured_goes_before_the_rule():
    these = operands()
    rule, best = tuning_for(MODULE, "exact", these), Tuning(7, 32, 8, 4)
    assert not is_tuned(MODULE, "exact", these)
    remember(MODULE, "exact", these, best)
    assert is_tuned(MODULE, "exact", these)
    assert tuning_for(MODULE, "exact", these) == best
    these = operands(kv_len=5000)  # of the same order of magnitude
    assert tuning_for(MODULE, "exact", these) == best
    assert tuning_for(MODULE, "sparse", these) != best
    for other in (operands(kv_len=9000), operands(batch=2)):
        assert tuning_for(MODULE, "exact", other) == rule
    assert tuning_for(ModuleType("another"), "exact", operands()) == rule
