"""Configurations of transformers' models, and models made from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lychee_compile.cli.errors import CommandError, one_line, require_transformers
from lychee_compile.evaluate.models import DTYPES, check_device


def load_configuration(name: str) -> Any:
    """Return the configuration of a model: of a folder, or of a name that is cached here.

    Raise `CommandError` if there is none.
    """
    require_transformers("reading a model's configuration")
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CommandError(f"{name}: this folder has no config.json, as transformers saves it")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if not folder.exists():
            raise CommandError(
                f"{name}: no such folder, and no model of that name is cached here"
            ) from error
        raise CommandError(f"{name}: transformers cannot read it: {one_line(error)}") from error


def new_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a causal language model with random weights. Raise `CommandError` if it is none."""
    from transformers import AutoModelForCausalLM

    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise CommandError(
            f"{config.model_type}: expected a causal language model: {one_line(error)}"
        ) from error
    return model.eval()


def text_configuration(config: Any) -> Any:
    """Return the part of a configuration that describes the decoder."""
    return config.get_text_config(decoder=True)


def chosen_device(name: str | None) -> torch.device:
    """Return the device of that name, by default a GPU if there is one.

    Raise `EvaluationError` if there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    return torch.device(name)


def dtype_of(config: Any, name: str | None, default: torch.dtype) -> torch.dtype:
    """Return the dtype called `name`; else that of `config`, unless it is None; else `default`."""
    if name is not None:
        return DTYPES[name]
    if config is None:
        return default
    found = getattr(text_configuration(config), "dtype", None) or getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else default
