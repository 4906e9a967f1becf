"""Policies that are compared: a name each, and options for policies in a special form."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import index_class, prefill_choice
from lychee_compile.options import OptionError, Options

NO_BOUNDARIES = torch.zeros(1, dtype=torch.uint8)
"""Tokenizer table for captures, whose boundary strengths come from their file."""


@dataclass(frozen=True)
class Variant:
    """Policy and the options with which it is measured."""

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of the backend besides policy and budget."""

    @property
    def label(self) -> str:
        """Name in tables and plots, which `parse` reads."""
        return ":".join((self.policy, *(f"{name}={value}" for name, value in self.options.items())))

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Return the variant that `text` names: "lychee", "lychee:recent=32:boundaries=fixed".

        Raise `OptionError` if `text` has another form or the backend refuses it.
        """
        policy, *settings = text.strip().split(":")
        options = {}
        for setting in settings:
            name, separator, value = setting.partition("=")
            if not (name and separator and value):
                raise OptionError(
                    f"policy {text!r}: expected NAME or NAME:option=value, got {setting!r} in it"
                )
            options[name.strip()] = literal(value.strip())
        variant = cls(policy, options)
        variant.backend_options(None)
        return variant

    def config(self, budget: int | None) -> IndexConfig:
        """Return the configuration of an index. Raise `OptionError` if the budget does not fit."""
        return self.backend_options(budget).index_config()

    def backend_options(self, budget: int | None, **more: Any) -> Options:
        """Return the options to compile with, `more` among them. Raise `OptionError` if wrong."""
        chosen = {**self.options, **more, "policy": self.policy, "budget": budget}
        if chosen.get("boundaries") == "tokens":
            chosen.setdefault("tokenizer", NO_BOUNDARIES)
        return Options.parse(None, chosen)

    def prefill_options(self, share: float) -> Options:
        """Return options for a prefill that reads a `share` of the keys. Raise `OptionError`."""
        return self.backend_options(None, prefill="sparse", prefill_budget=share)


def parse_variants(text: str) -> list[Variant]:
    """Return the policies that commas separate. Raise `OptionError` for wrong or repeated ones."""
    variants = [Variant.parse(part) for part in _split(text) if part.strip()]
    labels = [variant.label for variant in variants]
    if not labels:
        raise OptionError(f"--policies {text!r}: expected policies separated by commas")
    if len(set(labels)) < len(labels):
        raise OptionError(f"--policies {text!r}: a policy is named twice")
    return variants


def check_budgets(variants: Sequence[Variant], budgets: Sequence[int]) -> None:
    """Raise `OptionError` for a policy that cannot decode, or a budget that does not fit it."""
    for variant in variants:
        try:
            index_class(variant.policy)
        except ValueError as error:
            raise OptionError(str(error)) from error
        for budget in budgets:
            variant.config(budget)


def check_prefill(variants: Sequence[Variant]) -> None:
    """Raise `OptionError` for a policy without a prefill form."""
    for variant in variants:
        try:
            prefill_choice(variant.policy)
        except ValueError as error:
            raise OptionError(str(error)) from error


def describe(options: Options) -> dict[str, Any]:
    """Return the options of an index as plain values, for a record of a run."""
    kept = {each.name: getattr(options, each.name) for each in fields(IndexConfig)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()
    }


def literal(text: str) -> Any:
    """Return the Python value that `text` writes, or `text` itself if it writes none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _split(text: str) -> list[str]:
    """Split at commas outside brackets: `lychee:chunk=(8,16),quest`."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
