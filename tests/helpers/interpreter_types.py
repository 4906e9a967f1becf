"""Remember what Triton's interpreter works out about types, shapes and operators at each call.

Most of an interpreted kernel's time goes into this and not into NumPy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def remember() -> None:
    """Patch the interpreter and the language with all of the functions below."""
    remember_numpy_types()
    remember_blocks()
    remember_tensors()
    skip_equal_shapes()
    remember_members()
    call_operators_directly()


def remember_numpy_types() -> None:
    """Look a type's NumPy type up once."""
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}

    def numpy_type_of(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    interpreter._get_np_dtype = numpy_type_of


def remember_blocks() -> None:
    """Give a block of known type and shape known values; blocks of one shape share its object."""
    import triton.language as tl

    new_block, with_element = tl.block_type.__init__, tl.block_type.with_element_ty
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(shape, "values", shape))
        kind = type(element_ty)
        known: Any = (element_ty.name, sizes) if kind is tl.dtype else None
        if kind is tl.pointer_type:
            known = (element_ty.name, element_ty.address_space, sizes)
        if known is None or any(type(size) is not int for size in sizes):
            return new_block(self, element_ty, shape)
        if known not in blocks:
            new_block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            self.others, self.of_tensors = {}, {}  # shared by all blocks of this type and shape
            blocks[known] = dict(self.__dict__)
        return self.__dict__.update(blocks[known])

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        others = getattr(self, "others", None)
        if others is None or type(scalar_ty) is not tl.dtype:
            return with_element(self, scalar_ty)
        if scalar_ty.name not in others:
            others[scalar_ty.name] = with_element(self, scalar_ty)
        return others[scalar_ty.name]

    tl.block_type.__init__, tl.block_type.with_element_ty = block, with_element_ty


def remember_tensors() -> None:
    """Work the shape and the size of a tensor out once for its type."""
    import triton.language as tl

    new_tensor = tl.tensor.__init__
    scalars: dict[str, dict[str, Any]] = {}

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        held = getattr(kind, "of_tensors", None)
        if held is None and type(kind) is tl.dtype:
            held = scalars.setdefault(kind.name, {})
        if not held:
            new_tensor(self, handle, kind)
            if held is not None:
                held.update(self.__dict__)
        self.__dict__.update(held or {})
        self.handle, self.type = handle, kind

    tl.tensor.__init__ = tensor


def skip_equal_shapes() -> None:
    """Broadcast nothing where two blocks, or two scalars, have the same shape already."""
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = getattr(lhs.type, "shape", None), getattr(rhs.type, "shape", None)
        return (lhs, rhs) if left is right else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def remember_members() -> None:
    """Look for the operators of a module or class once, and not at each launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    members: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(owner: Any, *rest: Any) -> None:
        if owner not in members:
            found = inspect.getmembers(owner)
            members[owner] = [(name, each) for name, each in found if tl.core.is_builtin(each)]
        for name, member in members[owner]:
            interpreter._patch_attr(owner, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def call_operators_directly() -> None:
    """Hand operators the interpreter's semantics without copying and checking keywords."""
    from triton.runtime import interpreter

    patch = interpreter._patch_attr
    direct: dict[Any, Callable[..., Any]] = {}

    def patch_attr(obj: Any, name: str, member: Any, *rest: Any) -> None:
        patch(obj, name, member, *rest)
        if member not in direct:
            direct[member] = _direct(member, interpreter.interpreter_semantic)
        setattr(obj, name, direct[member])

    interpreter._patch_attr = patch_attr


def _direct(member: Callable[..., Any], semantic: Any) -> Callable[..., Any]:
    """Return an operator of the language without the wrapper that checks `_semantic`."""
    code = getattr(member, "__code__", None)
    checked = code is not None and code.co_qualname == "builtin.<locals>.wrapper"
    operator = member.__wrapped__ if checked else member

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return operator(*args, **kwargs)

    return call
