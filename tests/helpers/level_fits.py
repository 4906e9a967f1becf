"""Clusters, channels and chunks of a kernels' index, as the plain form has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.gpu.levels.index import LevelDeviceIndex
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.chunk_table import bounds_of, decided
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.level_index import LevelIndex
from lychee_compile.kernels.reference.token_cluster_index import TokenClusterIndex


def share_fits(index: KVIndex, kernels: LevelDeviceIndex) -> None:
    """Let the plain form have the clusters, and the channels, that the kernels were fitted to."""
    named, rows = kernels.named, kernels.layout.batch
    if isinstance(index, LevelIndex):
        if index.stack.pairs is not None:
            index.channels = named["channels"].long()
    elif isinstance(index, TokenClusterIndex):
        index.label = named["label"].long() - 1
        index.tail = torch.minimum(named["waiting"][:, 0, 0].long(), index.fresh)
        index.columns = {k: v.clone() for k, v in with_channel(kernels.columns(0, rows)).items()}
    else:
        share_chunk_clusters(index, kernels)


def share_chunk_clusters(index: ChunkIndex, kernels: LevelDeviceIndex) -> None:
    """Let the plain form have the clusters of chunks that the kernels have."""
    named, rows, above = kernels.named, kernels.layout.batch, index.above
    labels = [named[f"label_{number + 1}"].long() - 1 for number in range(len(above.labels))]
    for number in range(len(labels)):
        columns = with_channel(kernels.columns(number, rows))
        above.columns[number] = {name: held.clone() for name, held in columns.items()}
    if labels:
        count = index.span.shape[1]
        more = max(count - labels[-1].shape[2], 0)
        labels[-1] = F.pad(labels[-1], (0, more), value=-1)[:, :, :count]
    above.relabel(labels)
    # Kernels do not know where a padded row begins: they count hidden keys of its first chunk.
    cut = bounds_of(index.span, index.settings.chunk)[0] < index.start[:, None]
    for name, held in index.fields.items():
        mine = named[f"summary_{name}"][:, :, : held.shape[2]].float()
        mine = mine if mine.dim() == 4 else mine[..., None]
        mine = F.pad(mine, (0, 0, 0, held.shape[2] - mine.shape[2]))
        index.fields[name] = torch.where(cut[:, None, :, None], mine, held)


def with_channel(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return columns whose fields of one number have an axis for it, as the plain form has."""
    numbers = ("tokens", "first", "end")
    return {
        name: held.float()[..., None] if held.dim() == 3 and name not in numbers else
        held.float() if held.dim() == 4 else held.long()
        for name, held in columns.items()
    }  # fmt: skip


def table_of(index, rows: int) -> tuple[Tensor, Tensor]:
    """Return the chunks that the kernels know, int32 [B, Hkv, N], and which of them are decided."""
    end = index.parts.header[1 : 1 + rows].long()
    span = index.named["span"][:rows]
    return span, decided(span, end[:, None].expand(-1, span.shape[1]), index.layout.settings.chunk)
