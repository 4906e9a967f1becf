"""`prepare`: let `generate()` of a transformers model decode sparsely; `restore` undoes it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from lychee_compile import torch_private
from lychee_compile.generation.settings import Settings


class Prepared:
    """A model whose `generate()` decodes sparsely; as a context, until the end of the block."""

    def __init__(self, model: Any, hook: Any) -> None:
        self.model = model
        """The model that was given to `prepare`."""
        self._hook = hook

    def restore(self) -> None:
        """Give the model back its own `generate()`, unless it was prepared again since."""
        inner = _with_generate(self.model)
        if _hook_of(inner) is self._hook:
            _remove(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Prepared({type(self.model).__name__})"


def prepare(model: Any, **options: Any) -> Prepared:
    """Let `model.generate(...)` of a transformers model decode through the backend from now on.

    `options` are those of the backend (`Options`), and besides:

    - `cache`: the cache that `generate()` gets if the call names none. "growing" is a
      `LycheeCache`: it needs no length beforehand, and keeps the turns of a conversation. "static"
      is a `StaticCache` for all tokens that may be generated. "dynamic" is a `DynamicCache`.
    - `storage` and `cache_dtype`: memory and form of the numbers of a growing cache, `storage` and
      `dtype` of `LycheeCache`.
    - `prefill`: "dense" (the default, which the backend calls "exact") or "sparse".
    - `prefill_chunk`: the number of tokens in which a prompt goes through the backend, at least 17.
      None: 4096 for a sparse prefill; a dense prompt is read in one piece.

    On a GPU each step is a CUDA graph, unless the option `mode` says otherwise. Neither the class
    nor the weights are touched: the instance gets a `generate` of its own, which copies, pickles
    and `save_pretrained` leave out. A model that is prepared again takes the new options. Wrappers
    with `get_base_model()`, as those of PEFT, and compiled models are looked through.

    Raises `OptionError` (a ValueError) for wrong options, and TypeError for a model without
    `generate()`.
    """
    settings = Settings.parse(options)
    inner = _with_generate(model)
    from lychee_compile.generation.hook import GenerateHook  # imports transformers

    _remove(inner)
    hook = GenerateHook(inner, settings)
    hook.install()
    return Prepared(model, hook)


def restore(model: Any) -> None:
    """Undo `prepare`; a model that is not prepared stays as it is."""
    _remove(_with_generate(model))


def _with_generate(model: Any) -> Any:
    """Return the transformers model within wrappers. Raises TypeError if there is none."""
    inner: Any = torch_private.uncompiled(model)
    if callable(getattr(inner, "get_base_model", None)):
        return _with_generate(inner.get_base_model())
    if isinstance(inner, str):
        raise TypeError(
            f"prepare() needs a model, not its name {inner!r}: load it by "
            "AutoModelForCausalLM.from_pretrained(name) first"
        )
    if not callable(getattr(type(inner), "generate", None)):
        raise TypeError(
            f"prepare() needs a transformers model with generate(), and {type(inner).__name__} "
            'has none: use torch.compile(model, backend="lychee")'
        )
    return inner


def _hook_of(model: Any) -> Any:
    """Return the hook of a prepared model; None if the model is not prepared."""
    return getattr(vars(model).get("generate"), "lychee_hook", None)


def _remove(model: Any) -> None:
    """Take away what `prepare` gave the instance."""
    hook = _hook_of(model)
    if hook is not None:
        hook.remove()
