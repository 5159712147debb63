"""Methods on the singular values and vectors of deltas. Tensors with fewer than two dimensions are averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esmerge.methods.arithmetic import average, weighted_sum
from esmerge.methods.registry import Finite, merging_method


def _weighted(deltas: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [weight * delta for weight, delta in zip(weights, deltas, strict=True)]


@merging_method()
def tsv(deltas: Sequence[Tensor], weights: Tensor, *, lambda_: Finite = 1.0) -> Tensor:
    """Task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1).

    Of each of the S deltas the first 1/S of its singular triplets is kept; the concatenated left and right vectors are
    each replaced by the nearest orthonormal ones, X -> P Q^T of the decomposition X = P D Q^T, so that the tasks do not
    interfere.

    Args:
        lambda_: scale of the result.
    """
    if deltas[0].dim() < 2:
        return average(deltas, weights).mul_(lambda_)
    kept = max(1, min(deltas[0].shape) // len(deltas))
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in _weighted(deltas, weights)]
    left = _orthonormal(torch.cat([u[:, :kept] for u, _, _ in parts], dim=1))
    values = torch.cat([s[:kept] for _, s, _ in parts])
    right = _orthonormal(torch.cat([vt[:kept] for _, _, vt in parts]))
    return (left * values) @ right * lambda_


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows (orthogonal Procrustes)."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


@merging_method()
def iso_c(deltas: Sequence[Tensor], weights: Tensor, *, lambda_: Finite = 1.0) -> Tensor:
    """Isotropic merging in common subspace (Marczak et al. 2025, arXiv 2502.04959, algorithm 1).

    U diag(s) V^T, the weighted sum of the deltas, becomes mean(s) U V^T.

    Args:
        lambda_: scale of the result.
    """
    total = weighted_sum(deltas, weights)
    if total.dim() < 2:
        return average(deltas, weights).mul_(lambda_)
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    # Directions that the sum does not have at all would be noise, lifted to the mean.
    rank = int((s > s[0] * 1e-5).sum()) if s[0] > 0 else 0
    return u[:, :rank] @ vt[:rank] * (s.sum() / max(1, rank) * lambda_)
