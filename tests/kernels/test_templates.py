"""Templates of kernels and the library that modules copy functions from."""

from __future__ import annotations

import ast
import re
from importlib import resources

import pytest
from jinja2 import UndefinedError
from kernel_specs import SPECS

from lychee_compile.codegen import triton_lib
from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.rendering import library, render

CODEGEN = resources.files(triton_lib.__package__).parent
TEMPLATES = {
    file.relative_to(CODEGEN / "templates").as_posix(): file.read_text(encoding="utf-8")
    for file in (CODEGEN / "templates").glob("*/*.jinja")
}
LIBRARY = {
    file.stem: file.read_text(encoding="utf-8") for file in (CODEGEN / "triton_lib").glob("*.py")
}
KERNEL = re.compile(r"^@triton\.jit.*\ndef (\w+)\((.*?)\):$", re.MULTILINE | re.DOTALL)
LEGEND = re.compile(r"\{#.*?#\}", re.DOTALL)


def test_a_hole_without_a_value_is_refused():
    with pytest.raises(UndefinedError, match="fits_32"):
        render("decode/due.py.jinja", {})


def test_functions_are_copied_with_their_decorators():
    (listed,) = library("prefill_groups", "list_last")
    assert listed.startswith("@triton.jit(do_not_specialize=[")
    assert "def list_last(" in listed


def test_every_function_of_the_library_is_in_some_module():
    modules = "".join(emit_module(spec) for spec in SPECS.values())
    functions = {
        each.name: file
        for file, text in LIBRARY.items()
        if file != "names"
        for each in ast.parse(text).body
        if isinstance(each, ast.FunctionDef)
    }
    assert functions
    unused = {name for name, file in functions.items() if library(file, name)[0] not in modules}
    assert unused == {"bins_of"}  # for kernels of one's own, see `emit_selection`


def test_the_library_imports_nothing_of_ours_when_it_runs():
    """Only checkers and editors read it as Python: names of the module around are not defined."""
    imports = {
        each.module
        for text in LIBRARY.values()
        for each in ast.parse(text).body
        if isinstance(each, ast.ImportFrom)
    }
    assert imports <= {"__future__", "typing"}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_legend_names_every_parameter(name):
    text = TEMPLATES[name]
    assert text.startswith("{#")
    used = re.findall(r'{% (?:from|extends) "([^"]+)"', text)
    legends = "".join("".join(LEGEND.findall(each)) for each in (text, *map(TEMPLATES.get, used)))
    words = set(re.findall(r"\w+", legends))
    for _, signature in KERNEL.findall(text):
        names = re.findall(r"\w+", re.sub(r"\{.*?\}|: tl\.constexpr", "", signature))
        assert {each for each in names if "_stride_" not in each} <= words
