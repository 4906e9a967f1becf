"""Attention problems of a prefill under generated kernels."""

from __future__ import annotations

from dataclasses import replace

from decode_problems import Problem, make_problem

from lychee_compile.codegen.specification import TileSpec

SINKS, RECENT = 4, 16
"""Numbers of first and of nearest keys that tiles always read."""


def prefill_problem(policy: str, **given) -> Problem:
    """Return a decoding problem whose specification is that of a prefill."""
    problem = make_problem(**given)
    problem.spec = replace(problem.spec, tiles=TileSpec(policy, SINKS, RECENT))
    return problem
