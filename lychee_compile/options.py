"""Options of the backend: typed and validated, with errors that say what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor

from lychee_compile.boundaries import BoundaryTable, boundary_table, is_tokenizer
from lychee_compile.kernels.config import ALL_KEYS, BOUNDARIES, PREFILLS, IndexConfig
from lychee_compile.kernels.policies.registry import find_policy, policies

LONGEST_CHUNK = 256
_AT_LEAST = {
    "sinks": 0,
    "recent": 1,
    "cluster_chunks": 1,
    "coarse_units": 1,
    "overfetch": 1,
    "flat_tokens": 0,
    "prefill_from": 0,
}

_tables: WeakKeyDictionary[Any, BoundaryTable] = WeakKeyDictionary()


class OptionError(ValueError):
    """An option that does not exist, or a value that it cannot have."""


@dataclass(frozen=True)
class Options(IndexConfig):
    """Every option of `torch.compile(model, backend="lychee", options={...})`.

    They are those of `IndexConfig` and the ones below. Raises `OptionError` (a ValueError) for an
    unknown name, and for a value of the wrong type or out of range.
    """

    tokenizer: object = field(default=None, kw_only=True, hash=False, repr=False)
    """Source of the token boundaries: a tokenizer, a `BoundaryTable`, or the strengths of all
    tokens as a uint8 tensor [vocab]."""
    mode: str | None = field(default=None, kw_only=True)
    """Mode of Inductor, such as "reduce-overhead"."""
    strict: bool = field(default=False, kw_only=True)
    """Raise an error if an attention would be left as it is."""
    inductor: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)
    """Options of Inductor, for compilations of this backend alone."""

    def __new__(cls, *_: object, **named: object) -> Self:
        """Refuse unknown names here: the generated `__init__` would not name the nearest one."""
        check_names(named)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Validate and normalise, each option alone and then together."""
        if self.budget is not None:
            self._set("budget", integer("budget", self.budget, at_least=1, expected_or="None"))
        for name, least in _AT_LEAST.items():
            self._set(name, integer(name, getattr(self, name), at_least=least))
        self._set("seed", integer("seed", self.seed, at_least=0, at_most=2**63 - 1))
        self._set("chunk", _chunk(self.chunk))
        one_of("boundaries", self.boundaries, BOUNDARIES)
        one_of("policy", self.policy, tuple(each.name for each in policies()))
        self._set("tokenizer", _token_source(self.tokenizer))
        _check_mode(self.mode)
        self._set("epsilon", _share("epsilon", self.epsilon))
        self._set("coverage", _share("coverage", self.coverage, whole=True))
        if self.dense_layers is not None:
            least = integer("dense_layers", self.dense_layers, at_least=0, expected_or="None")
            self._set("dense_layers", least)
        for name in ("strict", "reference", "repair"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.draw is not None and not isinstance(self.draw, bool):
            raise _wrong("draw", self.draw, "True, False or None")
        one_of("prefill", self.prefill, PREFILLS)
        self._set("prefill_budget", _share_or_number("prefill_budget", self.prefill_budget))
        coverage = _share("prefill_coverage", self.prefill_coverage, whole=True)
        self._set("prefill_coverage", coverage)
        self._set("inductor", _inductor_patches(self.inductor))
        self._check_together()

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        return self

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Return the options in the keyword arguments that torch.compile passes to a backend."""
        named = dict(options or {})
        check_names(named)
        inner = named.get("mode")
        if mode is not None and inner is not None and mode != inner:
            raise OptionError(f"mode={mode!r} and options['mode']={inner!r} contradict each other")
        return cls(**{**named, "mode": mode if inner is None else inner})

    def index_config(self) -> IndexConfig:
        """Return the settings of sparse attention alone: graphs share an index if they agree."""
        return IndexConfig(**{each.name: getattr(self, each.name) for each in fields(IndexConfig)})

    def boundary_table(self) -> BoundaryTable | None:
        """Return the token boundaries; None without a tokenizer."""
        if self.tokenizer is None or isinstance(self.tokenizer, BoundaryTable):
            return self.tokenizer
        try:
            table = _tables.get(self.tokenizer)
        except TypeError:  # neither hashable nor weakly referable: nothing to remember it by
            return boundary_table(self.tokenizer)
        if table is None:
            table = _tables[self.tokenizer] = boundary_table(self.tokenizer)
        return table

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        shortest, longest = self.chunk
        if longest > self.recent:
            raise OptionError(
                f"option recent={self.recent} must be at least the longest chunk, {longest} "
                f"(chunk=({shortest}, {longest})): the last tokens are not in a chunk yet"
            )
        self._check_budget()
        if self.coverage is not None and self.epsilon is not None:
            raise OptionError(
                f"options coverage={self.coverage} and epsilon={self.epsilon} contradict each "
                "other: coverage reads fewer tokens by an estimate, epsilon more by a proof; give "
                "one of them"
            )
        if self.prefill_coverage is not None and self.epsilon is not None:
            raise OptionError(
                f"options prefill_coverage={self.prefill_coverage} and epsilon={self.epsilon} "
                "contradict each other: with epsilon a prefill draws no keys; give one of them"
            )
        self._check_draw()
        if self.boundaries == "tokens" and self.tokenizer is None:
            raise OptionError(
                'option boundaries="tokens" needs option tokenizer: a tokenizer, a BoundaryTable, '
                'or a uint8 tensor [vocab]; without one use boundaries="auto" or "similarity"'
            )

    def _check_draw(self) -> None:
        if not self.draw:
            return
        if self.policy != "lychee":
            raise OptionError(
                f'option draw=True needs policy="lychee", not policy={self.policy!r}, which has no '
                "estimate of each token's share to draw by"
            )
        for name in ("coverage", "epsilon"):
            if getattr(self, name) is not None:
                raise OptionError(
                    f"options draw=True and {name}={getattr(self, name)} contradict each other: "
                    "tokens that are drawn stand for others, so that the share that is read "
                    "neither ends nor widens a choice"
                )

    def _check_budget(self) -> None:
        always = self.sinks + self.recent
        if self.budget is not None and self.budget <= always:
            raise OptionError(
                f"option budget={self.budget} is too small: sinks ({self.sinks}) + recent "
                f"({self.recent}) = {always} tokens are always read, so give at least "
                f"{always + 1}, or None to read all tokens"
            )
        policy = find_policy(self.policy)
        if self.budget is None or policy is None or policy.levels is None:
            return
        least = policy.levels.least_budget(self.sinks, self.recent)
        if self.budget < least:
            raise OptionError(
                f"option budget={self.budget} is too small for policy {self.policy!r}: with what "
                f"it always reads, a group of {policy.levels.last_size} tokens that it reads whole "
                f"needs at least {least}; give that, or None to read all tokens"
            )


def check_names(names: Collection[str], more: Collection[str] = ()) -> None:
    """Raise `OptionError` for names that are neither those of options nor among `more`."""
    known = [*more, *(each.name for each in fields(Options))]
    for name in names:
        if name not in known:
            raise OptionError(
                f"unknown option {name!r}{_did_you_mean(name, known)}; known are {', '.join(known)}"
            )


def _did_you_mean(value: object, known: Collection[str | None]) -> str:
    """Return a guess to append to a message, empty if no name is near."""
    names = [each for each in known if each is not None]
    near = difflib.get_close_matches(str(value), names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _wrong(name: str, value: object, expected: str) -> OptionError:
    return OptionError(f"option {name}={value!r} ({type(value).__name__}): expected {expected}")


def integer(
    name: str, value: object, at_least: int, at_most: int | None = None, expected_or: str = ""
) -> int:
    """Return an integer within bounds. Raises `OptionError` for anything else."""
    upper = f" and at most {at_most}" if at_most is not None else ""
    expected = f"an integer of at least {at_least}{upper}"
    if expected_or:
        expected += f", or {expected_or}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, value, expected)
    number = int(value)
    if number < at_least or (at_most is not None and number > at_most):
        raise _wrong(name, number, expected)
    return number


def _share(name: str, value: object, whole: bool = False) -> float | None:
    """Return a share below 1, or up to 1 if it may be the `whole`; None stays None."""
    if value is None:
        return None
    expected = f"a number above 0 and {'up to' if whole else 'below'} 1, or None"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, value, expected)
    share = float(value)
    if not (0 < share < 1 or (whole and share == 1)):
        raise _wrong(name, value, expected)
    return share


def _share_or_number(name: str, value: object) -> int | float:
    if not isinstance(value, bool) and isinstance(value, Real):
        if isinstance(value, Integral) and int(value) >= 1:
            return int(value)
        if not isinstance(value, Integral) and 0 < float(value) <= 1:
            return ALL_KEYS if float(value) == 1 else float(value)
    expected = "a number of tokens, at least 1, or a share above 0 and up to 1.0, which is all keys"
    raise _wrong(name, value, expected)


def one_of(name: str, value: object, choices: Collection[str | None]) -> None:
    """Raise `OptionError` for a value that is not among the `choices`."""
    if value not in choices:
        listed = " or ".join(map(repr, choices))
        raise _wrong(name, value, listed + _did_you_mean(value, choices))


def _chunk(value: object) -> tuple[int, int]:
    expected = f"two integers (shortest, longest) with 1 <= shortest <= longest <= {LONGEST_CHUNK}"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise _wrong("chunk", value, expected)
    try:
        shortest, longest = (integer("chunk", each, 1, LONGEST_CHUNK) for each in value)
    except OptionError:
        raise _wrong("chunk", value, expected) from None
    if shortest > longest:
        raise _wrong("chunk", value, expected)
    return shortest, longest


def _check_mode(mode: object) -> None:
    if mode is None:
        return
    from lychee_compile import torch_private  # loads the compiler, which few options need

    one_of("mode", mode, torch_private.inductor_modes())


def _inductor_patches(patches: object) -> dict[str, Any]:
    """Return a copy of the patches. Raises OptionError for a name that Inductor does not have.

    Inductor itself checks the values.
    """
    if not isinstance(patches, Mapping):
        raise _wrong("inductor", patches, "a mapping from Inductor's options to their values")
    if patches:
        from lychee_compile import torch_private  # loads the compiler, which few options need

        known = torch_private.inductor_options()
        for name in patches:
            if name not in known:
                raise OptionError(
                    f"option inductor has the unknown name {name!r}{_did_you_mean(name, known)}; "
                    "torch._inductor.list_options() lists all"
                )
    return dict(patches)


def _token_source(tokenizer: object) -> object:
    """Return `tokenizer`, or a table of a tensor, as tensors compare element by element."""
    if tokenizer is None or isinstance(tokenizer, BoundaryTable) or is_tokenizer(tokenizer):
        return tokenizer
    if isinstance(tokenizer, Tensor):
        try:
            return BoundaryTable(tokenizer)
        except (TypeError, ValueError) as error:
            raise OptionError(f"option tokenizer: {error}") from error
    raise OptionError(
        f"option tokenizer has type {type(tokenizer).__name__}: expected a tokenizer (with "
        "get_vocab or convert_ids_to_tokens), a BoundaryTable, a uint8 tensor [vocab], or None"
    )
