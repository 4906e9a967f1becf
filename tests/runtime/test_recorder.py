"""Records of what was read, against what the cache held."""

from __future__ import annotations

import pytest
import torch
from tiny_models import HEADS, KV_HEADS, LAYERS, VOCABULARY, StaticKV, TinyDecoder
from torch import Tensor

import lychee_compile
from lychee_compile.recorder import RecordedPrefill, Recorder

SIZE, PROMPT, STEPS, BATCH = 160, 100, 6, 2
OPTIONS = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4), "overfetch": 1}
EVERYTHING = {**OPTIONS, "budget": SIZE - 1}
PADDING = 40
RAGGED = pytest.mark.parametrize("ragged", [pytest.param(False, marks=pytest.mark.thorough), True])

pytestmark = pytest.mark.usefixtures("uncompiled_graphs")


@torch.no_grad()
def decode(options: dict[str, object], mass: bool, ragged: bool = False) -> Recorder:
    """Record `STEPS` decoding steps; with `ragged` the second row has padding on its left."""
    torch.manual_seed(0)
    model = TinyDecoder().eval()
    compiled = torch.compile(model, backend="lychee", options=options)
    cache = StaticKV.empty(BATCH, SIZE)
    valid: Tensor | None = None
    if ragged:
        valid = torch.ones(BATCH, SIZE, dtype=torch.bool)
        valid[1, :PADDING] = False
    model(torch.randint(0, VOCABULARY, (BATCH, PROMPT)), cache=cache, valid=valid)
    compiled(torch.randint(0, VOCABULARY, (BATCH, 1)), cache=cache, valid=valid)
    with lychee_compile.record(mass=mass) as recorder:
        for _ in range(STEPS):
            compiled(torch.randint(0, VOCABULARY, (BATCH, 1)), cache=cache, valid=valid)
    compiled(torch.randint(0, VOCABULARY, (BATCH, 1)), cache=cache, valid=valid)
    return recorder


@RAGGED
def test_every_sparse_call_within_the_context_is_recorded(ragged: bool) -> None:
    recorder = decode(OPTIONS, mass=True, ragged=ragged)
    assert len(recorder.calls) == STEPS * LAYERS
    lengths = [call.kv_len for call in recorder.calls[::LAYERS]]
    assert lengths == [PROMPT + 2 + step for step in range(STEPS)]
    for call in recorder.calls:
        assert call.tokens.dtype == torch.int64
        assert call.tokens.shape[:3] == (BATCH, KV_HEADS, 1)
        assert int(call.tokens.max()) == call.kv_len - 1
        read = call.tokens[1][call.tokens[1] >= 0]
        assert int(read.min()) == (PADDING if ragged else 0)
        assert torch.equal(call.tokens_read, (call.tokens >= 0).sum(-1))
        assert int(call.tokens_read.max()) <= OPTIONS["budget"]
        for head in call.tokens.flatten(0, 2):
            slots = head[head >= 0]
            assert slots.unique().numel() == slots.numel()


@RAGGED
def test_mass_is_a_share_of_dense_attention(ragged: bool) -> None:
    for call in decode(OPTIONS, mass=True, ragged=ragged).calls:
        assert call.mass is not None
        assert call.mass.shape == (BATCH, HEADS, 1)
        assert bool((call.mass > 0).all())
        assert bool((call.mass < 1).all())


@RAGGED
def test_mass_is_one_where_everything_is_read(ragged: bool) -> None:
    for call in decode(EVERYTHING, mass=True, ragged=ragged).calls:
        expected = torch.full((BATCH, KV_HEADS, 1), call.kv_len)
        expected[1] -= PADDING if ragged else 0
        assert torch.equal(call.tokens_read, expected)
        torch.testing.assert_close(call.mass, torch.ones_like(call.mass))


def test_mass_is_left_out_unless_asked_for() -> None:
    assert all(call.mass is None for call in decode(OPTIONS, mass=False).calls)


def test_a_record_is_printed_as_a_line_for_each_attention() -> None:
    recorder = decode(EVERYTHING, mass=True)
    lines = str(recorder).splitlines()
    read = f"{STEPS} steps read 104 of 104 tokens, which hold 1.000 of the softmax"
    names = dict.fromkeys(call.site for call in recorder.calls)
    assert lines == [f"{name}: {read}" for name in names]
    assert len(lines) == LAYERS
    assert str(decode(OPTIONS, mass=False)).splitlines()[0].endswith("read 32 of 104 tokens")
    assert str(Recorder(mass=False)) == "no sparse attention was recorded"
    tiles = torch.tensor([[[100, 300]]])
    recorder.whole.append(RecordedPrefill("", 256, 2048, tiles, None, torch.ones(1, 1, 256)))
    assert str(recorder).splitlines()[LAYERS] == "(unnamed): 1 prefill read 200 of 2,048 tokens"


def test_chunks_cover_what_is_cached() -> None:
    for call in decode(OPTIONS, mass=False, ragged=True).calls:
        for row, first in enumerate((0, PADDING)):
            used = call.chunk_lengths[row] > 0
            starts, lengths = call.chunk_starts[row, used], call.chunk_lengths[row, used]
            assert int(starts[0]) == first
            assert torch.equal(starts[1:], (starts + lengths)[:-1])
            assert int((starts + lengths)[-1]) == call.kv_len


def test_recorders_nest_and_an_error_ends_them() -> None:
    from lychee_compile.kernels.operators.observe import observers

    def fail() -> None:
        with lychee_compile.record(), lychee_compile.record():
            assert len(observers) == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not observers
