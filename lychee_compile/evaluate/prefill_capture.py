"""Queries, keys and values of a prefill, captured while a model reads a sequence in one pass.

The model's attentions are replaced by dense ones that keep their operands, through the registry in
which transformers looks attentions up. No graph is traced, and the model's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import device_of, nothing
from lychee_compile.evaluate.tensors import Capture, SiteTensors
from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.sizes import QUERY_TILE

NAME = "lychee_capture"
"""Name of the capturing attention among those of transformers."""
QUERIES_AT_ONCE = 512
"""Number of queries of one dense attention, which bounds the memory of its mask."""


def tile_positions(length: int, tiles: int) -> list[int]:
    """Return the positions of whole tiles of queries in the later two thirds of a sequence.

    The last whole tile is among them; no query sees the tokens behind it. Raise `EvaluationError`
    if the sequence is too short for a tile.
    """
    first, last = -(-length // (3 * QUERY_TILE)), length // QUERY_TILE - 1
    if last < first:
        least = 2 * QUERY_TILE
        raise EvaluationError(f"--length {length}: expected at least {least}, for whole tiles")
    numbers = torch.linspace(first, last, tiles).round().long().unique().tolist()
    return [position for n in numbers for position in range(n * QUERY_TILE, (n + 1) * QUERY_TILE)]


@torch.no_grad()
def capture_prefill(
    model: Any,
    token_ids: Tensor,
    positions: Sequence[int],
    *,
    strengths: Tensor | None = None,
    sites: Sequence[str] = (),
    name: str = "",
    text: str = "",
    advance: Callable[[int], object] = nothing,
) -> Capture:
    """Return tensors of the global attentions of `model`, with the queries at `positions`.

    The arguments are those of `capture`. Attentions with a sliding window are left out. Raise
    `EvaluationError` if no other attention is left.
    """
    token_ids = token_ids.flatten()
    attention = _CapturingAttention(model, torch.tensor(list(positions)), sites, advance)
    with _attending(model, attention):
        model(token_ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)
    if not attention.captured:
        reasons = [f"{site}: {reason}" for site, reason in attention.skipped.items()][:4]
        among = f" among those named {', '.join(sites)}" if sites else ""
        listed = "; ".join(reasons) or "the model has none that transformers can exchange"
        raise EvaluationError(f"no global attention was captured{among}: {listed}")
    kept = None if strengths is None else strengths.flatten().cpu()
    captured = tuple(attention.captured)
    return Capture(captured, attention.positions, token_ids.cpu(), kept, name, text)


@dataclass(frozen=True)
class _Settings:
    """Settings with which transformers calls an attention, besides its operands."""

    scale: float
    window: int | None
    """Number of keys that a query sees at most; None if it sees all before it."""
    softcap: float | None
    sinks: Tensor | None
    """Extra logits of each query head, [Hq]."""

    @classmethod
    def of(cls, query: Tensor, arguments: Mapping[str, Any]) -> Self:
        """Return the settings in the keyword `arguments` of a call over `query` [1, Hq, L, D]."""
        scale, window = arguments.get("scaling"), arguments.get("sliding_window")
        return cls(
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=window if window and window < query.shape[2] else None,
            softcap=arguments.get("softcap"),
            sinks=arguments.get("s_aux"),
        )

    @property
    def unfit(self) -> str | None:
        """Reason why the operands are not kept; None if they are."""
        if self.window is not None:
            return "it does not see the whole sequence: a sliding window"
        return None if self.sinks is None else "it has attention sinks as extra logits"


class _CapturingAttention:
    """Dense causal attention that keeps its operands, called as transformers calls attentions."""

    def __init__(
        self,
        model: Any,
        positions: Tensor,
        sites: Sequence[str],
        advance: Callable[[int], object],
    ) -> None:
        self.positions = positions
        self.captured: list[SiteTensors] = []
        self.skipped: dict[str, str] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._layers = model.config.get_text_config().num_hidden_layers
        self._sites, self._advance = sites, advance

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,  # None for an attention that transformers does not know
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """Return [1, L, Hq, Dv] for `query` [1, Hq, L, D] over key and value [1, Hkv, L, D]."""
        settings, name = _Settings.of(query, arguments), self._names[id(module)]
        if not self._sites or any(fnmatchcase(name, each) for each in self._sites):
            if settings.unfit is not None:
                self.skipped[name] = settings.unfit
            else:
                self._keep(name, query, key, value, settings)
        extra = None if settings.sinks is None else settings.sinks.view(1, -1, 1)
        options = (settings.scale, settings.window, settings.softcap, extra)
        output = causal_attention(query, key, value, *options)
        self._advance(query.shape[2] // self._layers)
        return output.transpose(1, 2).contiguous(), None

    def _keep(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, settings: _Settings
    ) -> None:
        chosen = query[:, :, self.positions.to(query.device)].float().contiguous()
        # Copies, as the originals may be views of a projection of all heads together.
        keys = key.clone(memory_format=torch.contiguous_format)
        values = value.clone(memory_format=torch.contiguous_format)
        site = SiteTensors(name, chosen, keys, values, settings.scale, settings.softcap)
        self.captured.append(site)


@contextmanager
def _attending(model: Any, attention: Callable[..., Any]) -> Iterator[None]:
    """Replace all of the model's attentions by `attention` inside the context."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """Return dense causal attention, [B, Hq, L, Dv], over the last `window` keys or over all.

    `softcap` and `extra` are those of `attend`. A block of queries reads only keys that it sees.
    """
    length, parts = query.shape[2], []
    for begin in range(0, length, QUERIES_AT_ONCE):
        end = min(begin + QUERIES_AT_ONCE, length)
        first = 0 if window is None else max(0, begin - window + 1)
        position = torch.arange(begin, end, device=query.device)[:, None]
        slot = torch.arange(first, end, device=query.device)
        seen = slot <= position
        if window is not None:
            seen = seen & (slot > position - window)
        tensors = (query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end])
        parts.append(dense_attention(Operands(*tensors, seen, scale, softcap, extra)))
    return torch.cat(parts, 2)
