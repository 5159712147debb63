"""Low-rank factorisations: pure functions on tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 4


def truncated_svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a dense matrix by block power iteration.

    Never forms a full decomposition: the cost is ten products with a thin matrix (Halko, Martinsson,
    Tropp 2011, "Finding structure with randomness", algorithm 4.4). Exact where `rank` plus a small
    margin reaches the smaller side of the matrix; the start is drawn from `seed`.

    Args:
        matrix: [m, n].
        rank: number of triplets, at most min(m, n).

    Returns:
        U [m, rank], singular values [rank] in descending order, V^T [rank, n].
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def refactor(bs: Sequence[Tensor], factors_a: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-`rank` factors of sum_i B_i A_i, from the stacked factors alone.

    QR of [B_1..B_S] and of [A_1; ..; A_S]^T and an SVD of the small core: exact, and no m x n matrix is
    ever formed.

    Args:
        bs: matrices B_i [m, r_i].
        factors_a: matrices A_i [r_i, n].
        rank: of the result; where it exceeds what the sum can have, the factors end in zeros.

    Returns:
        B [m, rank], A [rank, n] and the kept energy, the share of the squared Frobenius norm in [0, 1].
    """
    left = torch.linalg.qr(torch.cat(list(bs), dim=1))
    right = torch.linalg.qr(torch.cat(list(factors_a)).T)
    u, s, vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    b, a = balanced_factors(left.Q @ u, s, vt @ right.Q.T, rank)
    return b, a, kept_energy(s, s.square().sum(), rank)


def balanced_factors(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors B [m, rank] and A [rank, n] that share the singular values evenly, zero-padded to `rank`."""
    b = u.new_zeros(u.shape[0], rank)
    a = vt.new_zeros(rank, vt.shape[1])
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    b[:, :kept] = u[:, :kept] * root
    a[:kept] = root[:, None] * vt[:kept]
    return b, a


def kept_energy(s: Tensor, total: Tensor, rank: int) -> float:
    """Share of the squared Frobenius norm `total` that the first `rank` singular values hold."""
    return float(s[:rank].square().sum() / total) if total > 0 else 1.0
