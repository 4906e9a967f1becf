"""Language models of transformers: loading, dense prefill, decoding through the backend."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lychee_compile.boundaries import BoundaryTable, boundary_table
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.evaluate.errors import EvaluationError, require
from lychee_compile.options import Options

PREFILL_TOKENS = 512
"""Number of tokens in one pass of a dense prefill."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageModel:
    """Causal language model and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @cached_property
    def boundaries(self) -> BoundaryTable:
        """Boundary strength of every token of the vocabulary."""
        return boundary_table(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return device_of(self.model)

    @property
    def longest(self) -> int | None:
        """Number of tokens the model was trained for; None if its configuration does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens with which an answer ends."""
        given = [
            getattr(getattr(self.model, "generation_config", None), "eos_token_id", None),
            self.model.config.get_text_config().eos_token_id,
            getattr(self.tokenizer, "eos_token_id", None),
        ]
        listed = [each if isinstance(each, list | tuple) else [each] for each in given]
        return frozenset(each for some in listed for each in some if each is not None)

    def encode(self, text: str, special: bool = True) -> Tensor:
        """Return token ids, int64 [T], with a beginning-of-text token if the model has one."""
        ids = self.tokenizer(text, add_special_tokens=special).input_ids
        return torch.tensor(ids, dtype=torch.int64)


def load(name: str, device: str = "cpu", dtype: str | None = None) -> LanguageModel:
    """Return the model `name`, a folder or a name that transformers knows, and its tokenizer.

    Without `dtype` it is float32 on a CPU and bfloat16 elsewhere. Raise `EvaluationError` if it
    cannot be loaded.
    """
    require("transformers", "loading a model")
    from transformers import AutoConfig, AutoTokenizer

    check_device(device)
    _quiet()
    with _told(f"--model {name}: it cannot be loaded"):
        AutoConfig.from_pretrained(name)
    with _told(f"--model {name}: no tokenizer, save it there by tokenizer.save_pretrained(DIR)"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    return LanguageModel(Path(name).name or name, load_model(name, device, dtype), tokenizer)


def load_model(name: str, device: str = "cpu", dtype: str | None = None) -> Any:
    """Return the model `name` without its tokenizer, as `load` does."""
    from transformers import AutoModelForCausalLM

    chosen = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    _quiet()
    # Inductor's advice on a GPU: float32 is asked for to compare with.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    with _told(f"--model {name}: it cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[chosen])
    return model.eval().to(device)


def _quiet() -> None:
    """Silence what other libraries tell while they load: errors are told in one line."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of each of its retries


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise `EvaluationError` in place of what transformers raises if it cannot load something."""
    try:
        yield
    except (OSError, ValueError) as error:
        brief = " ".join(str(error).split())
        raise EvaluationError(f"{what}: {brief}") from error


def check_device(device: str) -> None:
    """Raise `EvaluationError` if this machine has no such device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise EvaluationError(f"--device {device}: expected cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise EvaluationError(f"--device {device}: PyTorch sees no CUDA device here")


def device_of(model: Any) -> torch.device:
    """Return the device of a model."""
    return next(model.parameters()).device


def compiled(model: Any, options: Options | Mapping[str, Any]) -> Callable[..., Any]:
    """Return `model` compiled through the backend; off a CPU with the plain PyTorch operators."""
    chosen = dict(vars(options) if isinstance(options, Options) else options)
    chosen["reference"] = chosen.get("reference", False) or device_of(model).type != "cpu"
    return torch.compile(model, backend="lychee", options=chosen)


def new_cache(model: Any) -> Any:
    """Return an empty growing cache."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def fork(cache: Any) -> Any:
    """Return a cache that continues `cache` without changing it.

    A growing cache writes into no tensor: it joins old and new ones. So both share tensors.
    """
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def nothing(_: int) -> None:
    """Ignore the progress."""


@torch.no_grad()
def prefill(model: Any, token_ids: Tensor, advance: Callable[[int], object] = nothing) -> Any:
    """Return a cache of `token_ids`, int64 [L], read densely; `advance` gets numbers of tokens."""
    cache = new_cache(model)
    read_on(model, cache, token_ids, advance)
    return cache


def read_on(
    model: Any, cache: Any, token_ids: Tensor, advance: Callable[[int], object] = nothing
) -> None:
    """Read `token_ids`, int64 [T], densely into `cache`, a block at a time; T may be 0."""
    if len(token_ids) == 0:
        return
    argument = cache_argument(model)
    for part in token_ids[None].to(device_of(model)).split(PREFILL_TOKENS, dim=1):
        model(part, **{argument: cache}, logits_to_keep=1)
        advance(part.shape[1])


@torch.no_grad()
def prefill_at_once(forward: Callable[..., Any], model: Any, token_ids: Tensor) -> Any:
    """Return a cache of `token_ids`, int64 [L], read in one pass by the compiled `forward`."""
    cache = new_cache(model)
    ids = token_ids[None].to(device_of(model))
    forward(ids, **{cache_argument(model): cache}, logits_to_keep=1)
    return cache
