"""Low-rank factors hold as much as any factors of their rank can."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esmerge.low_rank import refactor, truncated_svd


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(m, n, spectrum):
    u, v = torch.linalg.qr(random(m, len(spectrum))).Q, torch.linalg.qr(random(n, len(spectrum), seed=1)).Q
    return u * spectrum @ v.T


@pytest.mark.parametrize(("m", "n"), [(90, 60), (60, 90)])
@pytest.mark.parametrize(
    ("spectrum", "tolerance"),
    [
        (torch.arange(1, 61).float().reciprocal(), 1e-4),
        (0.7 ** torch.arange(60), 1e-5),
        (torch.ones(60), 1e-5),
        (torch.tensor([3.0, 2.0, 1.0]), 1e-5),
    ],
    ids=["slow decay", "fast decay", "flat", "rank 3"],
)
def test_truncated_svd_keeps_the_best_energy(m, n, spectrum, tolerance):
    matrix = with_spectrum(m, n, spectrum)
    u, s, vt = truncated_svd(matrix, 10)
    best = torch.linalg.svdvals(matrix)[:10]
    assert (u.shape, s.shape, vt.shape) == ((m, 10), (10,), (10, n))
    assert float(s.square().sum()) == pytest.approx(float(best.square().sum()), rel=tolerance)
    residual = (matrix - u * s @ vt).square().sum()
    assert float(residual) == pytest.approx(float(matrix.square().sum() - best.square().sum()), rel=0.01, abs=1e-4)


def test_truncated_svd_of_full_rank_is_exact():
    matrix = random(20, 12)
    u, s, vt = truncated_svd(matrix, 12)
    torch.testing.assert_close(u * s @ vt, matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(12), rtol=0, atol=1e-5)


@pytest.fixture(params=[(30, 20), (20, 30), (5, 40)], ids=str)
def factors(request):
    m, n = request.param
    ranks = (2, 5, 3)
    bs = [random(m, rank, seed=rank) for rank in ranks]
    factors_a = [random(rank, n, seed=10 + rank) for rank in ranks]
    return bs, factors_a, sum(b @ a for b, a in zip(bs, factors_a, strict=True))


class Largest(TorchDispatchMode):
    """Takes down the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_refactor_never_forms_the_dense_matrix():
    m, n, rank = 200, 300, 4
    bs, factors_a = [random(m, rank, seed=i) for i in range(3)], [random(rank, n, seed=9 + i) for i in range(3)]
    with Largest() as largest:
        refactor(bs, factors_a, 3 * rank)
    assert largest.elements == max(m, n) * 3 * rank
    with Largest() as largest:
        bs[0] @ factors_a[0]
    assert largest.elements == m * n


@pytest.mark.parametrize("rank", [10, 16])
def test_refactor_is_exact_where_the_rank_suffices(factors, rank):
    bs, factors_a, dense = factors
    b, a, energy = refactor(bs, factors_a, rank)
    assert (b.shape[1], a.shape[0]) == (rank, rank)
    torch.testing.assert_close(b @ a, dense, rtol=1e-5, atol=1e-5)
    assert energy == pytest.approx(1)


def test_refactor_is_the_best_of_a_smaller_rank(factors):
    bs, factors_a, dense = factors
    b, a, energy = refactor(bs, factors_a, 4)
    s = torch.linalg.svdvals(dense)
    torch.testing.assert_close((dense - b @ a).norm(), s[4:].norm(), rtol=1e-4, atol=1e-4)
    assert energy == pytest.approx(float(s[:4].square().sum() / s.square().sum()), rel=1e-5)


def test_refactor_of_zeros():
    b, a, energy = refactor([torch.zeros(6, 2)], [random(2, 7)], 3)
    assert torch.equal(b @ a, torch.zeros(6, 7))
    assert energy == 1
