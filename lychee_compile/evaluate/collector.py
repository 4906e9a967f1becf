"""Observer of a model's sparse attentions that keeps their queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lychee_compile.evaluate.tensors import SiteTensors
from lychee_compile.kernels.operators.observe import SparseCall


class Collector:
    """Observer of sparse attentions, one decoded token after another.

    It keeps global attentions with a plain causal mask whose module path fits one of the patterns,
    as in file names. Without patterns every path fits.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self.queries: dict[str, list[Tensor]] = {}
        self.last: dict[str, SiteTensors] = {}
        self.skipped: dict[str, str] = {}
        self.keys_due = 0
        """Number of keys that a global attention sees now."""
        self.final = False
        """True at the last token, whose keys and values are kept."""
        self._patterns = sites
        self._steps = 0

    def begin(self, position: int, final: bool) -> None:
        """Prepare for the token at `position`, which is decoded next; the last one is `final`."""
        self.keys_due, self.final = position + 1, final
        self._steps += 1

    def __call__(self, call: SparseCall) -> None:
        """Keep a copy of the query of `call`; at the last token also of its keys and values."""
        name = self._name(call.site)
        if self._patterns and not any(fnmatchcase(call.site, each) for each in self._patterns):
            return
        reason = self._unfit(call)
        if reason is not None:
            self.skipped[name] = reason
            return
        operands = call.operands
        query = operands.query.detach().float().clone()
        self.queries.setdefault(name, []).append(query)
        if self.final:
            key, value = operands.key.detach().clone(), operands.value.detach().clone()
            scores = operands.scale, operands.softcap
            self.last[name] = SiteTensors(name, query, key, value, *scores)

    def tensors(self) -> tuple[SiteTensors, ...]:
        """Return the tensors of the sites that attended at every step."""
        whole = [name for name, seen in self.queries.items() if len(seen) == self._steps]
        return tuple(
            replace(self.last[name], query=torch.cat(self.queries[name], 2)) for name in whole
        )

    def _name(self, site: str) -> str:
        """Return `site`, with a number if its module attended in this step before."""
        name, again = site, 2
        while len(self.queries.get(name, ())) == self._steps:
            name, again = f"{site}#{again}", again + 1
        return name

    def _unfit(self, call: SparseCall) -> str | None:
        visible = call.selection.visible
        query = call.operands.query
        if query.shape[0] != 1 or query.shape[2] != 1:
            return "it does not decode one token of one row"
        if int(visible.first.min()) > 0 or int(visible.end.min()) != self.keys_due:
            return "it does not see the whole sequence: a sliding window"
        if visible.bias is not None or visible.counts is not None:
            return "its mask adds a bias or hides keys here and there"
        return None
