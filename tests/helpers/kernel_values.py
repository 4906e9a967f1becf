"""Values of the terms of a kernel, beside those of the graph that the terms come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from tracing import Traced

from lychee_compile.codegen.printer import print_expression
from lychee_compile.options import Options
from lychee_compile.passes.detect import detect
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import aten
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.normalise import normalise
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser
from lychee_compile.passes.lower.kernel_expressions import KernelExpressions, kernel_expressions
from lychee_compile.passes.pipeline import analyse
from lychee_compile.passes.symbolic.elementwise import Flag

How = Callable[[Attention, Canonicaliser], KernelExpressions]


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *operands: reduce(function, operands)


_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    sympy.Add: _folded(torch.add),
    sympy.Mul: _folded(torch.mul),
    sympy.Pow: torch.pow,
    sympy.Max: _folded(torch.maximum),
    sympy.Min: _folded(torch.minimum),
    sympy.Mod: torch.remainder,
    sympy.floor: torch.floor,
    sympy.Abs: torch.abs,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.tanh: torch.tanh,
    sympy.Le: torch.le,
    sympy.Lt: torch.lt,
    sympy.Ge: torch.ge,
    sympy.Gt: torch.gt,
    sympy.Eq: torch.eq,
    sympy.Ne: torch.ne,
    sympy.And: _folded(torch.logical_and),
    sympy.Or: _folded(torch.logical_or),
    sympy.Xor: _folded(torch.logical_xor),
    sympy.Not: torch.logical_not,
    sympy.ITE: torch.where,
    Flag: lambda element: element != 0,
}


def evaluate(expression: sympy.Basic, values: dict[str, Tensor]) -> Tensor:
    """Return `expression` in float64, elementwise, of symbols and tensors by name.

    As in a kernel every element in it is read, whether it matters or not: it has to be there.
    """
    if isinstance(expression, sympy.Indexed):
        indices = [evaluate(each, values).long() for each in expression.indices]
        tensor = values[expression.base.label.name]
        for index, size in zip(indices, tensor.shape, strict=True):
            assert 0 <= index.min() <= index.max() < size, expression
        return tensor[tuple(indices)].double()
    if isinstance(expression, sympy.Symbol):
        return values[expression.name].double()
    if isinstance(expression, sympy.Piecewise):
        *first, (result, _) = expression.args
        result = evaluate(result, values)
        for value, condition in reversed(first):
            result = torch.where(evaluate(condition, values), evaluate(value, values), result)
        return result
    if not expression.args:
        truth = expression in (sympy.true, sympy.false)
        return torch.tensor(bool(expression) if truth else float(expression))
    operands = (evaluate(each, values) for each in expression.args)
    return _FUNCTIONS[expression.func](*operands)


@dataclass(frozen=True)
class Outcome:
    """One attention of a graph, run beside what its terms make of it."""

    terms: KernelExpressions
    score: Tensor
    """float64 [B, Hq, T, L]."""
    visible: Tensor
    """bool [B, Hq, T, L]."""
    extra: Tensor | None
    got: Tensor
    expected: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights of the keys that a query sees: float64 [B, Hq, T, L]."""
        logits = self.score.masked_fill(~self.visible, -torch.inf)
        if self.extra is None:
            return logits.softmax(-1)
        extra = self.extra.double().expand(logits.shape[:3])[..., None]
        return torch.cat((logits, extra), -1).softmax(-1)[..., :-1]


class Beside(torch.fx.Interpreter):
    """Runs a graph, and beside each attention what the terms of its kernel say.

    Captured tensors are read when the attention is run, as a kernel in its place would.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, mode: Any, attentions: list[Attention], how: How
    ) -> None:
        self._emit = Emitter(gm.graph, mode)
        sites = [self._prepare(each, how) for each in attentions]
        self._sites = {site[2]: site for site in sites}
        self._outputs = {site[3]: site for site in sites}
        self.outcomes: list[Outcome] = []
        super().__init__(gm, garbage_collect_values=False)

    def _prepare(self, attention: Attention, how: How) -> tuple[Any, ...]:
        canonical = Canonicaliser(attention, self._emit)
        with attention.node.graph.inserting_before(attention.node):
            terms = how(attention, canonical)
            given = canonical.operands(repeated=True, masked=False)
            operands = given.query, given.key, given.value
            made = self._emit(aten.scaled_dot_product_attention.default, *operands)
            output = canonical.output(made)
        # The output is looked at once the graph's own is there.
        return terms, given, made, attention.node, output

    def run_node(self, n: torch.fx.Node) -> Any:
        """Attend by the terms where an attention was put in, and compare with the graph's own."""
        if n in self._sites:
            terms, given, *_ = self._sites[n]
            self._made = self._attend(terms, given)
            return self._made[-1].to(n.meta["val"].dtype)
        result = super().run_node(n)
        if n in self._outputs:
            terms, given, _, _, output = self._outputs[n]
            extra = None if given.extra is None else self.env[given.extra].clone()
            outcome = Outcome(terms, *self._made[:2], extra, self.env[output].clone(), result)
            self.outcomes.append(outcome)
        return result

    def _attend(self, terms: KernelExpressions, given: Canonical) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            self.env[each].double() for each in (given.query, given.key, given.value)
        )
        raw = query @ key.mT
        indices = torch.meshgrid(*map(torch.arange, raw.shape), indexing="ij")
        values = dict(zip(("b", "h", "q", "kv"), indices, strict=True))
        values |= {"s": raw, "kv_len": torch.tensor(raw.shape[-1])}
        for each, node in zip(terms.captured, terms.nodes, strict=True):
            tensor = self.env[node]
            assert (str(tensor.dtype), tensor.dim()) == (f"torch.{each.dtype}", each.rank)
            values[each.name] = tensor
        score = evaluate(terms.score, values).expand_as(raw)
        visible = evaluate(terms.visible, values).bool().expand_as(raw)
        extra = None if given.extra is None else self.env[given.extra]
        outcome = Outcome(terms, score, visible, extra, raw, raw)
        return score, visible, outcome.weights @ value


def traced(
    function: Callable[..., Any], *inputs: Tensor, how: How = kernel_expressions, dynamic: Any = ()
) -> list[Outcome]:
    """Return all attentions of a function, run beside their terms."""
    graph = Traced(function, *inputs, dynamic=dynamic)
    written = normalise(graph.gm, graph.mode)
    found = detect.find_attention(graph.gm, written)
    attentions = [each for each in found if isinstance(each, Attention) and not each.refused]
    run = Beside(graph.gm, graph.mode, attentions, how)
    run.run(*(each.clone() for each in inputs))
    return run.outcomes


def compiled(
    function: Callable[..., Any], *inputs: Tensor, how: How = kernel_expressions
) -> list[Outcome]:
    """Return the outcomes of a function compiled by Dynamo, which has inner functions and names."""
    outcomes = []

    def backend(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        analysis = analyse(gm, examples, Options.parse(None, {}))
        attentions = [plan.attention for plan in analysis.plans]
        run = Beside(analysis.gm, analysis.mode, attentions, how)

        def call(*given: Any) -> Any:
            run.outcomes.clear()
            result = run.run(*given)
            outcomes[:] = run.outcomes
            return result

        return call

    try:
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    except BackendCompilerFailed as error:
        raise error.inner_exception from None
    return outcomes


def assert_right(outcome: Outcome, atol: float = 1e-5) -> None:
    """Check that the output is that of the graph, and a kernel can be printed."""
    torch.testing.assert_close(outcome.got, outcome.expected, atol=atol, rtol=atol)
    captured = {each.name: each for each in outcome.terms.captured}
    for each in (outcome.terms.score, outcome.terms.visible):
        assert isinstance(print_expression(each, captured, mask="inside"), str)
