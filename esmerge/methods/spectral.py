"""Methods on the singular values and vectors of deltas.

Tensors that are no matrices are averaged, except those that hold a matrix for each expert: these are merged one by one.
"""

from collections.abc import Callable, Sequence

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


def _by_matrix(
    deltas: Sequence[Tensor], weights: Tensor, merge: Callable[[Sequence[Tensor], Tensor], Tensor]
) -> Tensor:
    """Merge matrices, or those of a tensor [E, m, n] one by one; average whatever else, as kernels [H, 1, k]."""
    shape = deltas[0].shape
    if len(shape) < 2 or len(shape) > 3 or (len(shape) == 3 and 1 in shape[1:]):
        return average(deltas, weights)
    if len(shape) == 2:
        return merge(deltas, weights)
    own = weights.expand(-1, shape[0], -1, -1).unbind(dim=1)
    return torch.stack([merge(matrices, each) for *matrices, each in zip(*deltas, own, strict=True)])


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

    def merge(matrices: Sequence[Tensor], weights: Tensor) -> Tensor:
        kept = max(1, min(matrices[0].shape) // len(matrices))
        parts = [_svd(matrix) for matrix in _weighted(matrices, weights)]
        values = torch.cat([s[:kept] for _, s, _ in parts])
        if not len(values):
            return torch.zeros_like(matrices[0])
        left = _orthonormal(torch.cat([u[:, :kept] for u, _, _ in parts], dim=1))
        right = _orthonormal(torch.cat([vt[:kept] for _, _, vt in parts]))
        return (left * values) @ right

    return _by_matrix(deltas, weights, merge).mul_(lambda_)


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

    def merge(matrices: Sequence[Tensor], weights: Tensor) -> Tensor:
        # Directions that the sum does not have at all would be noise, lifted to the mean.
        u, s, vt = _svd(weighted_sum(matrices, weights))
        return u @ vt * (s.sum() / max(1, len(s)))

    return _by_matrix(deltas, weights, merge).mul_(lambda_)
