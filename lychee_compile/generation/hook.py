"""The `generate()` of a prepared model: an attribute of the instance, which the class lacks."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import EncoderDecoderCache

from lychee_compile.cache.argument import CACHE_NAMES
from lychee_compile.generation.caches import is_written_in_place, new_cache
from lychee_compile.generation.compiled import CompiledForward, Forward
from lychee_compile.generation.prompt import PromptReader
from lychee_compile.generation.request import Request, token_count
from lychee_compile.generation.settings import Settings
from lychee_compile.kernels.operators.reference import LONGEST_QUERY

logger = logging.getLogger(__name__)

HOOKS = ("generate", "__getstate__")
"""Attributes that a prepared instance has of its own."""


class GenerateHook:
    """Calls the `generate()` of a model's class, with a cache and a compiled forward.

    While it runs, the instance also has a `forward` of its own. The hook does not keep the model
    alive.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self._model = weakref.ref(model)
        self._settings = settings
        self._told: set[str] = set()
        self._previous = vars(model).get("generate")
        """A `generate` that the instance had of its own."""
        self._running = 0
        self._own: Forward | None = None
        """A `forward` that the instance had of its own when `generate()` began."""
        self._lock = threading.Lock()
        self._begins = True
        """True until `generate()` has called the forward once."""
        self._outputs_stay = False
        """True if `generate()` keeps outputs of the steps, which CUDA graphs would overwrite."""
        self._device = ""
        self._compile_for(model.device.type)

    def _compile_for(self, device: str) -> None:
        """Compile anew if the model has come to another kind of device."""
        if device != self._device:
            cuda = device == "cuda"
            self._device, self._compiled = device, CompiledForward(self._settings.given, cuda)
            self._reader = PromptReader(self._settings, self._compiled, cuda)

    @property
    def model(self) -> Any:
        """The model. Raises `ReferenceError` if it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the prepared model is gone")
        return model

    def install(self) -> None:
        """Give the instance the attributes in `HOOKS`."""
        model = self.model
        plain = type(model).generate

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self.generate(plain, args, kwargs)

        generate.lychee_hook = self  # type: ignore[attr-defined]
        vars(model)["generate"] = generate
        vars(model)["__getstate__"] = self._plain_state

    def remove(self) -> None:
        """Take away what `install` gave the instance."""
        state = vars(self.model)
        for name in HOOKS:
            state.pop(name, None)
        if self._previous is not None:
            state["generate"] = self._previous

    def _plain_state(self) -> dict[str, Any]:
        """Return what pickling and copying are to see of the instance: nothing of this package."""
        model = self.model
        state: dict[str, Any] = dict(type(model).__getstate__.__get__(model)())
        for name in HOOKS:
            state.pop(name, None)
        if self._previous is not None:
            state["generate"] = self._previous
        return state

    def generate(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Return what `plain`, the `generate()` of the class, gives, decoded sparsely."""
        model = self.model
        self._compile_for(model.device.type)
        request = Request(model, plain, args, kwargs)
        settings = new_cache(self._settings, request, self._tell)
        request.set(disable_compile=True, **settings)  # the forward is compiled already
        self._read_prompt(request, self._plain_forward(model), is_new=bool(settings))
        self._begins, self._outputs_stay = True, request.keeps_outputs
        with self._compiled_forward(model):
            return plain(model, **request.named)

    def _read_prompt(self, request: Request, forward: Forward, is_new: bool) -> None:
        """Read a prompt before `generate()` does, if that pays. The cache may be a new one."""
        if request.cache is None:
            return
        shared = self._reader.shared(request, request.cache) if is_new else 0
        if not shared and not self._reader.pays:
            return
        why = request.why_whole()
        if why is None:
            self._reader.read(request, request.cache, forward, shared)
        elif self._settings.sparse_prompts:
            self._tell(f"a prompt is read densely, by generate(): {why}")

    @contextmanager
    def _compiled_forward(self, model: Any) -> Iterator[None]:
        """Let the instance forward through the backend."""
        with self._lock:
            if not self._running:
                self._own = vars(model).get("forward")
                vars(model)["forward"] = self._forward(model, self._plain_forward(model))
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    del vars(model)["forward"]
                    if self._own is not None:
                        vars(model)["forward"] = self._own

    def _plain_forward(self, model: Any) -> Forward:
        """Return the uncompiled forward, which takes the model first."""
        own = self._own if self._running else vars(model).get("forward")
        return type(model).forward if own is None else _OwnForward(own)

    def _forward(self, model: Any, plain: Forward) -> Forward:
        """Return the forward that the instance has while `generate()` runs."""
        reference = self._model

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._call_for(kwargs)
            self._begins = False
            if call is None:
                return plain(reference(), *args, **kwargs)
            return call(reference(), plain, *args, **kwargs)

        return forward

    def _call_for(self, inputs: Mapping[str, Any]) -> Forward | None:
        """Return what compiles a call of the forward; None if the call stays uncompiled."""
        count = token_count(inputs)
        caches = [each for name in CACHE_NAMES if (each := inputs.get(name)) is not None]
        if any(isinstance(each, EncoderDecoderCache) and _is_new(each) for each in caches):
            return None  # what an encoder leaves must not lie in the memory of a graph
        if count == 1:
            in_place = not self._outputs_stay and all(map(is_written_in_place, caches))
            return self._compiled.step if in_place else self._compiled.rest
        if self._begins or not count:
            return None  # the prompt, or what no cache is for
        if count == self._settings.prefill_chunk:
            return self._compiled.chunk
        return self._compiled.drafts if count <= LONGEST_QUERY else None

    def _tell(self, words: str) -> None:
        """Warn of something once."""
        if words not in self._told:
            self._told.add(words)
            logger.warning("%s", words)


@dataclass(frozen=True)
class _OwnForward:
    """A forward that the instance had before, as of accelerate; equal ones are compiled once."""

    forward: Forward

    def __call__(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def _is_new(cache: EncoderDecoderCache) -> bool:
    """True if the keys of the encoder are not in the cache yet."""
    return not any(cache.is_updated.values())
