"""What attention over a whole sequence works on, taken while a model reads it in one pass.

The model's attentions are replaced by dense ones that take notes, through the registry in which
transformers looks them up; no graph is traced, and what the model computes stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import device_of, nothing
from lychee_compile.evaluate.tensors import Capture, SiteTensors
from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.sizes import QUERY_TILE

NAME = "lychee_capture"
"""Of the attention that takes notes, among those of transformers."""
QUERIES_AT_ONCE = 512
"""Of dense attention, to bound the memory of its mask."""


def tile_positions(length: int, tiles: int) -> list[int]:
    """Positions of whole tiles of queries, spread over the later two thirds of a sequence.

    Its last whole tile is among them; tokens behind that one, none of them sees.
    Raises `EvaluationError` where it is too short for one.
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
    """Tensors of the attentions of `model` over a whole sequence, with the queries at `positions`.

    Arguments as of `capture`. Attentions with a sliding window are left out. Raises
    `EvaluationError` where none is left.
    """
    token_ids = token_ids.flatten()
    notes = _Notes(model, torch.tensor(list(positions)), sites, advance)
    with _attending(model, notes):
        model(token_ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)
    if not notes.taken:
        reasons = [f"{site}: {reason}" for site, reason in notes.skipped.items()][:4]
        among = f" among those named {', '.join(sites)}" if sites else ""
        listed = "; ".join(reasons) or "the model has none that transformers can exchange"
        raise EvaluationError(f"no attention over the whole sequence was captured{among}: {listed}")
    known = None if strengths is None else strengths.flatten().cpu()
    return Capture(tuple(notes.taken), notes.positions, token_ids.cpu(), known, name, text)


class _Notes:
    """A dense causal attention that keeps its operands, as transformers calls one."""

    def __init__(
        self,
        model: Any,
        positions: Tensor,
        sites: Sequence[str],
        advance: Callable[[int], object],
    ) -> None:
        self.positions = positions
        self.taken: list[SiteTensors] = []
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
        mask: Tensor | None,  # noqa: ARG002  # none is made for an attention unknown to transformers
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Output [1, L, Hq, Dv] of `query` [1, Hq, L, D] over key and value [1, Hkv, L, D]."""
        length, name = query.shape[2], self._names[id(module)]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = sliding_window if sliding_window and sliding_window < length else None
        if not self._sites or any(fnmatchcase(name, each) for each in self._sites):
            if window is not None:
                self.skipped[name] = "it does not see the whole sequence: a sliding window"
            elif s_aux is not None:
                self.skipped[name] = "it has attention sinks as extra logits"
            else:
                chosen = query[:, :, self.positions.to(query.device)].float().contiguous()
                # Copies: the originals may be views of a projection of all heads together.
                kept = key.clone(memory_format=torch.contiguous_format)
                values = value.clone(memory_format=torch.contiguous_format)
                self.taken.append(SiteTensors(name, chosen, kept, values, scale, softcap))
        extra = None if s_aux is None else s_aux.view(1, -1, 1)
        output = causal_attention(query, key, value, scale, window, softcap, extra)
        self._advance(length // self._layers)
        return output.transpose(1, 2).contiguous(), None


@contextmanager
def _attending(model: Any, attention: Callable[..., Any]) -> Iterator[None]:
    """Let all of the model's attentions be `attention`."""
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
    """Dense causal attention, [B, Hq, L, Dv], over the last `window` keys where there is one.

    `softcap` and `extra` as in `attend`. Only keys that some query of a block sees are looked at.
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
