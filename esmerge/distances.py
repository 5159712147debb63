"""Distances between two clouds of embeddings: pure functions on tensors."""

import torch
from torch import Tensor

from esmerge.low_rank import truncated_svd

EPSILON = 1e-12


def random_directions(count: int, dimensions: int, seed: int) -> Tensor:
    """Random unit directions, float64 [count, dimensions], the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return directions / directions.norm(dim=1, keepdim=True)


def standardize_together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds [K, H] with each feature scaled by mean and population std of all their rows.

    A feature that does not vary keeps its scale.
    """
    both = torch.cat([first, second])
    std = both.std(dim=0, correction=0)
    std = torch.where(std == 0, torch.ones_like(std), std)
    mean = both.mean(dim=0)
    return (first - mean) / std, (second - mean) / std


def sliced_wasserstein(first: Tensor, second: Tensor, directions: Tensor, p: float = 2.0) -> Tensor:
    """Sliced Wasserstein distance of order p between two clouds of equally many points.

    Both are projected on every direction and sorted; the mean of |difference|^p over directions and
    ranks, to the power 1/p (Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures").

    Args:
        first, second: [K, H].
        directions: unit rows, [P, H].

    Returns:
        A scalar tensor.
    """
    gaps = (first @ directions.T).sort(dim=0).values - (second @ directions.T).sort(dim=0).values
    return (gaps.abs().pow(p).mean() + EPSILON).pow(1 / p)


def principal_plane(points: Tensor) -> Tensor:
    """Coordinates [N, 2] of points [N, H] on their first two principal axes, with a fixed sign."""
    u, s, _ = truncated_svd(points - points.mean(dim=0), min(2, *points.shape))
    plane = torch.nn.functional.pad(u * s, (0, 2 - len(s)))
    largest = plane.gather(0, plane.abs().argmax(dim=0, keepdim=True))
    return plane * torch.where(largest < 0, -1.0, 1.0)
