"""Traces of a model that has no weights: all tensors are fake, and so take no memory.

The model is built from its configuration under a fake mode. Dynamo traces it with a full static
cache of the asked length, and the backend decides about each attention as ever.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lychee_compile import inspection, torch_private
from lychee_compile.cli.caches import cache_bytes, new_static_cache, note_filled
from lychee_compile.cli.configurations import new_model, text_configuration
from lychee_compile.cli.errors import CommandError, one_line
from lychee_compile.cli.explain.depth import Depth, find_depth, shallow_configuration
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.options import Options
from lychee_compile.passes.rules import dense_layers
from lychee_compile.report.report import Report


@dataclass(frozen=True)
class Decoding:
    """A step of decoding over one cache, as the backend would compile it."""

    report: Report
    """Every attention of the model, those of layers that were not traced among them."""
    cache_bytes: int
    """Bytes of the whole cache."""


class FakeModel:
    """A model without weights, on which steps of decoding can be traced."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Build the model. Raise `CommandError` if it cannot be built."""
        self.dtype, self.device = dtype, device
        self._config = config
        self._mode = torch_private.FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode, _told(config, "it cannot be built without weights"):
            self.model = new_model(config, dtype, device)
            self.layers: int = text_configuration(config).num_hidden_layers
        self.parameters = sum(each.numel() for each in self.model.parameters())
        """Number of weights, each counted once."""
        self.weight_bytes = sum(
            each.numel() * each.element_size() for each in self.model.parameters()
        )
        """Bytes of all weights."""
        self.depth: Depth | None = None
        """Layers that are traced; None: all of them."""

    def take_few_layers(self, options: Options) -> None:
        """Trace as few layers as have every kind among them, if the model has such."""
        depth = find_depth(self.model, self._config, dense_layers(options))
        if depth is None:
            return
        try:
            with self._mode:
                shallow = shallow_configuration(self._config, depth.traced)
                model = new_model(shallow, self.dtype, self.device)
        except Exception:  # noqa: BLE001  whatever it is, the whole model can be traced
            return
        if depth.is_start_of(self.model, self._config, model, shallow):
            self.model, self.depth = model, depth

    def decode(self, context: int, batch: int, options: Mapping[str, Any]) -> Decoding:
        """Trace a step over a cache of `context` slots that holds all of them but one.

        Raise `CommandError` if the model cannot be traced.
        """
        architectures = " or ".join(getattr(self._config, "architectures", None) or ["it"])
        expected = f"expected a causal language model, and {architectures} cannot be traced as one"
        traced = _told(self._config, expected)
        with self._mode, torch.no_grad(), warnings.catch_warnings(), _unlogged(), traced:
            warnings.simplefilter("ignore")  # of what Dynamo makes of the model's code
            cache = new_static_cache(self.model, batch, context)
            note_filled(cache, context - 1)
            token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
            arguments = {cache_argument(self.model): cache, "use_cache": True}
            report = inspection.explain(self.model, token, options=options, **arguments)
            sizes = [cache_bytes(layer) for layer in cache.layers]
        if self.depth is None:
            return Decoding(report, sum(sizes))
        report.sites = self.depth.spread(report.sites)
        return Decoding(report, sum(sizes[each] for each in self.depth.stands_for))


@contextmanager
def _unlogged() -> Iterator[None]:
    """Log nothing meanwhile: an error of a trace is told in one line, not by Dynamo's log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _told(config: Any, otherwise: str) -> Iterator[None]:
    """Turn any error of transformers or Dynamo into one line."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        name = type(error).__name__
        raise CommandError(
            f"{config.model_type}: {otherwise}: {name}: {one_line(error)}"
        ) from error
