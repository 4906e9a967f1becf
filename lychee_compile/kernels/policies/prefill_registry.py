"""Policies for whole sequences: what each tile of queries reads, one method a file."""

from __future__ import annotations

from lychee_compile.kernels.policies.prefill.compact import choose_block_union
from lychee_compile.kernels.policies.prefill.dhsa import choose_by_chunks
from lychee_compile.kernels.policies.prefill.lychee import choose_by_centres
from lychee_compile.kernels.policies.prefill.s2o import choose_until_it_wanes
from lychee_compile.kernels.policies.prefill.streaming import choose_last
from lychee_compile.kernels.reference.prefill_question import PrefillChoice

_registered: dict[str, PrefillChoice] = {
    "lychee": choose_by_centres,
    "streaming": choose_last,
    "dhsa": choose_by_chunks,
    "s2o": choose_until_it_wanes,
    "compact": choose_block_union,
}


def tile_policy_names() -> tuple[str, ...]:
    """Every policy that whole sequences can have."""
    return tuple(_registered)


def register_tile_policy(name: str, choice: PrefillChoice) -> None:
    """Let `options={"prefill": "sparse", "policy": name}` choose as `choice` does.

    Raises ValueError where there is another of that name, TypeError for what cannot be called.
    """
    if not callable(choice):
        raise TypeError(
            f"policy {name!r} chooses for whole sequences by a function, got {choice!r}"
        )
    if _registered.get(name, choice) is not choice:
        raise ValueError(f"there is a policy {name!r} for whole sequences already")
    _registered[name] = choice


def tile_choice(name: str) -> PrefillChoice:
    """The choice of a policy. Raises ValueError for an unknown one."""
    if name not in _registered:
        known = ", ".join(_registered)
        raise ValueError(f"policy {name!r} has no form for whole sequences; those have: {known}")
    return _registered[name]
