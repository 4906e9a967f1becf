"""Words in which a catalogue says how a model class is built, and what it is called with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Drive = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""Function that calls a model, perhaps several times, with arguments and keyword arguments."""


class Made:
    """An object that is made when a model is built: the library need not be there before."""

    def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
        self.path = path
        self.args = args
        self.kwargs = kwargs

    def make(self) -> Any:
        """Import what the path names and call it. Raise whatever the library raises."""
        return named(self.path)(*resolved(self.args), **resolved(self.kwargs))


@dataclass(frozen=True)
class Named:
    """An object of a library, by its path."""

    path: str


@dataclass(frozen=True)
class Floats:
    """Normally distributed numbers of the given shape."""

    shape: tuple[int, ...]

    def make(self) -> Tensor:
        """Return new numbers from PyTorch's generator."""
        return torch.randn(self.shape)


@dataclass(frozen=True)
class Integers:
    """Whole numbers of the given shape, at least `low` and below `high`."""

    shape: tuple[int, ...]
    high: int = 64
    low: int = 3

    def make(self) -> Tensor:
        """Return new numbers from PyTorch's generator."""
        return torch.randint(self.low, self.high, self.shape)


@dataclass(frozen=True)
class Visible:
    """A boolean mask of the given shape that is true everywhere, except in the last four places."""

    shape: tuple[int, ...]

    def make(self) -> Tensor:
        """Return the mask."""
        mask = torch.ones(self.shape, dtype=torch.bool)
        mask[..., -4:] = False
        return mask


def floats(*shape: int) -> Floats:
    """Return a specification of normally distributed numbers."""
    return Floats(shape)


def ids(*shape: int, high: int = 64) -> Integers:
    """Return a specification of token ids that are not special."""
    return Integers(shape, high)


def image(size: int, batch: int = 2, channels: int = 3) -> Floats:
    """Return a specification of square images."""
    return Floats((batch, channels, size, size))


def visible(*shape: int) -> Visible:
    """Return a specification of a mask with some padding at the end."""
    return Visible(shape)


def called(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a model once."""
    return model(*args, **kwargs)


@dataclass(frozen=True)
class Entry:
    """A model class, a way to build it small, and a call of it."""

    name: str
    """Name in the table: the class, and if needed what sets this build apart."""
    model: Made
    """Model, built with random weights."""
    inputs: Sequence[Any] = ()
    """Arguments of the call; specifications among them become tensors."""
    named_inputs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call."""
    drive: Drive = called
    """Function that calls the model with the inputs."""
    not_attentions: int = 0
    """Number of softmaxes and exponentials that the count by operators takes for attentions, though
    they are none of their own: they run over features or residual streams, or over a chunk of keys
    whose attention counts already."""

    def build(self) -> nn.Module:
        """Return the model in evaluation mode, with the same weights every time."""
        torch.manual_seed(0)
        model: nn.Module = self.model.make()
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                nn.init.normal_(parameter, std=0.05)  # a layer that starts at zero hides errors
        return model.eval()

    def arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return new arguments of the call, the same every time."""
        torch.manual_seed(1)
        return resolved(self.inputs), resolved(self.named_inputs)


@dataclass(frozen=True)
class Library:
    """A library, the packages to install for it, and its model classes."""

    name: str
    packages: Sequence[str]
    """Packages as pip takes them; the first is the library. They are installed without what they
    ask for, so that PyTorch stays as it is."""
    entries: Sequence[Entry]


def named(path: str) -> Any:
    """Return the object that a dotted path names: a module's attribute, or an attribute of one."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:length]) and not _begins(parts, error.name):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"no module of {path!r} is installed", name=parts[0])


def _begins(parts: Sequence[str], name: str | None) -> bool:
    return name is not None and ".".join(parts).startswith(f"{name}.")


def resolved(value: Any) -> Any:
    """Return `value` with every specification in it, however deep, replaced by what it makes."""
    if isinstance(value, Named):
        return named(value.path)
    if isinstance(value, (Made, Floats, Integers, Visible)):
        return value.make()
    if type(value) in (list, tuple):
        return type(value)(map(resolved, value))
    if type(value) is dict:
        return {key: resolved(each) for key, each in value.items()}
    return value
