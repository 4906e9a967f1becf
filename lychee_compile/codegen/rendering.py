"""Triton source: templates that are filled, and functions that are copied as they stand.

`templates/` has the kernels that depend on a site, a jinja template each; it begins with a legend.
`triton_lib/` has the functions that are the same in every module, as ordinary Python files.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, values: Mapping[str, object]) -> str:
    """Return the text of a template, such as "decode/attend_to.py.jinja", with its holes filled.

    Raises jinja2.UndefinedError if `values` lack a name that the template reads.
    """
    return _environment().get_template(template).render(values)


def render_text(text: str, values: Mapping[str, object]) -> str:
    """Return `text`, a template that may extend and import those of `templates/`, filled.

    Raises jinja2.UndefinedError if `values` lack a name that the text reads.
    """
    return _environment().from_string(text).render(values)


def library(file: str, *names: str) -> list[str]:
    """Return the source of functions of one file of `triton_lib`, with their decorators."""
    functions = _functions(file)
    return [functions[name] for name in names]


@cache
def _environment() -> Environment:
    return Environment(  # the text is Python, which must not be escaped as HTML
        loader=PackageLoader("lychee_compile.codegen"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


@cache
def _functions(file: str) -> dict[str, str]:
    """Return the source of each function in a file of `triton_lib`, by name."""
    path = resources.files("lychee_compile.codegen.triton_lib") / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    return {
        each.name: "\n".join(lines[each.decorator_list[0].lineno - 1 : each.end_lineno])
        for each in ast.parse(text).body
        if isinstance(each, ast.FunctionDef)
    }
