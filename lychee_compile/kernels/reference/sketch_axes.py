"""Axes of sketches: the leading principal axes of some keys, and the steps of their coordinates."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ITERATIONS = 4
"""Number of steps of orthogonal iteration, each with the square of the covariance: more give no
better axes (measured on Gemma-3)."""
STEPS = {4: 0.3352, 2: 0.9957}
"""Best step of a Gaussian quantiser by its number of bits, in standard deviations."""
CACHED_NUMBERS = 2**18
"""Number of numbers that are worked on at a time on a CPU, so that they stay in its cache."""
LEAST_ROWS = 256
"""Least number of rows that are worked on at a time: products of fewer are slow."""
LEAST_SQUARES, MOST_SQUARES = 1e-12, 1e24
"""Sums of squares, in the channel with most, between which keys need not be scaled."""


def sketch_bits(head_dim: int) -> list[int]:
    """Return the number of bits of each coordinate of a sketch."""
    quarter = (head_dim + 3) // 4
    return [4] * quarter + [2] * min(quarter, head_dim - quarter)


def rows_at_once(vectors: Tensor) -> int:
    """Return how many rows T of `vectors` [..., T, D] to work on at a time.

    On a CPU these stay in its cache; elsewhere they are all.
    """
    if vectors.device.type != "cpu":
        return max(vectors.shape[-2], 1)
    in_a_row = vectors.shape[:-2].numel() * vectors.shape[-1]
    return max(CACHED_NUMBERS // max(in_a_row, 1), LEAST_ROWS)


def fit_axes(
    keys: Tensor, valid: Tensor | None = None, whole: bool = False, centred: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a centre [..., D], axes [..., D, r] and steps [..., r] to `keys`, float32 [..., T, D].

    Keys that are not `valid`, bool [..., T, 1], or not finite do not count; `whole` says that all
    do. The keys less their centre are left in `centred`, shaped like `keys`, if it is given and
    `whole`.
    """
    if centred is not None and whole:
        moments = _plain_moments(keys, centred)
        if moments is not None:
            return _axes_of(*moments)
    usable = None if whole else keys.isfinite().all(-1, keepdim=True)
    usable = usable if usable is None or valid is None else usable & valid
    keys = keys if usable is None else torch.where(usable, keys, 0)
    least, most = (each[..., None, None] for each in (keys.amin((-1, -2)), keys.amax((-1, -2))))
    size = torch.maximum(most, -least).clamp(min=torch.finfo(torch.float32).tiny)
    count = torch.full_like(size, keys.shape[-2])
    count = count if usable is None else usable.sum(-2, keepdim=True).clamp(min=1)
    centre, covariance = _moments(keys, size, count, usable)
    centre, axes, step = _axes_of(centre, covariance)
    centre, step = centre * size[..., 0], step * size[..., 0]
    if centred is not None:
        torch.sub(keys, centre[..., None, :], out=centred)
    return centre, axes, step


def _axes_of(centre: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre [..., D], axes and steps of keys of mean [..., 1, D] and this covariance."""
    bits = sketch_bits(centre.shape[-1])
    axes = _principal_axes(covariance, len(bits))
    deviation = (axes * (covariance @ axes)).sum(-2).clamp(min=0).sqrt()
    step = torch.tensor([STEPS[each] for each in bits], device="cpu").to(
        centre.device, non_blocking=True
    )
    return centre[..., 0, :], axes, step * deviation


def _plain_moments(keys: Tensor, centred: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what `_moments` does of keys as they are, and leave them less their mean in `centred`.

    None: their squares come near the limits of float32, and they must be scaled first.
    """
    centre = keys.sum(-2, keepdim=True) / keys.shape[-2]
    torch.sub(keys, centre, out=centred)
    covariance = keys.new_empty(*keys.shape[:-2], *keys.shape[-1:] * 2)
    half = keys.shape[-1] // 2
    for part, into in zip(centred.flatten(0, -3), covariance.flatten(0, -3), strict=True):
        torch.mm(part[:, :half].mT, part, out=into[:half])
        torch.mm(part[:, half:].mT, part[:, half:], out=into[half:, half:])
    spread = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)
    if not bool(((spread > LEAST_SQUARES) & (spread < MOST_SQUARES)).all()):
        return None
    return centre, _symmetric(covariance).div_(keys.shape[-2])


def _moments(
    keys: Tensor, size: Tensor, count: Tensor, usable: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the mean [..., 1, D] and the covariance [..., D, D] of keys / size, part by part.

    The keys, float32 [..., T, D], are 0 where they are not `usable`, bool [..., T, 1]; None: all
    are. `size` and `count`, their number, are [..., 1, 1].
    """
    rows, half = rows_at_once(keys), keys.shape[-1] // 2
    parts = [part / size for part in keys.split(rows, -2)]
    total = torch.zeros_like(keys[..., :1, :])
    for part in parts:
        total += part.sum(-2, keepdim=True)
    centre, covariance = total / count, keys.new_zeros(*keys.shape[:-2], *keys.shape[-1:] * 2)
    for number, part in enumerate(parts):
        centred = part.sub_(centre)
        if usable is not None:
            centred = torch.where(usable[..., number * rows :, :][..., :rows, :], centred, 0)
        left, right = centred[..., :half], centred[..., half:]
        covariance[..., :half, :] += left.mT @ centred
        covariance[..., half:, half:] += right.mT @ right
    return centre, _symmetric(covariance) / count


def _symmetric(covariance: Tensor) -> Tensor:
    """Fill in the lower left quarter of a covariance [..., D, D] from the upper right one."""
    half = covariance.shape[-1] // 2
    covariance[..., half:, :half] = covariance[..., :half, half:].mT
    return covariance


def _principal_axes(covariance: Tensor, kept: int) -> Tensor:
    """Return the `kept` leading eigenvectors of matrices [..., D, D], best first: [..., D, kept].

    Orthogonal iteration is near enough for axes. Unlike an eigensolver it neither fails nor waits
    for the device. Directions without variance may come out as zero. A CPU takes one matrix after
    the other, which is faster than all at once.
    """
    if covariance.dim() > 2 and covariance.device.type == "cpu":
        matrices = covariance.flatten(0, -3)
        found = torch.empty(len(matrices), covariance.shape[-1], kept, device="cpu")
        for matrix, axes in zip(matrices, found, strict=True):
            axes.copy_(_principal_axes(matrix, kept))
        return found.view(*covariance.shape[:-1], kept)
    axes = _start(covariance.shape[-1], kept).to(covariance.device, non_blocking=True)
    covariance = covariance.double()
    squared = covariance @ covariance
    for _ in range(ITERATIONS):
        axes = _orthonormal(squared @ axes)
    return _orthonormal(axes).float()


@cache
def _start(size: int, kept: int) -> Tensor:
    """Return where the iteration begins: normal numbers, float64 [size, kept]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, kept, generator=generator, device="cpu").double()


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns [..., D, r], in their order, by Cholesky's QR.

    Columns are in double precision. If they are badly conditioned, rounding leaves the basis not
    quite orthonormal, and a second call corrects that.
    """
    gram = columns.mT @ columns
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :].clamp(min=1e-30)
    gram = gram.div_(length * length.mT)
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-13)
    factor, _ = torch.linalg.cholesky_ex(gram, check_errors=False)
    columns = torch.linalg.solve_triangular(factor.mT * length, columns, upper=True, left=False)
    return columns.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
