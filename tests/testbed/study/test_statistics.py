import math

import pytest
import torch

from benchmarks.testbed.study.coefficients import elements_sentence, layers_sentence
from benchmarks.testbed.study.comparisons import width_of_control
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.resampling import resampled_differences, resampled_scores
from benchmarks.testbed.study.statistics import (
    half_width,
    holm,
    rank_correlation,
    sign_flip_p_value,
)
from lightning_modules.evaluation_results import RESULTS_FOLDER
from lightning_modules.metrics import bootstrap_p_value
from lightning_modules.sample_log import log_file, write_log


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


def test_bootstrap_p_values_count_the_other_side():
    differences = torch.cat([torch.full((990,), 0.1), torch.full((9,), -0.1)])
    assert bootstrap_p_value(differences) == bootstrap_p_value(-differences) == pytest.approx(2 * 10 / 1000)
    assert bootstrap_p_value(torch.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p_value(torch.zeros(999)) == 1


def test_p_values_are_adjusted_as_holm_has_it():
    # By R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_trainings_are_drawn_again_as_well_as_samples():
    ours = torch.zeros(3, 2, 4000, dtype=torch.float64)
    ours[0] = 0.3  # one training alone makes the difference
    drawn = resampled_differences(ours, torch.zeros_like(ours))
    assert drawn.mean() == pytest.approx(0.1, abs=0.01)
    # Binomial: three draws, each with probability 1/3.
    assert drawn.std() == pytest.approx(0.3 * (1 / 3 * 2 / 3 / 3) ** 0.5, abs=0.01)
    assert bootstrap_p_value(drawn) == pytest.approx(2 * (2 / 3) ** 3, abs=0.05)


def test_rank_correlation_is_spearmans():
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([0.1, 0.5, 0.7, 20], [-3, 1, 0, 2]) == pytest.approx(0.8, abs=1e-5)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1, abs=1e-5)


@pytest.fixture
def answered(monkeypatch):
    """A function that writes the log of a task about pairs whose answers are right where they should be."""
    result = {
        "task": {"choices": ["Yes", "No"]},
        "settings": {"choice_lengths": [1, 1]},
        "scores": {"accuracy": None},
    }
    monkeypatch.setattr("benchmarks.testbed.study.resampling.read_results", lambda _: result)

    def write(folder, task, right):
        (folder / RESULTS_FOLDER).mkdir(parents=True, exist_ok=True)
        records = []
        for (molecule, partner), is_right in right.items():
            odds = {"Yes": float(is_right), "No": float(not is_right)}
            records.append({"id": f"{molecule} with {partner}", "answer": "Yes", "log_likelihoods": odds})
            records[-1]["prediction"] = max(odds, key=odds.get)
        write_log(log_file(folder / RESULTS_FOLDER, task), records)
        return {f"{molecule} with {partner}": (molecule, partner) for molecule, partner in right}

    return write


def test_pairs_are_drawn_by_both_partners(answered, tmp_path, monkeypatch):
    """A score that depends on the molecule alone varies as molecules drawn by themselves do, however many pairs."""
    known = answered(tmp_path, "pairs", {(m, p): m < 4 for m in range(8) for p in range(30)})
    single = resampled_scores(tmp_path, ["pairs"])[0]
    assert single.std() == pytest.approx((0.25 / 240) ** 0.5, rel=0.1)
    monkeypatch.setattr("benchmarks.testbed.study.resampling.partners", lambda _: known)
    both = resampled_scores(tmp_path, ["pairs"])[0]
    assert both.mean() == pytest.approx(0.5, abs=0.02)
    assert both.std() == pytest.approx((0.25 / 8) ** 0.5, rel=0.1)
    assert torch.equal(both, resampled_scores(tmp_path, ["pairs"])[0])


@pytest.mark.parametrize("single", [False, True], ids=["few molecules", "single pairs"])
def test_a_control_is_as_uncertain_as_the_side_that_varies(answered, tmp_path, monkeypatch, single):
    """And not three times so where no molecule and no partner is in two pairs."""
    places = Places(tmp_path)
    true = {(n, n): n < 120 for n in range(240)} if single else {(m, p): m < 4 for m in range(8) for p in range(30)}
    known = answered(places.test(42, "row"), "pairs", true)
    answered(places.test(42, "row"), "pairs_shuffled", dict.fromkeys(true, False))
    monkeypatch.setattr("benchmarks.testbed.study.resampling.partners", lambda _: known)
    expected = 1.96 * (0.25 / (240 if single else 8)) ** 0.5
    assert width_of_control(places, "row", "pairs", [42]) == pytest.approx(expected, rel=0.1)


def test_coefficients_are_told_in_a_sentence():
    alpha = torch.tensor([[0.95, 0.2, 0.91, 0.5], [0.05, 0.8, 0.09, 0.5 - 1e-9]], dtype=torch.float64)
    assert layers_sentence({"alpha": alpha}) == (
        "2 of 4 layers have one coefficient above 0.9, and the largest is another specialist's at 2 of 3 steps from a "
        "layer to the next."
    )
    spread = {
        "alpha": alpha,
        "lambda.mean.a": torch.tensor([0.4, 0.6]),
        "lambda.mean.b": torch.tensor([0.5, 0.5]),
        "lambda.std.a": torch.tensor([0.01, 0.02]),
        "lambda.std.b": torch.tensor([0.03, 0.2]),
    }
    assert elements_sentence(spread) == (
        "the mean of a specialist's coefficients in a tensor lies between 0.400 and 0.600, their standard deviation in "
        "it is 0.025 (median)."
    )
