"""The cache of one call of `generate()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import StaticLayer

from lychee_compile.cache.lychee_cache import LycheeCache
from lychee_compile.generation.request import Request, argument_name
from lychee_compile.generation.settings import Settings

DEFAULT_NEW = 20
"""Least number of new tokens to make room for, which `generate()` adds if nothing says more."""
LEAST = 2048
"""Least capacity of a cache."""
ROOM = 1024
"""Least number of tokens that a growing cache has room for at first, if more may be generated."""


def capacity(tokens: int) -> int:
    """Round a number of tokens up to one of four sizes for each power of two, at least `LEAST`.

    Calls of about the same length then share what was compiled for the size.
    """
    step = 1 << max((tokens - 1).bit_length() - 3, LEAST.bit_length() - 3)
    return max(-(-tokens // step) * step, LEAST)


def new_cache(settings: Settings, request: Request, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the arguments of `generate()` that make it use a new cache as the settings say.

    The result is empty if the user named a cache, or the model takes none; `tell` is then told why.
    """
    if request.cache is not None:
        return {}
    if request.setting("use_cache") is False:
        tell("use_cache=False: without a cache no step can be sparse")
        return {}
    if request.named_kind is not None:
        return {}
    if request.cache_name is None:
        tell(f"{type(request.model).__name__} takes no cache of keys and values: nothing is sparse")
        return {}
    arguments = _arguments(settings, request, tell)
    made = arguments.get(argument_name())
    if settings.stores_otherwise and not isinstance(own_keys(made), LycheeCache):
        tell("storage and cache_dtype have no effect: this generate() needs another cache")
    return arguments


def own_keys(cache: Any) -> Any:
    """Return the cache of a decoder's own keys in a pair; `cache` itself if it is no pair."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _arguments(settings: Settings, request: Request, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the arguments that name or hold a new cache; none if `generate()` has to make it."""
    kind = settings.cache
    if not request.is_usual:
        # Such a generate() may call the usual one several times: it must get a new cache each time.
        return {"cache_implementation": "dynamic" if kind == "dynamic" else "static"}
    if request.setting("is_assistant") and _has_windows(request):
        return {}  # generate() makes one that remembers what leaves a window
    kind = _suitable(kind, request)
    if kind == "growing" and request.counts_in_mask:
        tell("a dynamic cache is used: the model counts positions from the mask")
        kind = "dynamic"
    cache = _MAKERS[kind](settings, request, tell)
    if cache is None:
        return {"cache_implementation": "static"}
    return {argument_name(): cache, "cache_implementation": None}


def is_written_in_place(cache: Any) -> bool:
    """True if steps write into tensors that every layer of a cache keeps.

    A `DynamicCache` takes the results of each step as its new tensors. CUDA graphs would overwrite
    those at the next step.
    """
    layers = getattr(own_keys(cache), "layers", ())
    return bool(layers) and all(isinstance(layer, StaticLayer) for layer in layers)


def _suitable(kind: str, request: Request) -> str:
    """Return the kind of cache to use if the user prefers `kind`.

    A `StaticCache` cannot take drafts back, and gets new tensors when beams are reordered. A
    `LycheeCache` can do both in place, but not take back what has left a sliding window.
    """
    if request.drafts and _has_windows(request):
        return "dynamic"
    moves = request.drafts or (request.setting("num_beams") or 1) > 1
    return "growing" if kind == "static" and moves else kind


def _has_windows(request: Request) -> bool:
    """True if a layer of the model may attend to a sliding window."""
    config = request.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None))


def _growing(settings: Settings, request: Request, tell: Callable[[str], None]) -> Any:
    """Return a `LycheeCache` with room for the prompt and for some of what is generated."""
    model, ids, new = request.model, request.ids, request.new_tokens
    slots = None
    if ids is not None and not model.config.is_encoder_decoder:
        room = max(ids.shape[1] // 2, ROOM)
        slots = capacity(ids.shape[1] + (room if new is None else min(new, room)))
    try:
        cache = LycheeCache(model.config, slots, settings.storage, settings.cache_dtype)
    except ValueError as error:
        tell(f"a dynamic cache is used: {error}")
        return _dynamic(settings, request, tell)
    if not model.config.is_encoder_decoder:
        return cache
    return EncoderDecoderCache(cache, DynamicCache())


def _static(_: Settings, request: Request, __: Callable[[str], None]) -> Any:
    """Return a `StaticCache` for all tokens; None if `generate()` has to find their number."""
    model, ids, new = request.model, request.ids, request.new_tokens
    if ids is None or new is None or model.config.is_encoder_decoder:
        return None
    return StaticCache(
        config=model.config, max_cache_len=capacity(ids.shape[1] + max(new, DEFAULT_NEW))
    )


def _dynamic(_: Settings, request: Request, __: Callable[[str], None]) -> Any:
    config = request.model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if not request.model.config.is_encoder_decoder:
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=config))


_MAKERS = {"growing": _growing, "static": _static, "dynamic": _dynamic}
