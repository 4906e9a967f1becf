"""A transformers cache that grows in place and looks static to compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from lychee_compile.cache.growing_layer import GrowingLayer, Shared, larger, rounded
from lychee_compile.cache.storage import Storage
from lychee_compile.cache.stored_layer import StoredLayer, mark_static

EAGER_STEPS = 2
"""Number of single tokens decoded eagerly in a row after which a cache counts as eager."""
_UNBOUNDED = 2**40


class LycheeCache(Cache):
    """A key-value cache that grows in place, for `generate()` and for loops of your own.

    A `DynamicCache` copies the whole past at every eager step. A `StaticCache` needs to know the
    longest context beforehand. This cache writes in place into contiguous buffers
    [B, Hkv, slots, D], and moves to larger ones when they are full. Each token is copied about
    once, however many follow. Layers with a sliding window are those of transformers.

        lychee_compile.prepare(model, budget=1024)
        model.generate(**inputs)  # makes one, and takes one: generate(**inputs, cache=cache)

        model.forward = torch.compile(model.forward, backend="lychee")
        model.generate(**inputs, cache=LycheeCache(model.config), disable_compile=True)

    Older releases of transformers call the argument `past_key_values`.

    To compiled graphs it is a static cache of its present capacity, with its length on the device,
    so that CUDA graphs work. It grows outside of graphs. `generate()` announces the tokens of each
    step, and the host compares their sum with the capacity. It waits for the device only when the
    sum reaches the capacity. A loop of your own that calls a compiled model has to announce its
    tokens, all at once or step by step:

        model(prompt, cache=cache)          # eagerly: this makes room for itself
        cache.reserve(new_tokens)
        for _ in range(new_tokens):
            logits = compiled(token, cache=cache).logits

    In steps that nobody announced, tokens beyond the capacity give NaN, and the next call of the
    cache outside of the graph raises `RuntimeError`. After the first growth Dynamo compiles once
    more, for any capacity. With `torch.compile(dynamic=False)` it compiles after each growth, for
    the new capacity, which lets CUDA graphs keep the index too. Without compilation attention reads
    views of the filled slots, as it does with a `DynamicCache`.

    An encoder-decoder model takes a pair, `EncoderDecoderCache(LycheeCache(config),
    DynamicCache())`. The second may be a `LycheeCache` too: it holds the keys of the encoder
    without free slots. A `LycheeCache` alone raises `ValueError` at the first forward.

    `storage="host"` holds keys and values of layers without a window in page-locked memory of the
    host, which kernels of a GPU read over the link: the memory of the host limits the context. The
    index lies in memory of the device. It is built before the first compiled step, which reads all
    keys once more. Uncompiled forwards copy what they read to the device, a layer at a time.
    Compiled attention that is not sparse over such a cache reads all of it at each call, with a
    warning. On a CPU both storages are the same.

    `dtype` is the form of the numbers of these layers, with the bytes of one number beside those of
    bfloat16, 2: "fp8" (1), "int8" with a scale for 32 channels of a token (1 1/16), and "int4"
    with a scale and a least number for 32 channels of a token (5/8). All tokens are rounded when
    they are written. The first forward of all attends to its own tokens before they are rounded.

    `config` is the model's. `capacity` is the number of slots to begin with, rounded up to a
    multiple of 512; by default it is what the first forward needs, and half as much or 1024 again.
    Raises `OptionError` (a ValueError) for another `storage` or `dtype`, `RuntimeError` if memory
    of the host cannot be locked, and `ValueError` for models with layers that hold anything but
    keys and values of full or sliding-window attention, such as indexers.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int | None = None,
        storage: str = "device",
        dtype: str | None = None,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1 slot, not {capacity}")
        with_encoder = bool(getattr(config, "is_encoder_decoder", False))
        slots = 0 if capacity is None else rounded(capacity)
        self._shared = Shared(slots, Storage(storage, dtype), encoder_decoder=with_encoder)
        layers: list[Any] = StaticCache(config, max_cache_len=_UNBOUNDED).layers
        growing = [number for number, layer in enumerate(layers) if type(layer) is StaticLayer]
        for number, layer in enumerate(layers):
            if number in growing:
                layers[number] = GrowingLayer(self._shared, last=number == growing[-1])
            elif isinstance(layer, StaticLayer) and type(layer) is not StaticSlidingWindowLayer:
                raise ValueError(
                    f"layer {number} of this model needs a {type(layer).__name__}, which "
                    "LycheeCache cannot grow: use a StaticCache or a DynamicCache"
                )
        self._growing: list[GrowingLayer] = [layers[number] for number in growing]
        super().__init__(layers=layers)

    @property
    def capacity(self) -> int:
        """Number of slots of each growing layer, a multiple of 512; 0 before the first forward."""
        return self._shared.slots

    @property
    def is_compileable(self) -> bool:
        """True if forwards are expected to be compiled, which makes masks cover whole buffers.

        It turns false when two tokens in a row were decoded eagerly, and true again at the next
        compiled step.
        """
        if torch.compiler.is_compiling():
            return True
        return self._shared.eager_steps < EAGER_STEPS

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, for compiled steps outside of `generate()`.

        Announced tokens add up until they reach the capacity. Only then is the length read from the
        device, and only if that leaves too little room do buffers grow.
        """
        if not self._growing:
            return
        shared, length = self._shared, self._growing[0].length
        shared.at_most = (shared.at_most if length is None else length) + tokens
        if shared.at_most > shared.slots:
            shared.at_most = max(layer.count() for layer in self._growing) + tokens
            if shared.at_most > shared.slots:
                shared.slots = larger(shared.slots, shared.at_most)
        self._settle()

    def _settle(self) -> None:
        """Bring every layer to the capacity, in memory that no graph owns."""
        for layer in self._growing:
            if not layer.is_initialized:
                continue
            if self._shared.graph_made or layer.keys.shape[2] < self._shared.slots:
                layer.move()
        self._shared.graph_made = False

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys that attention will read, and the position of the first.

        Outside of graphs this announces `query_length` tokens and makes room for them.
        """
        growing = isinstance(self.layers[layer_idx], GrowingLayer)
        if self._shared.encoder_decoder:
            self._shared.announced = query_length
        if growing and not torch.compiler.is_compiling():
            length = self._growing[0].length
            self.reserve(query_length)
            apart = length == 0 or (length is not None and not self.is_compileable)
            self._shared.shown = length + query_length if apart and length is not None else None
        return super().get_mask_sizes(query_length, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return the number of tokens: an int, or in a compiled graph a tensor."""
        if layer_idx == 0 and self._growing:
            return self._growing[0].get_seq_length()
        return super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Return the position of the next token: a tensor if the host does not know it."""
        if not self._growing:
            return super().get_query_offset(layer_idx)
        first = self._growing[0]
        if torch.compiler.is_compiling() or first.length is not None:
            return first.get_seq_length()
        return first.cumulative_length + first.prefix

    @property
    def is_croppable(self) -> bool:
        """True if every layer still has all tokens: a sliding window forgets tokens it has left."""
        return all(_croppable(layer) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, with the sign that transformers uses.

        Raises `ValueError` for positive numbers, and `RuntimeError` if a sliding window has moved
        on or a layer cannot forget.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): pass the negative number of tokens to remove"
            )
        if tokens_to_remove == 0:
            return
        if not self.is_croppable:
            raise RuntimeError(
                "a LycheeCache with sliding-window or linear layers cannot be cropped once tokens "
                "have left the window: use a DynamicCache for assisted generation with this model"
            )
        self._shared.at_most = max(self._shared.at_most + tokens_to_remove, 0)
        for layer in self.layers:
            if isinstance(layer, StaticSlidingWindowLayer):
                layer.cumulative_length_int = max(layer.cumulative_length_int + tokens_to_remove, 0)
                layer.cumulative_length.fill_(layer.cumulative_length_int)
            elif isinstance(layer, GrowingLayer):
                layer.crop(tokens_to_remove)

    def share_prefix(self, tokens: int, capacity: int | None = None) -> None:
        """Hold the first `tokens` tokens of one row once, for all rows of the batches that follow.

            model(prompt, cache=cache)                      # one row
            cache.share_prefix(cache.get_seq_length())
            cache.batch_repeat_interleave(16)
            model(questions, cache=cache)                   # 16 rows

        Tokens behind them are each row's own, and are repeated. While there are none, as after
        `crop` to the prefix, the next forward may have any number of rows; if it is compiled, it
        makes new buffers and is dense. Compiled attention reads the prefix once for all rows.
        Uncompiled forwards put prefix and own tokens together, a layer at a time. Layers with a
        sliding window share nothing. `capacity` is the number of slots of each row to begin with.

        `share_prefix(0)` undoes it for one row. Raises `ValueError` if the cache has fewer tokens,
        more rows than one, or the keys of an encoder.
        """
        held = self.get_seq_length()
        if self._growing and tokens == self._growing[0].prefix:
            return
        if not self._growing or self._shared.holds_encoder or not 0 <= tokens <= held:
            raise ValueError(
                f"share_prefix({tokens}): a cache of a decoder has to hold these tokens, and this "
                f"one holds {held}"
            )
        rows = max(layer.keys.shape[0] for layer in self._growing)
        if rows > 1:
            raise ValueError(f"share_prefix({tokens}): pass a cache of one row, not of {rows}")
        rest = held - tokens
        shared = self._shared
        slots = 0 if capacity is None else rounded(capacity)
        shared.slots = larger(0, rest) if slots < max(rest, 1) else slots
        shared.at_most = rest
        shared.shown, shared.eager_steps, shared.graph_made = None, 0, False
        for layer in self._growing:
            layer.share_prefix(tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._change_batch(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, int [B'] or bool [B]."""
        self._change_batch(lambda buffer: buffer[indices.to(buffer.device)])

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                if isinstance(layer, StoredLayer):
                    layer.change_buffers(change)
                else:
                    layer.keys, layer.values = change(layer.keys), change(layer.values)
                layer.batch_size = layer.keys.shape[0]
                mark_static(layer)

    def reset(self) -> None:
        """Forget all tokens, shared ones too, and keep the buffers of each row's own."""
        super().reset()
        self._shared.at_most, self._shared.shown, self._shared.eager_steps = 0, None, 0


def _croppable(layer: Any) -> bool:
    if isinstance(layer, StaticSlidingWindowLayer):
        return bool(layer.cumulative_length_int <= layer.max_cache_len)
    return isinstance(layer, GrowingLayer) or type(layer).__name__ == "DummyLayer"
