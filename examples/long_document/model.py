"""Loading of a model that transformers saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from examples.long_document.task import RefusedError


def quiet() -> None:
    """Silence transformers: its progress bars and warnings would break up those of the demo."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


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
