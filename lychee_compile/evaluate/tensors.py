"""Tensors captured from a model, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lychee_compile.evaluate.errors import EvaluationError, require

FORMAT = "lychee_compile capture 1"


@dataclass(frozen=True)
class Columns:
    """Tensors of figures that share their first axis."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return all parts joined along the first axis."""
        columns = {each.name: [getattr(part, each.name) for part in parts] for each in fields(cls)}
        return cls(**{name: torch.cat(values) for name, values in columns.items()})


@dataclass(frozen=True)
class SiteTensors:
    """Queries, keys and values of one attention at some positions of one sequence."""

    name: str
    """Path of the module."""
    query: Tensor
    """Queries, float32 [1, Hq, T, D]."""
    key: Tensor
    """Keys as cached, [1, Hkv, L, D]."""
    value: Tensor
    """Values as cached, [1, Hkv, L, Dv]."""
    scale: float
    softcap: float | None

    def to(self, device: torch.device | str) -> SiteTensors:
        """Return the tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("query", "key", "value")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Capture:
    """Queries, keys and values of a model's attentions while it reads one sequence."""

    sites: tuple[SiteTensors, ...]
    positions: Tensor
    """Slot of each query's token, int64 [T], ascending: query t sees the slots 0 to positions[t].
    """
    token_ids: Tensor
    """Token ids, int64 [L]."""
    strengths: Tensor | None
    """Strength of the boundary after each token, uint8 [L]; None without a tokenizer."""
    model: str = ""
    """Name of the model."""
    text: str = ""
    """Kind of the text."""

    @property
    def lengths(self) -> Tensor:
        """Number of keys that each query sees, int64 [T]."""
        return self.positions + 1

    def to(self, device: torch.device | str) -> Capture:
        """Return the capture with its sites on `device`."""
        return replace(self, sites=tuple(site.to(device) for site in self.sites))

    def save(self, path: Path) -> None:
        """Write the capture as one safetensors file."""
        require("safetensors", "saving a capture")
        from safetensors.torch import save_file

        tensors = {"positions": self.positions, "token_ids": self.token_ids}
        if self.strengths is not None:
            tensors["strengths"] = self.strengths
        for number, site in enumerate(self.sites):
            for name in ("query", "key", "value"):
                tensors[f"{number}.{name}"] = getattr(site, name)
        named = [{"name": s.name, "scale": s.scale, "softcap": s.softcap} for s in self.sites]
        header = {"model": self.model, "text": self.text, "sites": named}
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, path, metadata={"format": FORMAT, "header": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Capture:
        """Return the capture that `save` wrote. Raise `EvaluationError` for any other file."""
        require("safetensors", "reading a capture")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise EvaluationError(f"{path} is no capture: its format is not {FORMAT!r}")
                header = json.loads(metadata["header"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EvaluationError(f"cannot read the capture {path}: {error}") from error
        sites = tuple(
            SiteTensors(
                query=tensors[f"{number}.query"],
                key=tensors[f"{number}.key"],
                value=tensors[f"{number}.value"],
                **site,
            )
            for number, site in enumerate(header["sites"])
        )
        return cls(
            sites,
            tensors["positions"].cpu(),
            tensors["token_ids"].cpu(),
            tensors["strengths"].cpu() if "strengths" in tensors else None,
            header["model"],
            header["text"],
        )
