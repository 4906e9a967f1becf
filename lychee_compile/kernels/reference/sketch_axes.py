"""Axes of sketches: the leading principal axes of some keys, and the steps of their coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 4
"""Number of steps of orthogonal iteration, each with two products: more give no better axes
(measured on Gemma-3), and one product a step gives the same."""
STEPS = {4: 0.3352, 2: 0.9957}
"""Best step of a Gaussian quantiser by its number of bits, in standard deviations."""


def sketch_bits(head_dim: int) -> list[int]:
    """Return the number of bits of each coordinate of a sketch."""
    quarter = (head_dim + 3) // 4
    return [4] * quarter + [2] * min(quarter, head_dim - quarter)


def fit_axes(
    keys: Tensor, valid: Tensor | None = None, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a centre [..., D], axes [..., D, r] and steps [..., r] to `keys`, float32 [..., T, D].

    Keys that are not `valid`, bool [..., T, 1], or not finite do not count; `whole` says that all
    do.
    """
    usable = None if whole else keys.isfinite().all(-1, keepdim=True)
    usable = usable if usable is None or valid is None else usable & valid
    keys = keys if usable is None else torch.where(usable, keys, 0)
    least, most = (each[..., None, None] for each in keys.flatten(-2).aminmax(dim=-1))
    size = torch.maximum(most, -least).clamp(min=torch.finfo(torch.float32).tiny)
    keys = keys / size
    count = torch.full_like(size, keys.shape[-2])
    count = count if usable is None else usable.sum(-2, keepdim=True).clamp(min=1)
    centre = keys.sum(-2, keepdim=True) / count
    centred = keys.sub_(centre)
    centred = centred if usable is None else torch.where(usable, centred, 0)
    bits = sketch_bits(keys.shape[-1])
    covariance = centred.transpose(-1, -2) @ centred / count
    axes = _principal_axes(covariance, len(bits))
    deviation = (axes * (covariance @ axes)).sum(-2).clamp(min=0).sqrt()
    step = torch.tensor([STEPS[each] for each in bits]).to(keys.device, non_blocking=True)
    size = size[..., 0]
    return centre[..., 0, :] * size, axes, step * deviation * size


def _principal_axes(covariance: Tensor, kept: int) -> Tensor:
    """Return the `kept` leading eigenvectors of matrices [..., D, D], best first: [..., D, kept].

    Orthogonal iteration is near enough for axes. Unlike an eigensolver it neither fails nor waits
    for the device. Directions without variance may come out as zero.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(covariance.shape[-1], kept, generator=generator)
    start = start.double().to(covariance.device, non_blocking=True)
    covariance = covariance.double()
    axes = _orthonormal(start.expand(*covariance.shape[:-2], -1, -1))
    for _ in range(ITERATIONS):
        axes = _orthonormal(covariance @ (covariance @ axes))
    return _orthonormal(axes).float()


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns [..., D, r], in their order, by Cholesky's QR.

    Columns are in double precision. If they are badly conditioned, rounding leaves the basis not
    quite orthonormal, and a second call corrects that.
    """
    columns = columns / torch.linalg.vector_norm(columns, dim=-2)[..., None, :].clamp(min=1e-30)
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-13)
    factor, _ = torch.linalg.cholesky_ex(gram, check_errors=False)
    columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return columns.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
