"""One run of the command: loading, measuring, showing and writing the results."""

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
"""Number of characters that make a token on average, at most."""
PACKAGES = ("torch", "transformers", "lychee_compile")


class Session:
    """Model, captures and results that the subjects of one run share."""

    def __init__(self, settings: argparse.Namespace, console: Console) -> None:
        self.settings = settings
        self._console = console
        self._taken: dict[tuple[str, tuple[int, ...]], Capture] = {}
        self.results: dict[str, Any] = {
            "command": settings.command_line,
            "environment": environment(settings.device),
        }
        """All results so far, for JSON."""

    @cached_property
    def model(self) -> LanguageModel:
        """Model, loaded when it is first needed. Raise `EvaluationError` if it cannot be loaded."""
        if self.settings.model is None:
            raise EvaluationError(
                "--model is needed: a folder in which transformers saved a causal language model "
                "with its tokenizer, or the name of one"
            )
        with self._stage(f"Loading {self.settings.model}", 1):
            return load(self.settings.model, self.settings.device, self.settings.dtype)

    def fidelity(self) -> None:
        """Measure captured mass, error and certificates of every policy at every budget."""
        results = [self._replay(each, self.settings.policies) for each in self._captures()]
        for result in results:
            self._console.print(tables.fidelity_table(result))
            self._console.print(tables.sites_table(result))
        self._keep("fidelity", [result.to_dict() for result in results])
        self._draw("mass_against_budget.png", plots.plot_mass, results)
        self._draw("error_against_bytes.png", plots.plot_error, results)

    def text(self) -> None:
        """Compare boundary-aware with fixed chunks, by kind of text."""
        variants = [
            Variant(variant.policy, {**variant.options, "boundaries": boundaries})
            for variant in self.settings.policies
            for boundaries in self.settings.boundaries
        ]
        results = [self._replay(each, variants) for each in self._captures()]
        self._console.print(tables.text_table(results))
        self._keep("text", [result.to_dict() for result in results])
        self._draw("mass_by_text.png", plots.plot_mass, results)

    def drift(self) -> None:
        """Measure error against generated tokens."""
        settings = self.settings
        positions = checkpoint_positions(
            settings.prompt, settings.length, settings.every, settings.queries
        )
        results: list[DriftResult] = []
        for each in self._captures(positions):
            checkpoints = count_checkpoints(each) * len(each.sites)
            with self._stage(f"Following {each.text} ({len(each.token_ids):,})", checkpoints) as on:
                results.append(
                    drift(each.to(settings.device), settings.policies, settings.budget, on)
                )
        for result in results:
            self._console.print(tables.drift_table(result))
        self._keep("drift", [result.to_dict() for result in results])
        self._draw("error_against_generated.png", plots.plot_drift, results)

    def tasks(self) -> None:
        """Ask questions about long documents."""
        settings = self.settings
        ways = 1 + len(settings.policies) * len(settings.budgets)
        asked = len(settings.tasks) * settings.repeats
        model, results = self.model, list[TaskResult]()
        for length in settings.lengths:
            label = f"Asking {asked} questions about {length:,} tokens"
            with self._stage(label, asked * ways) as on:
                result = run_tasks(
                    model,
                    settings.tasks,
                    settings.policies,
                    settings.budgets,
                    length=length,
                    repeats=settings.repeats,
                    seed=settings.seed,
                    kernels=settings.kernels,
                    advance=on,
                )
            results.append(result)
            self._console.print(tables.tasks_table(result))
            self._keep("tasks", [each.to_dict() for each in results])
            number = "" if len(settings.lengths) == 1 else f"-{length}"
            self._draw(f"answers_against_budget{number}.png", plots.plot_tasks, result)
        if len(results) > 1:
            self._console.print(tables.lengths_table(results))

    def prefill(self) -> None:
        """Measure captured mass and error of prefill, against the share of pairs computed."""
        positions = tile_positions(self.settings.length, self.settings.tiles)
        captures = self._captures(positions, capture_prefill)
        results = [self._measure_prefill(each) for each in captures]
        for result in results:
            self._console.print(tables.prefill_table(result))
            self._console.print(tables.sites_table(result))
        self._keep("prefill", [result.to_dict() for result in results])
        self._draw("error_against_pairs.png", plots.plot_prefill, results)

    def _measure_prefill(self, captured: Capture) -> PrefillResult:
        tiles, chosen = len(tiles_of(captured)) * len(captured.sites), self.settings
        label = f"Attending to {captured.text} ({len(captured.token_ids):,} tokens)"
        with self._stage(label, tiles) as on:
            return prefill(captured.to(chosen.device), chosen.policies, chosen.shares, on)

    def _captures(
        self, positions: Sequence[int] | None = None, take: Callable[..., Capture] = capture
    ) -> list[Capture]:
        """Return captures from files or of the chosen texts, at `positions` or the last ones."""
        settings = self.settings
        if settings.capture:
            return [Capture.load(path) for path in settings.capture]
        if positions is None:
            positions = last_positions(settings.length, settings.steps)
        return [self._capture_once(source, tuple(positions), take) for source in settings.text]

    def _capture_once(
        self, source: str, positions: tuple[int, ...], take: Callable[..., Capture]
    ) -> Capture:
        """Return the capture of a text at `positions`, taken once for all subjects."""
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
            captured = take(
                model.model,
                ids,
                positions,
                strengths=model.boundaries.lookup(ids),
                sites=self.settings.sites,
                name=model.name,
                text=kind,
                advance=on,
            )
        if self.settings.save_captures:
            suffix = "-prefill" if take is capture_prefill else ""
            captured.save(self.settings.out / "captures" / f"{kind}-{length}{suffix}.safetensors")
        return captured

    def _replay(self, captured: Capture, variants: Sequence[Variant]) -> FidelityResult:
        queries = len(captured.positions) * len(captured.sites)
        label = f"Replaying {captured.text} ({len(captured.token_ids):,} tokens)"
        with self._stage(label, queries) as on:
            return fidelity(captured.to(self.settings.device), variants, self.settings.budgets, on)

    def _stage(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return stage(self._console, label, total)

    def _keep(self, section: str, result: Any) -> None:
        """Write all results so far, so that a long run that breaks off leaves some."""
        self.results[section] = result
        path = self.settings.out / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        self._console.print(f"Results: {path}", markup=False)

    def _draw(self, name: str, plot: Callable[..., None], results: Any) -> None:
        path: Path = self.settings.out / name
        plot(path, results)
        self._console.print(f"Picture: {path}", markup=False)


def environment(device: str) -> dict[str, str]:
    """Return device and versions that a result depends on, by name."""
    names = {"python": platform.python_version(), "device": device}
    if torch.device(device).type == "cuda":
        names["device"] = torch.cuda.get_device_name(device)
    for package in PACKAGES:
        try:
            names[package] = version(package)
        except PackageNotFoundError:
            continue
    return names
