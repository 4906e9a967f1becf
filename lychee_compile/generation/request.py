"""One call of `generate()`: its arguments by name, and what they say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from lychee_compile.cache.argument import CACHE_NAMES, cache_name

_DRAFTING = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "is_assistant",
)
_OTHER_PATHS = (
    "custom_generate",
    "negative_prompt_ids",
    "token_healing",
    "prefill_chunk_size",
)
_OUTPUTS = ("output_attentions", "output_hidden_states")
_OF_PROMPT = ("inputs", "input_ids", "attention_mask", *CACHE_NAMES)


def argument_name() -> str:
    """Return the name by which `generate()` of the installed transformers takes a cache."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])


class Request:
    """Arguments of one call of `plain`, the `generate()` of the class of a model."""

    def __init__(
        self,
        model: Any,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        parameters = list(inspect.signature(plain).parameters)[1:]
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        for name in CACHE_NAMES:
            if named.get(name, True) is None:
                del named[name]
        self.model = model
        self.named: dict[str, Any] = named
        """All arguments by name."""
        self.is_usual = plain is GenerationMixin.generate
        """True if the class of the model has no `generate()` of its own."""
        self.cache_name = cache_name(model)
        self._parameters = {*parameters, *vars(GenerationConfig()), "tokenizer", "kwargs"}

    def set(self, **settings: Any) -> None:
        """Add settings to those of the call: to its configuration, if it brings one."""
        config = self.named.get("generation_config")
        if config is not None:
            config = self.named["generation_config"] = copy(config)
        for name, value in settings.items():
            # A None in a configuration is filled from that of the model.
            if config is not None and value is not None and name in vars(config):
                setattr(config, name, value)
            elif value is not None or self.setting(name) is not None:
                self.named[name] = value

    def setting(self, name: str) -> Any:
        """Return a setting from the call, the given configuration or that of the model, or None."""
        for source in (self.named.get("generation_config"), self.model.generation_config):
            if self.named.get(name) is not None:
                return self.named[name]
            if getattr(source, name, None) is not None:
                return getattr(source, name)
        return None

    @property
    def cache(self) -> Any:
        """The cache that the user brings, or None."""
        given = (self.named.get(name) for name in CACHE_NAMES)
        return next((cache for cache in given if cache is not None), None)

    @property
    def named_kind(self) -> str | None:
        """The kind of cache that the user names in this call, or None.

        One in the model's own configuration is a default that came with the weights.
        """
        if self.named.get("cache_implementation") is not None:
            return str(self.named["cache_implementation"])
        config = self.named.get("generation_config")
        kind = getattr(config, "cache_implementation", None)
        default = getattr(self.model.generation_config, "cache_implementation", None)
        return None if kind == default else kind

    def _asks_for(self, names: tuple[str, ...]) -> bool:
        """True if one of these settings is given and not False. The value may be a tensor."""
        values = map(self.setting, names)
        return any(value is not None and value is not False for value in values)

    @property
    def drafts(self) -> bool:
        """True if tokens are drafted, here or for another model, and some of them taken back."""
        return self._asks_for(_DRAFTING)

    @property
    def counts_in_mask(self) -> bool:
        """True for a decoder that finds positions in the mask of the whole text, as BLOOM does."""
        known = inspect.signature(self.model.forward).parameters
        alibi = bool(getattr(self.model.config, "alibi", False))
        return not self.model.config.is_encoder_decoder and ("position_ids" not in known or alibi)

    @property
    def keeps_outputs(self) -> bool:
        """True if outputs of the forward beside the logits are kept."""
        return self._asks_for(_OUTPUTS)

    @property
    def rows_each(self) -> int:
        """Number of rows that each row of the prompt becomes, as for beams."""
        return max(self.setting("num_beams") or 1, self.setting("num_return_sequences") or 1)

    @property
    def ids(self) -> Tensor | None:
        """Token ids of the prompt, int [B, T]; None if it is not, or not only, made of tokens."""
        name = "inputs" if self.named.get("inputs") is not None else "input_ids"
        ids = self.named.get(name)
        is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        return ids if is_ids else None

    @property
    def new_tokens(self) -> int | None:
        """Largest number of tokens to generate behind `ids`; None if nothing says so."""
        most, ids = self.setting("max_new_tokens"), self.ids
        if most is None and self.setting("max_length") is not None and ids is not None:
            most = max(self.setting("max_length") - ids.shape[1], 0)
        return None if most is None else int(most)

    def why_whole(self) -> str | None:
        """Return why the prompt cannot be read in parts before `generate()`; None if it can."""
        model, named = self.model, self.named
        if not self.is_usual or "prepare_inputs_for_generation" in vars(model):
            return "the model has a generate() of its own"
        inputs = "prepare_inputs_for_generation"
        if getattr(type(model), inputs) is not getattr(GenerationMixin, inputs):
            return "the model prepares the inputs of generate() in a way of its own"
        if model.config.is_encoder_decoder:
            return "the model has an encoder"
        if model.config.get_text_config(decoder=True) is not model.config:
            return "the model reads more than text"
        if self.counts_in_mask:
            return "the model counts positions from the mask of the whole text"
        if self.drafts or self.keeps_outputs or self._asks_for(_OTHER_PATHS):
            return "a setting of generate() needs the prompt in one piece"
        unknown = [name for name in named if name not in {*self._parameters, *_OF_PROMPT}]
        if self.ids is None or any(named[name] is not None for name in unknown):
            return "the prompt is made of more than tokens"
        return None if self._mask_is_known() else "padding is to be guessed from tokens"

    def _mask_is_known(self) -> bool:
        """True if the mask covers the prompt, or none is needed."""
        ids, mask = self.ids, self.named.get("attention_mask")
        assert ids is not None
        if mask is not None:
            return bool(mask.shape == ids.shape)
        padding = self.setting("pad_token_id")
        return padding is None or not bool((ids == padding).any())

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Return the ids [B', T] and the mask [B', T] of all rows to generate.

        The mask is None if it hides nothing.
        """
        ids, mask = self.ids, self.named.get("attention_mask")
        assert ids is not None
        if mask is not None and bool((mask == 1).all()):
            mask = None
        ids = ids.repeat_interleave(self.rows_each, 0)
        if mask is not None:
            mask = mask.repeat_interleave(self.rows_each, 0)
        return ids.to(self.model.device), None if mask is None else mask.to(self.model.device)


def positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions of tokens [B, T], of which a mask [B, T] may hide some.

    They are int64 [B, T], or [1, T] if all rows have the same.
    """
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def token_count(inputs: Mapping[str, Any]) -> int:
    """Return the number of tokens of each row that a forward is called with; 0 if not known."""
    for name in ("decoder_input_ids", "inputs_embeds", "input_ids"):
        if isinstance(inputs.get(name), torch.Tensor):
            return int(inputs[name].shape[1])
    return 0
