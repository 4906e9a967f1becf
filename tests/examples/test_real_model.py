"""A real model over a real text: what dense attention finds, sparse decoding finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
@pytest.mark.model
def test_pass_keys_are_found_through_every_entry() -> None:
    command = [sys.executable, "-m", "benchmarks.quality.pass_key", "--positions", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "2 of 2" in finished.stdout
