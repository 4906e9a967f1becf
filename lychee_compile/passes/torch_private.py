"""Every private PyTorch API the backend leans on, in one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
import torch.fx
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx


def fake_inputs(example_inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The active fake mode, and the example inputs as its tensors, made as AOTAutograd makes them.

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


def retrace(gm: torch.fx.GraphModule, fakes: Sequence[Any], mode: Any) -> torch.fx.GraphModule:
    """Trace `gm` again to pre-dispatch ATen; `gm` itself stays as it is.

    Scaled dot-product attention stays one node, writes stay in place, views and products get one
    spelling each. Inputs correspond one to one and keep the names and sources of `gm`'s.
    """
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(
            lambda *args: torch.fx.Interpreter(gm).run(*args),
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
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            sources.setdefault(node.target, LocalSource(node.target))
    traced._param_name_to_source = sources  # type: ignore[assignment]
    return traced


def source_name(node: torch.fx.Node) -> str:
    """Where Dynamo found an input, "L['self']._modules['layer']._buffers['mask']", or nothing."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)


def is_parameter(node: torch.fx.Node) -> bool:
    """Whether an input or attribute of the graph is a parameter of a module."""
    source = getattr(node, "_dynamo_source", None)
    while source is not None:
        if getattr(source, "member", None) == "_parameters":
            return True
        source = getattr(source, "base", None)
    return False


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, unlike a fake one."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def size_hint(size: Any) -> int:
    """A size, or what a symbolic one was when the graph was traced; no guard is added."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def add_state_input(
    gm: torch.fx.GraphModule,
    name: str,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    mode: Any,
) -> tuple[torch.fx.Node, Tensor]:
    """Append an input [size] that the backend supplies: its node, and the fake to compile with.

    Dynamo knows no source for it and guards nothing on it; it counts as static for CUDA graphs.
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
    """The `mode` and `options` that `torch.compile(model, backend=...)` was given.

    Empty where `model` is no compiled module, or one of another backend.
    """
    given: Any = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while getattr(given, "_torchdynamo_orig_backend", None) is not None:
        given = given._torchdynamo_orig_backend
    if getattr(given, "compiler_name", None) != backend:
        return {}
    return dict(getattr(given, "kwargs", {}))


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
    """Within this context, compiling the same code once more never hits the recompile limit."""
    return torch._dynamo.config.patch(recompile_limit=2**30, accumulated_recompile_limit=2**30)
