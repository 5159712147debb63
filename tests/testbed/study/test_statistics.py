import math

import pytest

from benchmarks.testbed.study.statistics import half_width, rank_correlation, sign_flip_p_value


def test_intervals_are_those_of_students_t():
    # By R: t.test(c(0.61, 0.64, 0.62))$conf.int is 0.6233333 -+ 0.0379461.
    assert half_width([0.61, 0.64, 0.62]) == pytest.approx(0.0379461, abs=1e-5)
    assert math.isnan(half_width([0.5]))


def test_p_values_count_all_choices_of_signs():
    assert sign_flip_p_value([1, 1, 1, 1]) == 2 / 16
    # Sums of 1, 2 and 3 with signs: only 6 and -6 are as far from zero as 6.
    assert sign_flip_p_value([1, 2, 3]) == 2 / 8
    assert sign_flip_p_value([1, -2, 3]) == 6 / 8
    assert sign_flip_p_value([0.5, -0.5]) == 1


def test_many_differences_are_sampled():
    assert sign_flip_p_value([1.0] * 24) == pytest.approx(1 / (2**20 + 1), rel=2)
    assert sign_flip_p_value([1.0, -1.0] * 12) == 1
    mixed = [0.3] * 13 + [-0.2] * 11
    assert sign_flip_p_value(mixed) == sign_flip_p_value(mixed)
    assert 0.1 < sign_flip_p_value(mixed) < 0.5


def test_rank_correlation_is_spearmans():
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([0.1, 0.5, 0.7, 20], [-3, 1, 0, 2]) == pytest.approx(0.8, abs=1e-5)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1, abs=1e-5)
