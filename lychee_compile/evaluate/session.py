"""One run of the command: loads what is needed once, measures, shows and writes the results."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lychee_compile.evaluate import plots, tables
from lychee_compile.evaluate.capture import capture, last_positions
from lychee_compile.evaluate.drift import (
    DriftResult,
    checkpoint_positions,
    count_checkpoints,
    drift,
)
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.fidelity import FidelityResult, fidelity
from lychee_compile.evaluate.models import LanguageModel, load
from lychee_compile.evaluate.prefill import PrefillResult, prefill, tiles_of
from lychee_compile.evaluate.prefill_capture import capture_prefill, tile_positions
from lychee_compile.evaluate.progress import stage
from lychee_compile.evaluate.tasks import TaskResult, run_tasks
from lychee_compile.evaluate.tensors import Capture
from lychee_compile.evaluate.texts import read_text
from lychee_compile.evaluate.variants import Variant

LONGEST_TOKEN = 16
"""Characters of text that are enough for a token, on average."""
PACKAGES = ("torch", "transformers", "lychee_compile")


class Session:
    """What the subcommands share."""

    def __init__(self, given: argparse.Namespace, console: Console) -> None:
        self.given = given
        self._console = console
        self._taken: dict[tuple[str, tuple[int, ...]], Capture] = {}
        self._results: dict[str, Any] = {
            "command": given.command_line,
            "environment": environment(given.device),
        }

    @cached_property
    def model(self) -> LanguageModel:
        """The model, loaded when it is first needed. Raises `EvaluationError`."""
        if self.given.model is None:
            raise EvaluationError(
                "--model is needed: a folder in which transformers saved a causal language model "
                "with its tokenizer, or the name of one"
            )
        with self._stage(f"Loading {self.given.model}", 1):
            return load(self.given.model, self.given.device, self.given.dtype)

    def fidelity(self) -> None:
        """Captured mass, error and certificates of every policy at every budget."""
        results = [self._replay(each, self.given.policies) for each in self._captures()]
        for result in results:
            self._console.print(tables.fidelity_table(result))
            self._console.print(tables.sites_table(result))
        self._keep("fidelity", [result.to_dict() for result in results])
        self._draw("mass_against_budget.png", plots.plot_mass, results)
        self._draw("error_against_bytes.png", plots.plot_error, results)

    def text(self) -> None:
        """Boundary-aware against fixed chunks, by kind of text."""
        variants = [
            Variant(variant.policy, {**variant.options, "boundaries": boundaries})
            for variant in self.given.policies
            for boundaries in self.given.boundaries
        ]
        results = [self._replay(each, variants) for each in self._captures()]
        self._console.print(tables.text_table(results))
        self._keep("text", [result.to_dict() for result in results])
        self._draw("mass_by_text.png", plots.plot_mass, results)

    def drift(self) -> None:
        """Error against generated tokens."""
        given = self.given
        positions = checkpoint_positions(given.prompt, given.length, given.every, given.queries)
        results: list[DriftResult] = []
        for each in self._captures(positions):
            checkpoints = count_checkpoints(each) * len(each.sites)
            with self._stage(f"Following {each.text} ({len(each.token_ids):,})", checkpoints) as on:
                results.append(drift(each.to(given.device), given.policies, given.budget, on))
        for result in results:
            self._console.print(tables.drift_table(result))
        self._keep("drift", [result.to_dict() for result in results])
        self._draw("error_against_generated.png", plots.plot_drift, results)

    def tasks(self) -> None:
        """Questions about long documents."""
        given = self.given
        ways = 1 + len(given.policies) * len(given.budgets)
        total = len(given.tasks) * given.repeats * ways
        model = self.model
        with self._stage(f"Asking {len(given.tasks) * given.repeats} questions", total) as on:
            result = run_tasks(
                model,
                given.tasks,
                given.policies,
                given.budgets,
                length=given.length,
                repeats=given.repeats,
                seed=given.seed,
                advance=on,
            )
        self._show_tasks(result)

    def prefill(self) -> None:
        """Captured mass and error of whole sequences, against the share of pairs computed."""
        positions = tile_positions(self.given.length, self.given.tiles)
        taken = self._captures(positions, capture_prefill)
        results = [self._read_whole(each) for each in taken]
        for result in results:
            self._console.print(tables.prefill_table(result))
            self._console.print(tables.prefill_sites_table(result))
        self._keep("prefill", [result.to_dict() for result in results])
        self._draw("error_against_pairs.png", plots.plot_prefill, results)

    def _read_whole(self, taken: Capture) -> PrefillResult:
        tiles = len(tiles_of(taken)) * len(taken.sites)
        label = f"Attending to {taken.text} ({len(taken.token_ids):,} tokens)"
        with self._stage(label, tiles) as on:
            given = self.given
            return prefill(taken.to(given.device), given.policies, given.shares, on)

    def _show_tasks(self, result: TaskResult) -> None:
        self._console.print(tables.tasks_table(result))
        self._keep("tasks", result.to_dict())
        self._draw("answers_against_budget.png", plots.plot_tasks, result)

    def _captures(
        self, positions: Sequence[int] | None = None, take: Callable[..., Capture] = capture
    ) -> list[Capture]:
        """Captures as files, or else of the texts asked for, at the last positions unless given."""
        given = self.given
        if given.capture:
            return [Capture.load(path) for path in given.capture]
        if positions is None:
            positions = last_positions(given.length, given.steps)
        return [self._capture_once(source, tuple(positions), take) for source in given.text]

    def _capture_once(
        self, source: str, positions: tuple[int, ...], take: Callable[..., Capture]
    ) -> Capture:
        """Subjects that ask for the same share a capture."""
        if (source, positions) not in self._taken:
            self._taken[source, positions] = self._capture(source, positions, take)
        return self._taken[source, positions]

    def _capture(
        self, source: str, positions: Sequence[int], take: Callable[..., Capture]
    ) -> Capture:
        kind, text = read_text(source)
        model, length = self.model, positions[-1] + 1
        if model.longest is not None and length > model.longest:
            raise EvaluationError(
                f"--length {length}: {model.name} was made for {model.longest:,} tokens"
            )
        ids = model.encode(text[: LONGEST_TOKEN * length])[:length]
        if len(ids) < length:
            raise EvaluationError(f"--length {length}: the text {kind} has {len(ids):,} tokens")
        with self._stage(f"Capturing {kind}", length) as on:
            taken = take(
                model.model,
                ids,
                positions,
                strengths=model.boundaries.lookup(ids),
                sites=self.given.sites,
                name=model.name,
                text=kind,
                advance=on,
            )
        if self.given.save_captures:
            whole = "-prefill" if take is capture_prefill else ""
            taken.save(self.given.out / "captures" / f"{kind}-{length}{whole}.safetensors")
        return taken

    def _replay(self, taken: Capture, variants: Sequence[Variant]) -> FidelityResult:
        queries = len(taken.positions) * len(taken.sites)
        label = f"Replaying {taken.text} ({len(taken.token_ids):,} tokens)"
        with self._stage(label, queries) as on:
            return fidelity(taken.to(self.given.device), variants, self.given.budgets, on)

    def _stage(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return stage(self._console, label, total)

    def _keep(self, section: str, result: Any) -> None:
        """Write all results so far: a long run that breaks off has not been for nothing."""
        self._results[section] = result
        path = self.given.out / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._results, indent=1) + "\n", encoding="utf-8")
        self._console.print(f"Results: {path}", markup=False)

    def _draw(self, name: str, plot: Callable[..., None], results: Any) -> None:
        path: Path = self.given.out / name
        plot(path, results)
        self._console.print(f"Picture: {path}", markup=False)


def environment(device: str) -> dict[str, str]:
    """What a result depends on besides the command."""
    found = {"python": platform.python_version(), "device": device}
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
