"""Installation of the libraries into a folder of their own, with PyTorch left as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import torch


def install(packages: Sequence[str], folder: Path) -> str:
    """Install those packages that `folder` lacks, and return an error of pip; empty if it worked.

    Dependencies are not installed: those that a model needs are listed beside its library.
    """
    have = versions(folder)
    lacking = [each for each in packages if _normal(each) not in have]
    if not lacking:
        return ""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    wanted = [_matching_torch(each) for each in lacking]
    done = subprocess.run(
        [*command, str(folder), *wanted], capture_output=True, text=True, check=False
    )
    for operators in folder.glob("torchaudio/lib/_torchaudio.*"):
        operators.unlink()  # they need a GPU's libraries; without them its models run in Python
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or [done.stderr])[-1]


def versions(folder: Path) -> dict[str, str]:
    """Return the version of every package in `folder`, by its normal name."""
    found = distributions(path=[str(folder)])
    return {_normal(each.metadata["Name"]): each.version for each in found}


def version(package: str, folder: Path) -> str:
    """Return the version of a package in `folder`; empty if it is not there."""
    return versions(folder).get(_normal(package), "")


def _normal(package: str) -> str:
    name = re.split(r"[<>=!~\[]", package)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def _matching_torch(package: str) -> str:
    """Return the requirement of a package; torchvision's minor version follows PyTorch's."""
    minor = int(torch.__version__.split(".")[1])
    return f"torchvision==0.{minor + 15}.*" if package == "torchvision" else package
