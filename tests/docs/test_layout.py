"""Folders stay small, signatures stay short, and imports run one way.

Counted are the Python files that lie directly in a folder, not those in folders below, and without
`__init__.py`.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.links import ROOT

PACKAGE = ROOT / "lychee_compile"
MOST_FILES = {"lychee_compile": 14, "passes": 14, "kernels": 14, "tests": 12, "benchmarks": 12}
"""Most files that lie directly in a folder."""
MOST_FILES_BELOW = 16
"""Most files that lie directly in any folder below passes/ and kernels/."""
MOST_PARAMETERS = 9
LIBRARIES = {"kernels/reference"}
"""Folders of many small files that depend on each other and on nothing else: a flat library."""


def python_files(folder):
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


def folders_below(folder):
    return [path.parent for path in sorted(folder.glob("**/__init__.py"))]


@pytest.mark.parametrize("name", list(MOST_FILES))
def test_few_files_lie_flat_in_the_large_folders(name):
    folder = PACKAGE / name if name in ("passes", "kernels") else ROOT / name
    assert len(python_files(folder)) <= MOST_FILES[name]


@pytest.mark.parametrize(
    "folder",
    [*folders_below(PACKAGE / "passes"), *folders_below(PACKAGE / "kernels")],
    ids=lambda folder: folder.relative_to(PACKAGE).as_posix(),
)
def test_few_files_lie_flat_in_the_folders_below(folder):
    if folder.relative_to(PACKAGE).as_posix() in LIBRARIES:
        pytest.skip("a flat library")
    assert len(python_files(folder)) <= MOST_FILES_BELOW


def test_signatures_are_short():
    long = []
    for path in PACKAGE.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not is_kernel_or_operator(node):
                count = parameters(node)
                if count > MOST_PARAMETERS:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count}")
    assert long == []


def parameters(function):
    """Count the parameters of a function, without self and cls."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_kernel_or_operator(function):
    """True for Triton kernels, registered operators, and the fakes of such."""
    words = " ".join(ast.unparse(each) for each in function.decorator_list)
    return any(word in words for word in ("triton.jit", "custom_op", "register_fake"))


def test_imports_keep_the_contracts():
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("import-linter is not installed: it is in the extra dev")
    done = subprocess.run(
        [linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
