"""Settings of `prepare`: options of the backend, kind of the cache, and how prompts are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lychee_compile.cache.number_formats import FORMATS
from lychee_compile.cache.storage import STORAGES
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.options import OptionError, Options, check_names, integer, one_of

CACHES = ("growing", "static", "dynamic")
"""Values of the option `cache` of `prepare`."""
PREFILLS = {"dense": "exact", "exact": "exact", "sparse": "sparse"}
"""Values of the option `prefill` of `prepare`, and what the backend calls them."""
SPARSE_CHUNK = 4096
"""Number of tokens in a chunk of a prompt that is read sparsely, if the user names none."""
OWN = ("cache", "storage", "cache_dtype", "prefill_chunk")
"""Options of `prepare` that the backend does not have."""


@dataclass(frozen=True)
class Settings:
    """Settings that a model was prepared with."""

    given: Mapping[str, Any]
    """Options of the backend as they were given, by the names that the backend knows."""
    backend: Options
    """The same options, with defaults for the others."""
    cache: str
    """Kind of the cache that is made if the user brings none."""
    storage: str
    """Memory that a growing cache lies in, "device" or "host"."""
    cache_dtype: str | None
    """Form of the numbers of a growing cache."""
    prefill_chunk: int | None
    """Number of tokens in a chunk of a prompt; None: prompts are not cut."""
    plain_until: int
    """Number of tokens at the start of a prompt that are not cut, since no chunk of them would be
    sparse."""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """Return the settings in the keyword arguments of `prepare`.

        Raises `OptionError` for unknown names and wrong values.
        """
        check_names(given, OWN)
        options = {name: value for name, value in given.items() if name not in OWN}
        if "prefill" in options:
            one_of("prefill", options["prefill"], tuple(PREFILLS))
            options["prefill"] = PREFILLS[options["prefill"]]
        backend = Options.parse(None, options)
        cache = given.get("cache", CACHES[0])
        one_of("cache", cache, CACHES)
        storage, cache_dtype = _stored(given, cache)
        chunk = given.get("prefill_chunk")
        whole = backend.prefill_from if chunk is None and backend.prefill == "sparse" else 0
        chunk = _chunk(chunk, backend)
        return cls(options, backend, cache, storage, cache_dtype, chunk, whole)

    @property
    def sparse_prompts(self) -> bool:
        """True if prompts are to be read sparsely."""
        return self.backend.prefill == "sparse"

    @property
    def stores_otherwise(self) -> bool:
        """True if keys and values are to be held in another memory or form than usual."""
        return self.storage != STORAGES[0] or self.cache_dtype is not None

    @property
    def notes_tokens(self) -> bool:
        """True if the index wants to know the tokens of a prompt."""
        return self.backend.tokenizer is not None


def _stored(given: Mapping[str, Any], cache: str) -> tuple[str, str | None]:
    """Return memory and form of the numbers of a cache of this kind."""
    storage, dtype = given.get("storage", STORAGES[0]), given.get("cache_dtype")
    one_of("storage", storage, STORAGES)
    one_of("cache_dtype", dtype, tuple(FORMATS))
    if cache != CACHES[0] and (storage, dtype) != (STORAGES[0], None):
        name, value = ("cache_dtype", dtype) if storage == STORAGES[0] else ("storage", storage)
        raise OptionError(
            f"option {name}={value!r} is for a growing cache, and cache={cache!r} is none: "
            f'use cache="{CACHES[0]}", or leave {name} out'
        )
    return storage, dtype


def _chunk(value: object, backend: Options) -> int | None:
    """Return the number of tokens in a chunk of a prompt. Fewer would count as decoding."""
    if value is not None:
        return integer("prefill_chunk", value, at_least=LONGEST_QUERY + 1, expected_or="None")
    return SPARSE_CHUNK if backend.prefill == "sparse" else None
