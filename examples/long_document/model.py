"""The model that answers: the one of this demo, or one that transformers saved."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from examples.long_document import gemma, lookup
from examples.long_document.task import RefusedError, reference_manual


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is not loaded yet."""

    name: str
    """Description for the user."""
    config: Any
    """Configuration of transformers."""
    tokenizer: Any
    """Tokenizer of transformers."""
    load: Callable[[], Any]
    """Function that returns the model."""


def made_here() -> Source:
    """Return the model of this demo, which needs no weights."""
    name = "two layers of induction heads, weights set by hand (examples/long_document/lookup.py)"
    tokenizer = lookup.make_tokenizer([reference_manual()])
    return Source(name, lookup.make_config(), tokenizer, lookup.make_model)


def saved(folder: Path) -> Source:
    """Return the model that transformers saved in `folder`.

    Raise `RefusedError` if its configuration or its tokenizer cannot be loaded.
    """
    config, tokenizer = load_tokenizer(folder)
    return Source(str(folder), config, tokenizer, partial(load_model, folder))


def gemma_270m() -> Source:
    """Return Gemma-3-270M. The first call converts it, which takes a minute."""
    folder = gemma.converted()
    return dataclasses.replace(saved(folder), name="Gemma-3-270M")


def device() -> str:
    """Return the device on which the demo runs: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """Silence what would break up the progress bars: warnings, and those of transformers."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Inductor's advice to round products, which would change what is compared.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def load_tokenizer(folder: Path) -> tuple[Any, Any]:
    """Return the configuration and the tokenizer of the model in `folder`.

    Raise `RefusedError` if they cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RefusedError(f"--model {folder}: {error}") from error


def load_model(folder: Path) -> Any:
    """Return the model in `folder` in float32, at which a CPU is fastest.

    Raise `RefusedError` if it cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise RefusedError(f"--model {folder}: {error}") from error
    return model.eval()


def longest_sequence(config: Any) -> int | None:
    """Return the number of tokens the model was trained for; None if its configuration has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
