"""Keys that are evaluated when they are read are those that are computed at once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, seeds
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.loads import Load
from lychee_compile.kernels.reference.scores import rows_at

PAGE = 4


def plain(draw) -> tuple[Load, Tensor]:
    batch, heads, pages, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 6, 4
    dtype, tokens = draw(st.sampled_from(DTYPES)), 24
    shape = (batch, heads, tokens, 2 * half)
    number = torch.randint(-127, 128, shape, dtype=torch.int8)
    unit, cos = torch.rand(batch, heads, tokens, 1), torch.rand(tokens, half)
    kind = draw(st.sampled_from(["scaled", "turned", "paged", "flat", "tail"]))
    if kind == "scaled":
        found = number * unit * 0.5 + 2
        load = Load("at(0, b, h, kv, d)*at(1, b, h, kv, 0)/2 + 2", dtype, (number, unit), shape)
    elif kind == "turned":
        left, right = number.float().chunk(2, -1)
        found = torch.cat((-right * cos, left * cos), -1)
        text = "where((d < 4), -at(0, b, h, kv, d + 4)*at(1, kv, d), at(0, b, h, kv, d - 4)*"
        load = Load(text + "at(1, kv, d - 4))", dtype, (number, cos), shape)
    elif kind == "paged":
        stored = torch.randn(batch * pages, PAGE, heads, 2 * half)
        table = torch.randperm(batch * pages).view(batch, pages)
        found = stored[table].flatten(1, 2).transpose(1, 2)
        text = "at(0, entry(1, b, ((kv)//(4))), ((kv)%(4)), h, d)"
        load = Load(text, dtype, (stored, table), shape)
    elif kind == "flat":
        stored = torch.randn(tokens, batch, heads * 2 * half)
        found = stored.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        load = Load("at(0, kv, b, 8*h + d)", dtype, (stored,), shape)
    else:
        stored, tail = torch.randn(batch, heads, 20, 2 * half), torch.randn(4, 2 * half)
        wide = tail.expand(batch, heads, -1, -1)
        found = torch.cat((stored, wide), 2)
        text = "where((kv < 20), at(0, b, h, kv, d), at(1, kv - 20, d))"
        load = Load(text, dtype, (stored, tail), shape)
    return load, found.to(dtype)


@given(data=st.data(), seed=seeds)
def test_what_is_read_is_what_would_be_computed_at_once(data, seed) -> None:
    torch.manual_seed(seed)
    load, whole = plain(data.draw)
    lazy, (batch, heads, tokens, channels) = LoadedTensor.of(load), load.shape
    begin = data.draw(st.integers(0, tokens - 1))
    end = data.draw(st.integers(begin, tokens))
    part = lazy[:, :, begin:end]
    assert isinstance(part, LoadedTensor)
    assert part.shape == (batch, heads, end - begin, channels)
    pairs = [(lazy.float(), whole.float()), (part, whole[:, :, begin:end])]
    pairs += list(zip(lazy.split(7, dim=2), whole.split(7, dim=2), strict=True))
    slot = torch.randint(0, tokens, (5,))
    row = torch.randint(0, batch, (5, 2))
    own = torch.randint(0, tokens, (batch, heads, 2, 3))
    wide = own[:, :, 0, :, None].expand(-1, -1, -1, channels)
    pairs += [
        (lazy.index_select(2, slot), whole.index_select(2, slot)),
        (lazy[row, :, slot[:, None]], whole[row, :, slot[:, None]]),
        (rows_at(lazy, own), rows_at(whole, own)),
        (lazy.gather(2, wide), whole.gather(2, wide)),
        (lazy[0, 0, 3:9], whole[0, 0, 3:9]),
        (fingerprints(lazy), fingerprints(whole)),
    ]
    for got, want in pairs:
        assert torch.equal(got + 0, want + 0)
        assert got.dtype == want.dtype


@given(data=st.data(), seed=seeds)
def test_an_index_of_them_is_the_index_of_all_keys(data, seed) -> None:
    torch.manual_seed(seed)
    load, whole = plain(data.draw)
    policy = data.draw(st.sampled_from(["lychee", "quest", "lycheecluster", "clusterkv", "fasa"]))
    config = IndexConfig(policy=policy, budget=12, sinks=1, recent=4, chunk=(2, 4))
    at = torch.arange(20).expand(load.shape[0], -1)
    write = CacheWrite(torch.zeros(load.shape[0], dtype=torch.int64), at, None)
    for key in (LoadedTensor.of(load), whole):
        index = CacheIndex(key, config)
        index.update(key, write, build=True)
        state = index.fingerprint, index.index.tail, *index.index.partition()
        if key is not whole:
            first = state
    for got, want in zip(first, state, strict=True):
        assert torch.equal(got, want)
