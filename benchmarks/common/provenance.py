"""Device, versions, commit and command of a measurement, and the JSON file that keeps them."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(module: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Return what a measurement by `python -m module *arguments` depends on, by name."""
    return {
        "device": device_name(device),
        "command": command_line(module, arguments),
        "commit": commit(),
        "versions": versions(),
    }


def command_line(module: str, arguments: Sequence[str]) -> str:
    """Return the command that runs `module` with `arguments`, quoted for a shell."""
    return shlex.join(["python", "-m", module, *arguments])


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the kind of processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Return the versions that times depend on, by package; None if a package is missing."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "lychee_compile": _version("lychee_compile"),
    }


def commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files differ; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON into `path`, whose folder is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
