"""Model classes of small libraries, most of them with a single idea about attention."""

from __future__ import annotations

from benchmarks.coverage.libraries.catalogue.small.common import entry, library
from benchmarks.coverage.libraries.entries import ids, image

SMALL_OTHERS = (
    library(
        "routing-transformer",
        entry(
            "routing_transformer.RoutingTransformerLM",
            ids(2, 32),
            num_tokens=64,
            max_seq_len=32,
            dim=32,
            depth=1,
            heads=4,
            window_size=8,
            causal=True,
        ),
        needs=("local-attention", "hyper-connections", "mixture-of-experts", "product-key-memory"),
    ),
    library(
        "h-transformer-1d",
        entry(
            "h_transformer_1d.HTransformer1D",
            ids(2, 32),
            num_tokens=64,
            not_attentions=2,
            dim=32,
            depth=2,
            heads=4,
            dim_head=8,
            max_seq_len=32,
            block_size=8,
            causal=False,
        ),
        needs=("rotary-embedding-torch",),
    ),
    library(
        "axial-attention",
        entry(
            "axial_attention.AxialAttention",
            image(8, channels=32),
            dim=32,
            dim_index=1,
            heads=4,
            num_dimensions=2,
        ),
        entry(
            "axial_attention.AxialImageTransformer",
            image(8, channels=32),
            dim=32,
            depth=2,
            heads=4,
            dim_index=1,
            reversible=False,
        ),
    ),
    library(
        "recurrent-memory-transformer-pytorch",
        entry(
            "recurrent_memory_transformer_pytorch.RecurrentMemoryTransformer",
            ids(2, 24),
            num_tokens=64,
            num_memory_tokens=4,
            dim=32,
            depth=2,
            heads=4,
            dim_head=8,
            seq_len=24,
            causal=True,
            use_flash_attn=False,
        ),
        needs=("hyper-connections",),
    ),
)
