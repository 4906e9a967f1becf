"""The version is in one place, and what a release is made of says the same."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import lychee_compile
from tools.links import ROOT


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_written_once():
    settings = project()
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "lychee_compile.__version__"
    }


def test_the_changelog_and_the_citation_are_of_this_version():
    version = lychee_compile.__version__
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"lychee_compile-{version}-" in (ROOT / "README.md").read_text("utf-8")


def test_the_changelog_is_sorted_by_kind():
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    kinds = re.findall(r"^### (.*)", page, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_package_imports_without_torch():
    code = "import sys, lychee_compile as l; print(l.__version__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [lychee_compile.__version__, "False"]


def test_the_wheel_has_every_file_of_the_package_and_no_other():
    settings = project()["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["lychee_compile*"]
    patterns = settings["package-data"]["lychee_compile"]
    package = ROOT / "lychee_compile"
    chosen = {path for pattern in patterns for path in package.glob(pattern)}
    files = [path for path in package.rglob("*") if path.is_file()]
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == chosen
    assert package / "py.typed" in chosen
    modules = [path for path in package.rglob("*.py") if "__pycache__" not in path.parts]
    assert all((path.parent / "__init__.py").is_file() for path in modules)
