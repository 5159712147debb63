"""Means on the sphere and between task vectors."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from esmerge.methods.arithmetic import shares, weighted_sum
from esmerge.methods.registry import Count, Finite, Positive, merging_method

_PARALLEL = 0.9995


@merging_method(specialists=2)
def slerp(deltas: Sequence[Tensor], weights: Tensor, *, base: Tensor, t: Finite | None = None) -> Tensor:
    """Spherical interpolation between two specialists' weights (Shoemake 1985, "Animating rotation").

    (sin((1 - t) omega) W_1 + sin(t omega) W_2) / sin(omega) with omega the angle between W_1 and W_2; a straight line
    where they are nearly parallel.

    Args:
        base: the base's tensor.
        t: 0 for the first specialist, 1 for the second; by default the second's share of the two weights.
    """
    if not weights.any():
        return torch.zeros_like(base)
    first, second = base + deltas[0], base + deltas[1]
    share = shares(weights)[1] if t is None else torch.as_tensor(t, dtype=base.dtype)
    cosine = (first * second).sum() / (first.norm() * second.norm()).clamp_min(1e-16)
    if cosine.abs() > _PARALLEL:
        return (1 - share) * first + share * second - base
    angle = torch.acos(cosine)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle) - base


@merging_method()
def karcher(
    deltas: Sequence[Tensor], weights: Tensor, *, base: Tensor, iterations: Count = 10, tolerance: Positive = 1e-5
) -> Tensor:
    """Karcher (Riemannian) mean of the specialists' weights on the sphere (Wang et al. 2026, arXiv 2603.04972).

    Directions u_i are averaged by repeated steps m <- exp_m(sum_i a_i log_m(u_i)), along the mean of the tangent
    vectors that point to them, to the minimum of sum_i a_i angle(m, u_i)^2; the length is the weighted mean of the
    lengths.

    Args:
        base: the base's tensor.
        iterations: at most so many steps.
        tolerance: stop when a step is shorter, in radians.
    """
    if not weights.any():
        return torch.zeros_like(base)
    parts = shares(weights).expand(len(deltas), *base.shape).reshape(len(deltas), -1)
    points = torch.stack([(base + delta).reshape(-1) for delta in deltas])
    lengths = points.norm(dim=1, keepdim=True)
    present = lengths[:, 0] > tolerance
    if not present.any():
        return torch.zeros_like(base)
    units = points[present] / lengths[present]
    kept = shares(parts[present])
    mean = (kept * units).sum(dim=0)
    mean = mean / mean.norm() if mean.norm() >= tolerance else units[0]
    for _ in range(iterations):
        cosines = (units @ mean).clamp(-1, 1)[:, None]
        angles = torch.acos(cosines)
        factors = torch.where(angles < tolerance, 0, angles / torch.sin(angles).clamp_min(1e-16))
        tangent = (kept * factors * (units - cosines * mean)).sum(dim=0)
        step = tangent.norm()
        if step < tolerance:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * tangent / step
        mean = mean / mean.norm()
    return ((parts * lengths).sum(dim=0) * mean).reshape(base.shape) - base


@merging_method()
def model_stock(deltas: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The average delta, shortened by how much the deltas agree (Jang et al. 2024, arXiv 2403.19522, eq. 2).

    With the mean cosine c between pairs of N deltas, the average is scaled by t = N c / (1 + (N - 1) c).
    """
    cosines = [(a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-6) for a, b in combinations(deltas, 2)]
    cosine = torch.stack(cosines).mean().clamp(-1, 1)
    denominator = 1 + (len(deltas) - 1) * cosine
    share = len(deltas) * cosine / denominator if denominator.abs() >= 1e-6 else torch.zeros_like(cosine)
    return share * weighted_sum(deltas, shares(weights))
