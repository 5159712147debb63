"""Methods on the singular values and vectors of deltas. Tensors with fewer than two dimensions are averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esmerge.methods.arithmetic import average, weighted_sum
from esmerge.methods.registry import Finite, merging_method

# Singular values below this share of the largest are rounding errors of float32; their directions are arbitrary.
_RELATIVE_ZERO = 1e-5
# How many directions are tried where a matrix may have no more, as deltas of adapters do.
_FEW = (16, 64)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], singular values [r] in descending order and V^T [r, n], without those that are zero."""
    basis = _thin_basis(matrix)
    if basis is None:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    rank = int((s > s[0] * _RELATIVE_ZERO).sum()) if s[0] > 0 else 0
    return u[:, :rank], s[:rank], vt[:rank]


def _thin_basis(matrix: Tensor) -> Tensor | None:
    """A few orthonormal columns that span those of a matrix of low rank; None for one that has no low rank.

    Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithm 4.1.
    """
    for width in _FEW:
        if 4 * width <= min(matrix.shape):
            start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(width)).to(matrix)
            basis = torch.linalg.qr(matrix @ start).Q
            if (matrix - basis @ (basis.T @ matrix)).norm() <= _RELATIVE_ZERO * matrix.norm():
                return basis
    return None


def _weighted(deltas: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [weight * delta for weight, delta in zip(weights, deltas, strict=True)]


@merging_method()
def tsv(deltas: Sequence[Tensor], weights: Tensor, *, lambda_: Finite = 1.0) -> Tensor:
    """Task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1).

    Of each of the S deltas the first 1/S of its singular triplets is kept, without zero ones; the concatenated
    left and right vectors are each replaced by the nearest orthonormal ones, X -> P Q^T of the decomposition
    X = P D Q^T, so that the tasks do not interfere.

    Args:
        lambda_: scale of the result.
    """
    if deltas[0].dim() < 2:
        return average(deltas, weights).mul_(lambda_)
    kept = max(1, min(deltas[0].shape) // len(deltas))
    parts = [_svd(delta) for delta in _weighted(deltas, weights)]
    values = torch.cat([s[:kept] for _, s, _ in parts])
    if not len(values):
        return torch.zeros_like(deltas[0])
    left = _orthonormal(torch.cat([u[:, :kept] for u, _, _ in parts], dim=1))
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
    # Directions that the sum does not have at all would be noise, lifted to the mean.
    u, s, vt = _svd(total)
    return u @ vt * (s.sum() / max(1, len(s)) * lambda_)
