"""Layers of a model that are alike, so that few of them need to be traced.

Tracing takes about a second a layer. Deep models repeat few kinds of layers. A model of the first
layers, as many as have every kind among them, therefore tells what becomes of all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lychee_compile.cli.configurations import text_configuration
from lychee_compile.passes.layer_numbers import ATTRIBUTES
from lychee_compile.passes.site import Site

LEAST = 2
"""Least number of layers of a model that is traced instead of a deeper one."""


@dataclass(frozen=True)
class Depth:
    """Layers that are traced, and the one among them that stands for each layer of the model."""

    path: str
    """Module path of the list of layers, "model.layers"."""
    stands_for: tuple[int, ...]
    """Traced layer that is like each layer of the model."""

    @property
    def traced(self) -> int:
        """Number of layers that are traced."""
        return max(self.stands_for) + 1

    def is_start_of(
        self, whole: nn.Module, config: Any, shallow: nn.Module, shallow_config: Any
    ) -> bool:
        """Return True if the layers of the `shallow` model are the first ones of the `whole`."""
        ours, theirs = layer_list(shallow, shallow_config), layer_list(whole, config)
        if ours is None or theirs is None or ours[0] != self.path:
            return False
        first = signatures(theirs[1], config)[: self.traced]
        return signatures(ours[1], shallow_config) == first

    def spread(self, sites: Sequence[Site]) -> list[Site]:
        """Return the attentions of all layers, given those of the layers that were traced."""
        number = re.compile(rf"(?<![^.]){re.escape(self.path)}\.(\d+)(?![^.])")
        by_layer: dict[int, list[Site]] = {}
        others = []
        for site in sites:
            found = number.search(site.name)
            if found is None:
                others.append(site)
            else:
                by_layer.setdefault(int(found[1]), []).append(site)
        return others + [
            replace(site, name=number.sub(f"{self.path}.{layer}", site.name))
            for layer, traced in enumerate(self.stands_for)
            for site in by_layer.get(traced, ())
        ]


def layer_list(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList] | None:
    """Return path and modules of the list of all decoder layers; None if it is not sure."""
    count = text_configuration(config).num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return found[0] if len(found) == 1 else None


def find_depth(model: nn.Module, config: Any, dense_layers: int) -> Depth | None:
    """Return the layers of a model to trace; None if that is all of them.

    The first `dense_layers` stay dense, so that they stand for no other layer.
    """
    found = layer_list(model, config)
    if found is None:
        return None
    path, layers = found
    kinds = signatures(layers, config)
    for traced in range(max(dense_layers + 1, LEAST), len(kinds)):
        usable = kinds[dense_layers:traced]
        if set(kinds[traced:]) <= set(usable):
            rest = (dense_layers + usable.index(kind) for kind in kinds[traced:])
            return Depth(path, (*range(traced), *rest))
    return None


def shallow_configuration(config: Any, layers: int) -> Any:
    """Return a copy of a configuration that has its first `layers` layers."""
    shallow = copy.deepcopy(config)
    text = text_configuration(shallow)
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shallow


def signatures(layers: Iterable[nn.Module], config: Any) -> list[Hashable]:
    """Return for each layer all that tells it from others, but for its number."""
    text = text_configuration(config)
    lists = [
        value
        for value in vars(text).values()
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers
    ]
    return [
        (tuple(repr(each[number]) for each in lists if number < len(each)), _signature(layer))
        for number, layer in enumerate(layers)
    ]


def _signature(layer: nn.Module) -> Hashable:
    return tuple((path, type(module), _facts(module)) for path, module in layer.named_modules())


def _facts(module: nn.Module) -> Hashable:
    """Return the plain attributes of a module, and names and shapes of its tensors."""
    plain = (bool, int, float, str, list, tuple, type(None))
    attributes = [
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and name not in ATTRIBUTES
    ]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple(attributes), tuple((name, tuple(each.shape)) for name, each in tensors)
