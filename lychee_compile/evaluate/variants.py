"""Which policies are compared: a name, with options where one is to run in a special form."""

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
"""Stands for a tokenizer where strengths come from elsewhere."""


@dataclass(frozen=True)
class Variant:
    """A policy as it is to be measured."""

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of the backend besides policy and budget."""

    @property
    def label(self) -> str:
        """What tables and plots call it, and what `parse` reads."""
        return ":".join((self.policy, *(f"{name}={value}" for name, value in self.options.items())))

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A policy's name, then options: "lychee", "lychee:recent=32:boundaries=fixed".

        Raises `OptionError` where the text is no such thing or the backend refuses it.
        """
        policy, *settings = text.strip().split(":")
        options = {}
        for setting in settings:
            name, separator, value = setting.partition("=")
            if not (name and separator and value):
                raise OptionError(
                    f"policy {text!r}: expected NAME or NAME:option=value, got {setting!r} in it"
                )
            options[name.strip()] = _literal(value.strip())
        variant = cls(policy, options)
        variant.backend_options(None)
        return variant

    def config(self, budget: int | None) -> IndexConfig:
        """What an index needs of it. Raises `OptionError` where the budget does not fit."""
        return self.backend_options(budget).index_config()

    def backend_options(self, budget: int | None, **more: Any) -> Options:
        """The options to compile with, `more` of them given. Raises `OptionError`."""
        given = {**self.options, **more, "policy": self.policy, "budget": budget}
        if given.get("boundaries") == "tokens":
            given.setdefault("tokenizer", NO_BOUNDARIES)
        return Options.parse(None, given)

    def whole_options(self, share: float) -> Options:
        """The options for whole sequences, which read that share of the keys. `OptionError`."""
        return self.backend_options(None, prefill="sparse", prefill_budget=share)


def parse_variants(text: str) -> list[Variant]:
    """Policies separated by commas. Raises `OptionError` for a wrong one, or one named twice."""
    variants = [Variant.parse(part) for part in _split(text) if part.strip()]
    labels = [variant.label for variant in variants]
    if not labels:
        raise OptionError(f"--policies {text!r}: expected policies separated by commas")
    if len(set(labels)) < len(labels):
        raise OptionError(f"--policies {text!r}: a policy is named twice")
    return variants


def check_budgets(variants: Sequence[Variant], budgets: Sequence[int]) -> None:
    """Raise `OptionError` for a policy that cannot decode, or a budget that it cannot have."""
    for variant in variants:
        try:
            index_class(variant.policy)
        except ValueError as error:
            raise OptionError(str(error)) from error
        for budget in budgets:
            variant.config(budget)


def check_whole(variants: Sequence[Variant]) -> None:
    """Raise `OptionError` for a policy that has no form for whole sequences."""
    for variant in variants:
        try:
            prefill_choice(variant.policy)
        except ValueError as error:
            raise OptionError(str(error)) from error


def describe(options: Options) -> dict[str, Any]:
    """Options as plain values, for a record of a run; those that hold objects are left out."""
    kept = {each.name: getattr(options, each.name) for each in fields(IndexConfig)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()
    }


def _literal(text: str) -> Any:
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
