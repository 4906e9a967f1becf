"""Fingerprints: equal keys alike, different keys not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, heads, random, seeds

from lychee_compile.kernels.reference import fingerprints as module
from lychee_compile.kernels.reference.fingerprints import fingerprints

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
dtypes = st.sampled_from([*DTYPES, torch.float8_e5m2])


@st.composite
def caches(draw, least=1):
    kind, dtype = draw(st.sampled_from(KINDS)), draw(dtypes)
    return draw(heads).keys(kind, draw(seeds), draw(st.integers(least, 30)), dtype)


def bits_of(key):
    """Return the same memory as integers."""
    return key.view(INTEGERS[key.element_size()])


def flipped(key, token, chosen, bit):
    """Return the keys with one bit flipped in `chosen` channels, bool [B, Hkv, D], of a token."""
    bits = bits_of(key.clone())
    mask = torch.iinfo(bits.dtype).min if bit == 8 * key.element_size() - 1 else 1 << bit
    bits[:, :, token] ^= mask * chosen.to(bits.dtype)
    return bits.view(key.dtype)


@given(caches(), st.data())
def test_equal_keys_have_equal_prints_wherever_they_lie(key, data):
    prints = fingerprints(key)
    assert prints.shape == (key.shape[0], key.shape[2])
    assert prints.dtype == torch.int64
    assert torch.equal(fingerprints(key.clone()), prints)
    transposed = bits_of(key).transpose(1, 2).contiguous().view(key.dtype).transpose(1, 2)
    assert torch.equal(fingerprints(transposed), prints)
    assert torch.equal(fingerprints(offset(key, data.draw(st.integers(0, 9)))), prints)
    begin = data.draw(st.integers(0, key.shape[2]))
    assert torch.equal(fingerprints(key[:, :, begin:]), prints[:, begin:])
    longer = torch.cat((bits_of(key), bits_of(key)), 2).view(key.dtype)
    assert torch.equal(fingerprints(longer), prints.repeat(1, 2))


def offset(key, by):
    """Return the same keys, `by` elements into a larger buffer."""
    buffer = torch.empty(key.numel() + by, dtype=key.dtype)
    buffer[by:] = key.flatten()
    return buffer[by:].view(key.shape)


@given(caches(), st.data())
def test_one_changed_bit_changes_one_print(key, data):
    row, head = (
        data.draw(st.integers(0, key.shape[0] - 1)),
        data.draw(st.integers(0, key.shape[1] - 1)),
    )
    token, channel = (data.draw(st.integers(0, key.shape[axis] - 1)) for axis in (2, 3))
    bit = data.draw(st.integers(0, 8 * key.element_size() - 1))
    chosen = torch.zeros(key.shape[0], key.shape[1], key.shape[3], dtype=torch.bool)
    chosen[row, head, channel] = True
    differs = fingerprints(flipped(key, token, chosen, bit)) != fingerprints(key)
    assert differs.nonzero().tolist() == [[row, token]]


@given(caches(), st.integers(0, 63), seeds)
def test_one_bit_of_many_channels_changes_the_print(key, bit, seed):
    """Signs in particular: their differences must not cancel in the sum."""
    bit %= 8 * key.element_size()
    chosen = random(seed, key.shape[0], key.shape[1], key.shape[3]) > 0
    differs = fingerprints(flipped(key, 0, chosen, bit)) != fingerprints(key)
    assert torch.equal(differs[:, 0], chosen.flatten(1).any(1))
    assert not differs[:, 1:].any()


@given(caches())
def test_complemented_keys_differ(key):
    assert (fingerprints((~bits_of(key)).view(key.dtype)) != fingerprints(key)).all()


@given(caches(least=2), seeds)
def test_order_matters(key, seed):
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randperm(key.shape[2], generator=generator)
    same = (bits_of(key)[:, :, moved] == bits_of(key)).all(3).all(1)
    bits = bits_of(key)[:, :, moved].view(key.dtype)
    assert torch.equal(fingerprints(bits) == fingerprints(key), same)
    for axis in (1, 3):
        rolled = bits_of(key).roll(1, axis).contiguous()
        same = (rolled == bits_of(key)).all(3).all(1)
        assert torch.equal(fingerprints(rolled.view(key.dtype)) == fingerprints(key), same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [3, 16])
def test_zeros_have_signs_and_nans_have_payloads(dtype, head_dim):
    key = torch.zeros(1, 2, 6, head_dim, dtype=dtype)
    key[:, :, 1] = -0.0
    key[:, :, 2] = torch.nan
    bits = bits_of(key)
    bits[:, :, 3] = bits[:, :, 2] ^ 1
    bits[:, :, 4] = ~bits[:, :, 0]
    key[:, :, 5] = torch.inf
    prints = fingerprints(key)[0]
    assert len(set(prints.tolist())) == 6
    assert torch.equal(fingerprints(key.clone())[0], prints)


@given(caches(), seeds, st.integers(1, 4096))
def test_prints_do_not_depend_on_how_the_work_is_split(key, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        prints = fingerprints(key, seed)
        patch.setattr(module, "_BLOCK_BYTES", block)
        assert torch.equal(fingerprints(key, seed), prints)


@given(caches(), seeds, seeds)
def test_the_seed_matters(key, seed, other):
    assume(seed != other)
    assume(bits_of(key).any(3).any(1).all())
    assert (fingerprints(key, seed) != fingerprints(key, other)).all()


def test_random_keys_do_not_collide():
    key = random(0, 1, 2, 1 << 14, 8).to(torch.bfloat16)
    assert fingerprints(key).unique().numel() == key.shape[2]


def test_no_tokens_no_prints():
    assert fingerprints(torch.zeros(2, 3, 0, 4)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2])
def test_keys_with_any_strides_have_the_prints_of_their_copy(dtype, heads):
    """The stride of a single head is no multiple of eight bytes, though the keys are contiguous."""
    room = random(0, 1, heads, 10, 24).to(dtype)
    odd = torch.empty(heads * 241 + 1, dtype=dtype).as_strided(room.shape, (241, 241, 24, 1), 0)
    odd.copy_(room)
    assert torch.equal(fingerprints(odd), fingerprints(room))
