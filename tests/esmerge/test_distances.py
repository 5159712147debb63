"""Distances between clouds of embeddings have the properties that their names promise."""

import pytest
import torch

from esmerge.distances import principal_plane, random_directions, sliced_wasserstein, standardize_together


def cloud(count, dimensions, seed=0):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestRandomDirections:
    def test_are_unit_vectors_in_all_directions(self):
        directions = random_directions(4000, 3, seed=1)
        assert directions.dtype == torch.float64
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(4000, dtype=torch.float64))
        assert directions.mean(dim=0).abs().max() < 0.05
        torch.testing.assert_close(directions.T @ directions / 4000, torch.eye(3).double() / 3, rtol=0, atol=0.03)

    def test_depend_on_the_seed_alone(self):
        first = random_directions(5, 3, seed=1)
        torch.manual_seed(99)
        assert torch.equal(first, random_directions(5, 3, seed=1))
        assert not torch.equal(first, random_directions(5, 3, seed=2))


class TestSlicedWasserstein:
    @pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
    def test_in_one_dimension_is_the_wasserstein_distance(self, p):
        first, second = cloud(50, 1), cloud(50, 1, seed=1) * 2 + 1
        gaps = first.flatten().sort().values - second.flatten().sort().values
        distance = sliced_wasserstein(first, second, random_directions(8, 1, seed=0), p)
        torch.testing.assert_close(distance, gaps.abs().pow(p).mean().pow(1 / p))

    def test_of_a_shifted_cloud(self):
        """A shift by v moves every projection by v . direction, whose mean square is |v|^2 / H."""
        first, directions = cloud(40, 6), random_directions(20_000, 6, seed=0)
        shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0], dtype=torch.float64)
        distance = sliced_wasserstein(first, first + shift, directions)
        assert float(distance) == pytest.approx(5 / 6**0.5, rel=0.02)

    def test_ignores_the_order_of_points_and_clouds(self):
        first, second, directions = cloud(30, 4), cloud(30, 4, seed=1), random_directions(64, 4, seed=0)
        distance = sliced_wasserstein(first, second, directions)
        torch.testing.assert_close(sliced_wasserstein(second.flip(0), first, directions), distance)

    def test_of_a_cloud_to_itself(self):
        first = cloud(30, 4)
        assert float(sliced_wasserstein(first, first.flip(0), random_directions(64, 4, seed=0))) < 2e-6


def test_standardized_clouds_have_common_mean_and_deviation():
    first, second = standardize_together(cloud(20, 3) * 5 + 1, cloud(20, 3, seed=1))
    both = torch.cat([first, second])
    torch.testing.assert_close(both.mean(dim=0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(both.std(dim=0, correction=0), torch.ones(3).double())
    assert first.std() > 2 * second.std()


def test_feature_that_does_not_vary_becomes_zero():
    first, second = standardize_together(torch.full((4, 1), 7.0), torch.full((4, 1), 7.0))
    assert torch.equal(torch.cat([first, second]), torch.zeros(8, 1))


class TestPrincipalPlane:
    def test_keeps_the_distances_of_points_on_a_plane(self):
        plane, axes = cloud(25, 2) * torch.tensor([3.0, 1.0]).double(), torch.linalg.qr(cloud(8, 2, seed=1)).Q
        points = plane @ axes.T + 4
        torch.testing.assert_close(
            torch.cdist(principal_plane(points), principal_plane(points)), torch.cdist(plane, plane)
        )

    def test_first_axis_has_the_largest_variance(self):
        points = cloud(200, 10) * torch.linspace(1, 3, 10).double()
        variances = principal_plane(points).var(dim=0, correction=0)
        best = torch.linalg.eigvalsh(points.T.cov(correction=0)).flip(0)[:2]
        torch.testing.assert_close(variances, best, rtol=1e-3, atol=0)

    def test_sign_does_not_depend_on_the_order_of_points(self):
        points = cloud(12, 5)
        torch.testing.assert_close(principal_plane(points.flip(0)).flip(0), principal_plane(points))

    def test_of_fewer_points_than_axes(self):
        assert torch.equal(principal_plane(torch.ones(1, 5)), torch.zeros(1, 2))
