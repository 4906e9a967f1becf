"""Every private PyTorch API the backend leans on, in one place."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
import torch._dynamo
import torch.fx
from torch import Tensor
from torch._dynamo.eval_frame import DisableContext
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor import list_mode_options, list_options
from torch._inductor.codecache import CppCodeCache
from torch._inductor.compile_fx import compile_fx
from torch._logging._internal import trace_structured
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten
from torch.utils._sympy.functions import FloorDiv

FakeTensorMode = fake_tensor.FakeTensorMode
"""Context in which operators give tensors without data, as while a graph is traced."""

RestartAnalysis = torch._dynamo.exc.RestartAnalysis
"""Exception by which a compiler has Dynamo trace again, with fewer inputs symbolic."""


def fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Return the active fake mode, and the example inputs as its tensors, made as by AOTAutograd.

    Symbolic dimensions keep the symbols that Dynamo gave them, so that nothing is specialised.
    """
    context = TracingContext.get()
    mode = context.fake_mode
    if mode is None:
        raise RuntimeError("the graph was not traced under a fake mode")

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        symbolic = context.tensor_to_context.get(value)
        if symbolic is None:
            return mode.from_tensor(value, static_shapes=True, trace=False)
        return mode.from_tensor(
            value, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False
        )

    return mode, [fake(value) for value in example_inputs]


def retrace(
    gm: torch.fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode
) -> torch.fx.GraphModule:
    """Trace `gm` again to pre-dispatch ATen; `gm` itself stays as it is.

    Scaled dot-product attention stays one node, writes stay in place, views and products get one
    spelling each. Inputs correspond one to one, and keep the names and sources that they have in
    `gm`. Calls with tensors of another kind, such as DTensors, stay as they are (`is_foreign`).
    Raises `RuntimeError` if tensors inside of such tensors became constants all the same.
    """
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(
            lambda *args: _Retracing(gm).run(*args),
            pre_dispatch=True,
            tracing_mode="real",
        )(*fakes)
    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    new = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for before, after in zip(old, new, strict=True):
        after._dynamo_source = getattr(before, "_dynamo_source", None)
        for name in ("tensor_dict", "stack_trace"):
            if name in before.meta:
                after.meta[name] = before.meta[name]
    traced.meta.update(gm.meta)
    sources = dict(getattr(gm, "_param_name_to_source", None) or {})
    foreign = any(map(is_foreign, traced.graph.nodes))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            if foreign and isinstance(getattr(traced, node.target, None), FakeTensor):
                raise RuntimeError(f"{node.target} is part of a tensor that could not be traced")
            sources.setdefault(node.target, LocalSource(node.target))
    traced._param_name_to_source = sources  # type: ignore[assignment]
    return traced


def copied(
    gm: torch.fx.GraphModule,
) -> tuple[torch.fx.GraphModule, dict[torch.fx.Node, torch.fx.Node]]:
    """Return a copy of a traced graph over the same constants, and the copy of each node.

    Inputs keep the names and sources that they have in `gm`.
    """
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copy in copies.items():
        copy._dynamo_source = getattr(node, "_dynamo_source", None)
    traced = torch.fx.GraphModule(gm, graph)
    traced.meta.update(gm.meta)
    traced._param_name_to_source = getattr(gm, "_param_name_to_source", None)  # type: ignore[assignment]
    return traced, copies


class _Retracing(torch.fx.Interpreter):
    """Runs a graph of Dynamo's under `make_fx`, and copies the calls that this cannot trace.

    Pre-dispatch, `make_fx` cannot see into tensors that wrap others, as DTensors and quantised
    weights do: their parts would become constants. Dynamo's calls are what AOTAutograd sees into.
    """

    def run_node(self, n: torch.fx.Node) -> Any:
        """Return the value of a node, which the tracer has recorded."""
        if n.op not in ("call_function", "call_method") or not self._is_foreign(n):
            return super().run_node(n)
        proxies = get_proxy_mode()
        assert proxies is not None
        tracer = proxies.tracer
        args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), lambda a: self._proxy(a, tracer))
        with disable_proxy_modes_tracing():
            value = super().run_node(n)
        proxy = tracer.create_proxy(n.op, n.target, args, kwargs, name=n.name)
        kept = ("stack_trace", "nn_module_stack", "example_value")
        proxy.node.meta |= {name: n.meta[name] for name in kept if name in n.meta}
        proxy.node.meta[_FOREIGN] = True
        return track_tensor_tree(value, proxy, constant=None, tracer=tracer)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function gives; two that `make_fx` does not follow get a plain spelling.

        What a checkpoint computes is traced without it: only gradients need one, and a graph whose
        attentions need gradients is compiled as it came. `x.data` is `x.detach()`.
        """
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *operands = args
            if not target.divide_kwargs(kwargs)[1]:  # type: ignore[attr-defined]
                return _Retracing(body).run(*operands)
        if target is torch._C._autograd._get_data_attr:  # type: ignore[attr-defined]
            return args[0].detach()
        return super().call_function(target, args, kwargs)

    def _is_foreign(self, n: torch.fx.Node) -> bool:
        values = [self.env[each] for each in n.all_input_nodes]
        leaves, _ = tree_flatten([values, n.meta.get("example_value")])
        return any(is_traceable_wrapper_subclass(each) for each in leaves)

    def _proxy(self, n: torch.fx.Node, tracer: Any) -> Any:
        """Return the proxy in the new graph for the value of a node of the old graph."""
        value = self.env[n]
        if isinstance(value, Tensor):
            tracked = get_proxy_slot(value, tracer)
            return getattr(tracked, "proxy", tracked)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return get_proxy_slot(value, tracer).force()
        if n.op != "placeholder":
            return value
        old, new = (graph.find_nodes(op="placeholder") for graph in (n.graph, tracer.graph))
        return torch.fx.Proxy(new[old.index(n)], tracer)


_FOREIGN = "lychee_foreign"


def is_foreign(node: torch.fx.Node) -> bool:
    """True if `retrace` left a call as Dynamo has it, since it has to do with DTensors or the like.

    The result of such a call may show the memory of its arguments.
    """
    return _FOREIGN in node.meta


def source_name(node: torch.fx.Node) -> str:
    """Return where Dynamo found an input; "" if that is not known.

    A buffer of a module, for one, is at "L['self']._modules['layer']._buffers['mask']".
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)


def guarded_integers(names: Collection[str]) -> set[int]:
    """Return the values of the attributes called `names` that Dynamo compiles a graph for.

    It compiles once more for other values. The result is empty if nothing is being compiled.
    """
    context = TracingContext.try_get()
    found: set[int] = set()
    for guard in () if context is None else context.guards_context.dynamo_guards:
        source = guard.name() if callable(guard.name) else guard.name
        fixed = guard.create_fn_name() in ("EQUALS_MATCH", "CONSTANT_MATCH")
        if fixed and source.rpartition(".")[2] in names:
            output = InstructionTranslator.current_tx().output
            scopes = {"L": output.local_scope, "G": output.global_scope}
            try:
                value = eval(source, scopes)  # as Dynamo evaluates its guards
            except Exception:  # noqa: BLE001  what cannot be evaluated is not known
                continue
            if isinstance(value, int):
                found.add(value)
    return found


def is_parameter(node: torch.fx.Node) -> bool:
    """True if an input or attribute of the graph is a parameter of a module."""
    source = getattr(node, "_dynamo_source", None)
    while source is not None:
        if getattr(source, "member", None) == "_parameters":
            return True
        source = getattr(source, "base", None)
    return False


def has_data(tensor: Tensor) -> bool:
    """True if a tensor holds numbers, unlike a fake one."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def share_storage(one: Tensor, other: Tensor) -> bool:
    """True if two tensors, fake ones too, show the same memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def operator_namespace(target: object) -> str:
    """Return the namespace of an operator, "aten" for one; "" for any other function."""
    return target.namespace if isinstance(target, torch._ops.OpOverload) else ""


def symbols_of(value: Any) -> set[Any]:
    """Return the symbols in a tensor's sizes and strides, or in a number."""
    if isinstance(value, Tensor):
        return set().union(*map(symbols_of, (*value.shape, *value.stride())))
    return set(free_symbols(value)) if isinstance(value, torch.SymInt) else set()


def size_hint(size: Any) -> int:
    """Return a size, or the value of a symbolic size at tracing, without adding a guard."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def add_state_input(
    gm: torch.fx.GraphModule,
    name: str,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    mode: FakeTensorMode,
) -> tuple[torch.fx.Node, Tensor]:
    """Append an input [size] that the backend supplies; return the node and a fake to compile with.

    Dynamo knows no source for the input and guards nothing on it. The input counts as static for
    CUDA graphs.
    """
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    with mode:
        fake = torch.empty(size, dtype=dtype, device=device)
    node.meta["val"] = fake
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = None
    return node, fake


def inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """Compile with Inductor as `torch.compile(mode=mode, options=patches)` would. Owns `gm`."""
    config = dict(list_mode_options(mode) if mode not in (None, "default") else {})
    config.update(patches)
    compiled = compile_fx(gm, list(example_inputs), config_patches=config or None)
    assert callable(compiled)
    return compiled


def options_compiled_with(model: object, backend: str) -> Mapping[str, Any]:
    """Return the `mode` and `options` that `torch.compile(model, backend=...)` was given.

    The result is empty if `model` is no compiled module, or one of another backend.
    """
    given: Any = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while getattr(given, "_torchdynamo_orig_backend", None) is not None:
        given = given._torchdynamo_orig_backend
    if getattr(given, "compiler_name", None) != backend:
        return {}
    return dict(getattr(given, "kwargs", {}))


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `torch.compile` was given, if `model` is what it returned; else `model`."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        disabled = isinstance(model.dynamo_ctx, DisableContext)
        return model if disabled else uncompiled(model._orig_mod)
    # The id tells a compiled function from one to which functools.wraps has copied its attributes.
    itself = getattr(model, "_torchdynamo_wrapper_id", None) == id(model)
    compiled = itself and hasattr(model, "get_compiler_config")  # not so for a disabled function
    return uncompiled(model._torchdynamo_orig_callable) if compiled else model  # type: ignore[attr-defined]


def compiled_cpp(source: str) -> ctypes.CDLL:
    """Compile C++ with Inductor's compiler and flags, or take what was compiled before from disk.

    Loops are vectorised, which Inductor's flags turn off. Raises what compiling raises.
    """
    flags = ("-ftree-loop-vectorize", "-fno-trapping-math", "-fno-signed-zeros")
    library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=(*flags, "-ffp-contract=fast"))
    return library


def count(name: str, amount: int) -> None:
    """Add to `torch._dynamo.utils.counters["lychee"]`, where backends count what they did."""
    counters["lychee"][name] += amount


def trace_artifact(name: str, payload: Any) -> None:
    """Show `payload`, JSON-serialisable, in the trace that tlparse reads."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(payload),
    )


def unlimited_recompiles() -> AbstractContextManager[None]:
    """Return a context in which recompilations of the same code never hit the limit."""
    return torch._dynamo.config.patch(recompile_limit=2**30, accumulated_recompile_limit=2**30)


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written; None for inference tensors, which count nothing."""
    return None if tensor.is_inference() else tensor._version


def storage_address(tensor: Tensor) -> int:
    """Return the address of the record that PyTorch keeps of the storage of a tensor."""
    return tensor.untyped_storage()._cdata


def mark_static_address(tensor: Tensor) -> None:
    """Tell CUDA graphs that the memory of a tensor stays where it is."""
    torch._dynamo.mark_static_address(tensor)


def inductor_modes() -> tuple[str, ...]:
    """Return the modes of Inductor, "reduce-overhead" for one."""
    return tuple(list_mode_options())


def inductor_options() -> tuple[str, ...]:
    """Return the names of all options of Inductor."""
    return tuple(list_options())


_quotients: WeakKeyDictionary[Any, tuple[int, dict[sympy.Expr, sympy.Expr]]] = WeakKeyDictionary()


def symbolic_expression(size: torch.SymInt) -> sympy.Expr:
    """Return a symbolic size as an expression, without the quotients that guards tell the value of.

    `x.view(-1, 2, 8)` of s tokens in rows of 16 adds the guard s // 2 == 8, and later sizes are
    still written with s // 2.
    """
    expression = size.node.expr
    return expression.xreplace(_known_quotients(size)) if expression.has(FloorDiv) else expression


def _known_quotients(size: torch.SymInt) -> dict[sympy.Expr, sympy.Expr]:
    """Return the quotients that are equal to simpler expressions in every run of the graph."""
    environment = size.node.shape_env
    count, known = _quotients.get(environment, (0, {}))
    guards = environment.guards
    if count < len(guards):
        known = dict(known)
        for guard in guards[count:]:
            if isinstance(guard.expr, sympy.Eq):
                left, right = guard.expr.args
                for one, other in ((left, right), (right, left)):
                    if isinstance(one, FloorDiv) and not other.has(FloorDiv):
                        known[one] = other
        _quotients[environment] = len(guards), known
    return known
