"""The page of benchmarks is true: every command exists, and every command is on the page."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MOST_FILES = 12
"""Python files flat in any folder."""


def commands() -> list[str]:
    """Return the commands in the tables of the page."""
    page = (BENCHMARKS / "README.md").read_text("utf-8")
    return re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)


def module_of(command: str) -> str | None:
    """Return the benchmark that a command runs."""
    match = re.search(r"-m (benchmarks\.[\w.]+)", command)
    return match[1] if match else None


def source_of(module: str) -> Path:
    """Return the file that `python -m module` runs."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


MODULES = sorted({module for command in commands() if (module := module_of(command))})


def runs(path: Path) -> bool:
    return path.name == "__main__.py" or "__main__" in path.read_text("utf-8")


def test_every_benchmark_is_on_the_page():
    assert {source_of(module) for module in MODULES} == {
        path for path in BENCHMARKS.rglob("*.py") if runs(path)
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_command_has_a_main_and_a_description(module):
    tree = ast.parse(source_of(module).read_text("utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    page = ast.get_docstring(tree)
    assert page
    assert f"-m {module}" in page


def test_options_on_the_page_exist():
    """Each option of a command is one that its parser is told of."""
    for command in commands():
        module = module_of(command)
        if module is not None:
            folder = source_of(module).parent
            text = "".join(path.read_text("utf-8") for path in folder.glob("*.py"))
            words = shlex.split(command)
            behind = words[words.index(module) + 1 :]
            assert all(f'"{word}"' in text for word in behind if word.startswith("--")), command


@pytest.mark.parametrize(
    "module",
    [
        each
        if each == "benchmarks.sanitized_kernels"
        else pytest.param(each, marks=pytest.mark.thorough)
        for each in MODULES
    ],
)
def test_a_command_has_help(module):
    line = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "--help" in shown.stdout


def test_every_module_can_be_imported():
    """Without a GPU: what they take from the package is still there."""
    for path in BENCHMARKS.rglob("*.py"):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize(
    "path", sorted(BENCHMARKS.rglob("__main__.py")), ids=lambda path: path.parent.name
)
def test_no_main_of_a_package_starts_processes(path):
    """A spawned process imports no `__main__` of a package, and so no function of it."""
    assert not {"multiprocessing", "concurrent.futures"} & imports(path)


def test_modules_and_files_on_the_page_exist():
    for command in commands():
        for path in re.findall(r"tests/\S+", command):
            assert (ROOT / path).exists()
        for package in re.findall(r"python -m (lychee_compile)", command):
            assert importlib.util.find_spec(package)


def imports(path: Path) -> set[str]:
    """Return modules that a file imports, by name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
    return names


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: str(path.name))
def test_no_benchmark_imports_from_anothers_folder(path):
    folder = path.relative_to(ROOT).parts[1]
    allowed = {"common", folder.removesuffix(".py")}
    for name in imports(path):
        if name.startswith("benchmarks."):
            assert name.split(".")[1] in allowed, name


def test_folders_stay_small():
    for folder in {path.parent for path in BENCHMARKS.rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES


def test_results_name_devices_and_no_targets():
    for page in (BENCHMARKS / "results").glob("*.md"):
        text = page.read_text("utf-8")
        assert page.name == "README.md" or "Device: " in text
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
        assert not re.search(r"\b(must|goal|goals):", text)
