"""Generated modules as text, in tests/golden/kernels, so that a change to them is seen.

    UPDATE_GOLDEN=1 python -m pytest tests/kernels/test_codegen_golden.py

writes them anew.
"""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import symtable
import sys
from pathlib import Path

import pytest
from kernel_specs import SPECS

from lychee_compile.codegen.module import emit_module

GOLDEN = Path(__file__).parents[1] / "golden" / "kernels"
LAUNCHED = {
    "attend_all", "combine", "query_weights", "scan_tokens", "scan_pages", "scan_chosen", "attend",
    "choose", "encode", "record_fingerprints", "scan_0", "rank_0", "list_0", "scan_1", "rank_1",
    "scan_2", "rank_2", "list_1", "list_2", "spread_0", "scan_window",
    "mark_read", "bound_unread", "certify", "read_uncertified",
    "measure", "measure_new", "compare_keys", "weigh_blocks", "scan_listed", "index_chunks",
    "summarise_queries", "scan", "select_keys", "see_tiles", "list_keys", "store_edges",
    "list_last", "count_levels", "list_groups", "deal_luck",
}  # fmt: skip
FOR_THE_HOST = {"POLICY", "CAPTURED", "RANKS_PAGES", "FLAT_TOKENS", "AUTOTUNE", "PAGE"}
FOR_THE_HOST |= {"SETTINGS", "ALWAYS", "SCALE", "SOFTCAP", "BIASED", "BY_HEAD", "BOUNDED"}
FOR_THE_HOST |= {"KEPT_0", "KEPT_1", "LISTED_ROOM", "LOADS", "ENTRY_BYTES"}
"""Names that launches look at, and no kernel."""


@pytest.fixture(params=list(SPECS))
def name(request):
    return request.param


def test_a_module_reads_as_it_did(name):
    source, file = emit_module(SPECS[name]), GOLDEN / f"{name}.py"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, encoding="utf-8")
    assert source == file.read_text(encoding="utf-8")


def test_no_module_is_left_over():
    assert {file.stem for file in GOLDEN.glob("*.py")} == set(SPECS)


def symbols(name):
    """Return the names that a module defines, and those its functions read from outside of them."""
    table = symtable.symtable(emit_module(SPECS[name]), name, "exec")
    defined = {each.get_name() for each in table.get_symbols() if each.is_assigned()}
    defined |= {each.get_name() for each in table.get_symbols() if each.is_imported()}
    read = {
        each.get_name()
        for function in table.get_children()
        for each in function.get_symbols()
        if each.is_global() and each.is_referenced()
    }
    return defined, read - set(dir(builtins))


def test_every_name_is_defined_and_used(name):
    defined, read = symbols(name)
    assert read <= defined
    assert defined - read - {"triton"} <= LAUNCHED | FOR_THE_HOST


def test_kernels_read_no_global_but_constants(name):
    """Triton refuses any other, which its interpreter does not."""
    scope: dict[str, object] = {}
    exec(_without_kernels(emit_module(SPECS[name])), scope)
    _, read = symbols(name)
    numbers = {each for each in read & set(scope) if each not in ("triton", "tl")}
    assert numbers
    assert {each for each in numbers if type(scope[each]).__name__ != "constexpr"} == set()


def _without_kernels(source):
    """Imports and constants alone."""
    body = ast.parse(source).body
    kept = (each for each in body if isinstance(each, ast.Import | ast.ImportFrom | ast.Assign))
    return "\n".join(ast.unparse(each) for each in kept)


@pytest.mark.thorough
def test_text_is_the_same_in_every_process():
    lines = """
import hashlib
from kernel_specs import SPECS
from lychee_compile.codegen.module import emit_module
digests = {name: hashlib.sha256(emit_module(each).encode()) for name, each in SPECS.items()}
print({name: digest.hexdigest() for name, digest in digests.items()})
"""
    printed = {
        subprocess.run(
            [sys.executable, "-c", lines], cwd=Path(__file__).parents[1] / "helpers",
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(printed) == 1
