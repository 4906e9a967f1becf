"""Sketches of keys: true bounds whatever happens, good estimates where keys have structure."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, Heads, heads, histories, random, seeds

from lychee_compile.kernels.reference import sketch_axes
from lychee_compile.kernels.reference.sketch import KeySketches
from lychee_compile.kernels.reference.sketch_axes import ITERATIONS, STEPS, fit_axes, sketch_bits

CPU = torch.device("cpu")


def sketched(key, block=4096, steps=1, start=None):
    """Return sketches of `key` [B, Hkv, T, D], taken in so many equal steps."""
    batch, kv_heads, tokens, head_dim = key.shape
    start = torch.zeros(batch, dtype=torch.int64) if start is None else start
    sketches = KeySketches(batch, kv_heads, head_dim, CPU, block)
    edges = [tokens * step // steps for step in range(steps + 1)]
    for begin, end in pairwise(edges):
        if end > begin:
            first = torch.full_like(start, begin).maximum(start)
            sketches.encode(key, start, first, torch.full_like(start, end))
    return sketches


@pytest.mark.parametrize(("head_dim", "bits"), [(1, 1), (3, 2), (16, 8), (80, 40), (128, 64)])
def test_half_the_coordinates_are_kept_in_three_bits_on_average(head_dim, bits):
    kept = sketch_bits(head_dim)
    assert len(kept) == bits
    assert sum(kept) <= max(3 * head_dim // 2 + 4, 4)


@given(
    heads, st.sampled_from(KINDS), st.sampled_from(DTYPES), seeds, st.integers(1, 90),
    st.sampled_from([8, 32, 4096]), st.integers(1, 9), st.sampled_from([1.0, -0.5, 3.0]),
)  # fmt: skip
def test_no_score_is_above_its_bound(shape, kind, dtype, seed, tokens, block, steps, scale):
    key = shape.keys(kind, seed, tokens, dtype)
    query = shape.queries(seed, 2, dtype).reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    sketches = sketched(key, block, steps)
    bound = sketches.score_bound(query.float(), scale, tokens)
    score = scale * query.double() @ key.double().transpose(-1, -2)
    assert (score <= bound.double()).all()


@given(histories(2), st.sampled_from(KINDS))
def test_bounds_hold_after_any_history(history, kind):
    """Rows that grow, are cut back and grow again, with other keys each time."""
    shape, block = Heads(2, 1, 1, 4), 16
    key = torch.full((2, 1, 600, 4), torch.nan)
    end = torch.zeros(2, dtype=torch.int64)
    start = torch.tensor([0, 5])
    sketches = KeySketches(2, 1, 4, CPU, block)
    for place, (step, numbers) in enumerate(history):
        if step == "grow":
            begin, end = end.maximum(start), (end.maximum(start) + numbers).clamp(max=600)
            slot = torch.arange(600)
            new = (slot >= begin[:, None]) & (slot < end[:, None])
            key = torch.where(new[:, None, :, None], shape.keys(kind, place, 600), key)
            if bool((end > begin).any()):
                sketches.encode(key, start, begin, end)
        else:
            end = (end - numbers.clamp(min=0)).clamp(min=0)  # -1: a row that goes on
            sketches.forget(start, end)
    slots = int(end.max())
    if not sketches.fitted.shape[1]:
        return
    query = random(3, 2, 1, 3, 4)
    bound = sketches.score_bound(query, 1.0, slots)
    score = query.double() @ key[:, :, :slots].double().transpose(-1, -2)
    slot = torch.arange(slots)
    held = (slot >= start[:, None]) & (slot < end[:, None])
    assert (score <= bound.double())[held[:, None, None].expand_as(score)].all()


def relative_error(sketches, key, query):
    """Return root mean square error of the estimates over the spread of the scores."""
    score = query @ key.transpose(-1, -2)
    wrong = sketches.scores(query, 1.0, key.shape[2]) - score
    return float(wrong.square().mean().sqrt() / score.std())


def low_rank_keys(seed, tokens, rank=6, head_dim=32):
    """Return keys [1, 1, T, D] about a common mean, near a subspace of few dimensions."""
    basis = torch.linalg.qr(random(seed, head_dim, rank)).Q
    spread = random(seed + 1, tokens, rank) * torch.linspace(4, 1, rank)
    noise = 0.05 * random(seed + 2, tokens, head_dim)
    return (5 + spread @ basis.T + noise).view(1, 1, tokens, head_dim)


@given(seeds)
def test_keys_near_a_subspace_are_known_well(seed):
    key = low_rank_keys(seed, 600)
    assert relative_error(sketched(key), key, random(seed + 3, 1, 1, 20, 32)) < 0.1


@given(seeds, st.integers(2, 40))
def test_sketches_taken_step_by_step_are_nearly_as_good(seed, steps):
    key, query = low_rank_keys(seed, 600), random(seed + 3, 1, 1, 20, 32)
    assert relative_error(sketched(key, 256, steps), key, query) < 0.15


def test_keys_that_change_their_subspace_get_other_axes():
    """Axes are computed anew for keys that the axes of earlier keys do not suit."""
    key = torch.cat((low_rank_keys(0, 256), low_rank_keys(9, 256)), 2)
    query = random(3, 1, 1, 20, 32)
    fresh = relative_error(sketched(key, 256, 128), key, query)
    assert fresh < 0.8 * relative_error(sketched(key, 512, 2), key, query)


def test_a_key_that_is_not_finite_comes_first():
    key = random(0, 1, 1, 50, 8)
    key[0, 0, 7, 3] = torch.nan
    key[0, 0, 20] = -torch.inf
    sketches, query = sketched(key), random(1, 1, 1, 2, 8)
    score = sketches.scores(query, -1.0, 50)
    assert (score == torch.inf).nonzero()[:, 3].unique().tolist() == [7, 20]
    assert torch.equal(
        sketches.score_bound(query, -1.0, 50).isinf(), sketches.scores(query, 1.0, 50).isinf()
    )


@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("lists", [1, 3], ids=["for all heads", "for each head"])
def test_scores_at_slots_of_each_querys_own_are_those_of_all_slots(block, lost, lists):
    """Some lie in one block, some in several, and one position has none."""
    key = random(0, 2, 3, 200, 8)
    key[1, :, 77] = torch.nan if lost else key[1, :, 77]
    sketches, query = sketched(key, block), random(1, 2, 3, 2, 3, 8)
    own = [[range(5, 14), range(30, 200, 7), ()], [range(70, 90), (63, 64, 199), range(16)]]
    count = torch.zeros(2, lists, 3, dtype=torch.int64)
    slot = torch.zeros(2, lists, 3, 170, dtype=torch.int64)
    for row, head, position in itertools.product(range(2), range(lists), range(3)):
        given = torch.tensor([each + head for each in own[row][position] if each + head < 200])
        count[row, head, position] = len(given)
        slot[row, head, position, : len(given)] = given
    scores = sketches.scores(query.flatten(2, 3), 0.3, 200).unflatten(2, (2, 3))
    at = slot[:, :, None].expand(-1, 3 if lists == 1 else -1, 2, -1, -1)
    held = (torch.arange(170) < count[..., None])[:, :, None].expand_as(at)
    got, expected = sketches.scores_at(query, 0.3, slot), scores.gather(-1, at)
    torch.testing.assert_close(got[held], expected[held])


def test_rows_are_sketched_as_they_would_be_alone():
    key = random(0, 2, 2, 300, 8)
    start = torch.tensor([0, 37])
    both = sketched(key, 64, 20, start)
    for row in range(2):
        alone = sketched(key[row : row + 1], 64, 20, start[row : row + 1])
        assert torch.equal(both.codes[row, :, start[row] :], alone.codes[0, :, start[row] :])


def plain_axes(keys):
    """Return mean, axes and steps of keys [T, D] in float64, by the definition: no parts, no QR."""
    centre = keys.double().mean(0)
    centred = keys.double() - centre
    covariance = centred.T @ centred / len(keys)
    bits = sketch_bits(keys.shape[1])
    start = torch.randn(len(covariance), len(bits), generator=torch.Generator().manual_seed(0))
    axes = start.double()
    for _ in range(ITERATIONS):
        product = torch.linalg.qr(covariance @ covariance @ axes)
        axes = product.Q * product.R.diagonal().sign()
    deviation = (centred @ axes).square().mean(0).sqrt()
    return centre, axes, deviation * torch.tensor([STEPS[each] for each in bits])


def plain_sketch(keys, centre, axes, step):
    """Return codes [T, r], errors [T, 2] and lengths [T] of keys [T, D] by projection, float64."""
    centre, axes, step = centre.double(), axes.double(), step.double()
    half = torch.tensor([2.0 ** (each - 1) for each in sketch_bits(keys.shape[1])])
    centred = keys.double() - centre
    inside = centred @ axes
    codes = torch.where(step > 0, inside / step, 0).sub(0.5).round().clamp(-half, half - 1)
    within = (inside - (codes + 0.5) * step).norm(dim=1)
    outside = (centred - inside @ axes.T).norm(dim=1)
    return codes, torch.stack((within, outside), 1), centred.norm(dim=1)


def uneven_keys(tokens, head_dim, mean=3.0, least=0.1):
    """Return keys [T, D] with a common mean, whose spread differs from axis to axis.

    If the `least` spread is 0, so is that of all but a quarter of the axes.
    """
    turn = torch.linalg.qr(random(1, head_dim, head_dim)).Q
    spread = torch.logspace(0, math.log10(least or 0.1), head_dim)
    spread[(head_dim + 3) // 4 if least == 0 else head_dim :] = 0
    return mean + random(2, tokens, head_dim) * spread @ turn


@pytest.mark.parametrize(
    ("tokens", "head_dim", "size"),
    [(700, 128, 1.0), (300, 64, 1e-12), (257, 80, 1e12), (90, 5, 1.0), (600, 16, 3e20)],
)
def test_axes_are_those_of_the_definition(monkeypatch, tokens, head_dim, size):
    """Keys are taken in several parts, and numbers may be so large that their squares are not."""
    monkeypatch.setattr(sketch_axes, "CACHED_NUMBERS", 256 * head_dim)
    keys = uneven_keys(tokens, head_dim)
    centre, axes, step = fit_axes(size * keys[None, None])
    expected = plain_axes(keys)
    torch.testing.assert_close(centre[0, 0].double() / size, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(axes[0, 0].double(), expected[1], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(step[0, 0].double() / size, expected[2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e15, 3e20])
def test_keys_are_left_less_their_centre(size):
    """Keys are taken as they are, unless a head has squares that are too small or too large."""
    keys = torch.stack([uneven_keys(300, 17), size * uneven_keys(300, 17, 2.0)])[None]
    centred = torch.empty_like(keys)
    found = fit_axes(keys, None, True, centred)
    assert torch.equal(centred, keys - found[0][..., None, :])
    scale = torch.tensor([1.0, size])[None, :, None]
    for mine, scaled in zip(found, fit_axes(keys, None, True), strict=True):
        by = torch.ones(()) if mine is found[1] else scale
        torch.testing.assert_close(mine / by, scaled / by, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least", [0.3, 1e-4, 0.0], ids=["full", "near a subspace", "within one"])
@pytest.mark.parametrize("shape", [(1, 1, 700, 64), (2, 3, 300, 16), (1, 2, 90, 5)])
def test_sketches_are_those_of_the_definition(monkeypatch, shape, least):
    """By Pythagoras or not, a key is as far from its sketch as it is: rows and heads differ."""
    monkeypatch.setattr(sketch_axes, "CACHED_NUMBERS", 1)
    batch, heads, tokens, head_dim = shape
    means = range(batch * heads)
    key = torch.stack([uneven_keys(tokens, head_dim, 3.0 * each, least) for each in means])
    key = key.view(shape)
    sketches = sketched(key)
    for row, head in itertools.product(range(batch), range(heads)):
        of = [each[row, head, 0] for each in (sketches.centre, sketches.axes, sketches.step)]
        codes, error, length = plain_sketch(key[row, head], *of)
        real = of[2] > 1e-3 * of[2].max()  # in the others there is nothing but rounding
        apart = (sketches.codes[row, head, :tokens] - codes)[:, real].abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 1e-3  # keys on the edge between two codes
        far = 1e-5 * float(length.max())
        got = sketches.error[row, head, :tokens].double()
        torch.testing.assert_close(got, error, rtol=1e-4, atol=far)
        assert abs(float(sketches.longest[row, head, 0] - length.max())) < far
