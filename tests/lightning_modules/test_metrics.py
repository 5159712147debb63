import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_matthews_corrcoef

from lightning_modules.metrics import (
    METRICS,
    UNREADABLE,
    Outcomes,
    paired_differences,
    resample_weights,
    scores_with_intervals,
    values,
    weighted_values,
)


def make_outcomes(samples, choices, seed=0, skill=1.0, unreadable=0.0, ties=False):
    """Answers of a model whose likelihoods lean towards the right choice by `skill`."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(choices, (samples,), generator=generator)
    scores = torch.randn(samples, choices, generator=generator, dtype=torch.float64)
    scores[torch.arange(samples), answers] += skill
    if ties:
        scores = scores.round()
    predictions = scores.argmax(dim=1)
    predictions[torch.rand(samples, generator=generator) < unreadable] = UNREADABLE
    return Outcomes(answers, predictions, choices, scores[:, 0] - scores[:, 1] if choices == 2 else None)


def test_values_of_a_small_case_by_hand():
    # Answers Y Y Y N N; the third is unreadable, the second and the last are wrong.
    outcomes = Outcomes(
        answers=torch.tensor([0, 0, 0, 1, 1]),
        predictions=torch.tensor([0, 1, UNREADABLE, 1, 0]),
        choices=2,
        log_odds=torch.tensor([3.0, -1, 2, -2, 0.5], dtype=torch.float64),
    )
    found = values(outcomes, METRICS)
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert found["total_accuracy"] == pytest.approx(2 / 5)
    assert found["invalid_rate"] == pytest.approx(1 / 5)
    assert found["macro_f1"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found["mcc"] == pytest.approx(0)
    # Of the six pairs of a Y and an N, only (second Y, last N) is in the wrong order.
    assert found["auroc"] == pytest.approx(5 / 6)
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 2 + 3 / 4) / 3)


def test_macro_f1_and_correlation_of_three_choices_by_hand():
    outcomes = Outcomes(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 0]), 4)
    found = values(outcomes, METRICS)
    # F1: 2/(2+2)=1/2, 4/(2+3)=4/5, 2/(2+1)=2/3; the fourth choice does not occur.
    assert found["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    numerator = 4 * 6 - (2 * 2 + 2 * 3 + 2 * 1)
    assert found["mcc"] == pytest.approx(numerator / math.sqrt((36 - 12) * (36 - 14)))
    assert "auroc" not in found


@pytest.mark.parametrize(("choices", "ties"), [(2, False), (2, True), (5, False), (5, True)])
def test_weights_count_samples_as_copies_of_them_would(choices, ties):
    outcomes = make_outcomes(60, choices, unreadable=0.1, ties=ties)
    weights = next(resample_weights(outcomes, seed=3, resamples=7))
    found = weighted_values(outcomes, METRICS, weights)
    for number, row in enumerate(weights):
        rows = [sample for sample, count in enumerate(row.long().tolist()) for _ in range(count)]
        for name, value in values(outcomes[rows], METRICS).items():
            assert found[name][number].item() == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("choices", [2, 3])
def test_correlation_is_zero_for_a_model_that_always_says_the_same(choices):
    outcomes = Outcomes(torch.tensor([0, 1, 1, 0, 1]), torch.ones(5, dtype=torch.long), choices)
    assert values(outcomes, ["mcc"])["mcc"] == 0
    assert weighted_values(outcomes, ["mcc"], torch.ones(1, 5, dtype=torch.float64))["mcc"].item() == 0


def test_a_resample_draws_as_many_as_there_are():
    outcomes = make_outcomes(50, 2)
    drawn = torch.cat(list(resample_weights(outcomes, seed=0, resamples=40)))
    assert drawn.shape == (40, 50)
    assert torch.equal(drawn.sum(dim=1), torch.full((40,), 50.0, dtype=torch.float64))
    assert torch.equal(drawn, torch.cat(list(resample_weights(outcomes, seed=0, resamples=40))))


def test_interval_is_about_that_of_a_share():
    outcomes = make_outcomes(400, 2)
    score = scores_with_intervals(outcomes, ["accuracy"], seed=1)["accuracy"]
    spread = 1.96 * math.sqrt(score.value * (1 - score.value) / 400)
    assert score.low == pytest.approx(score.value - spread, abs=0.01)
    assert score.high == pytest.approx(score.value + spread, abs=0.01)


def test_the_seed_decides_about_the_interval():
    outcomes = make_outcomes(50, 2)
    first, again, other = (scores_with_intervals(outcomes, METRICS, seed)["auroc"] for seed in (1, 1, 2))
    assert first == again
    assert (first.value, first.low) != (other.value, other.low)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # 400 data sets from a source with a known accuracy.
    held = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        right = torch.rand(80, generator=generator) < 0.7
        outcomes = Outcomes(torch.zeros(80, dtype=torch.long), (~right).long(), 2)
        score = scores_with_intervals(outcomes, ["accuracy"], seed=seed)["accuracy"]
        held += score.low <= 0.7 <= score.high
    assert 0.91 <= held / 400 <= 0.98


def test_metrics_that_are_not_defined_are_nan():
    outcomes = Outcomes(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), 2, torch.randn(4).double())
    found = scores_with_intervals(outcomes, METRICS, seed=0)
    assert all(math.isnan(value) for value in vars(found["auroc"]).values())
    assert found["accuracy"].value == 1


@pytest.mark.parametrize("choices", [2, 3])
def test_a_constant_answer_correlates_with_nothing(choices):
    # 15 times the first choice, 5 times the second; the same is predicted always.
    answers = torch.tensor([0] * 15 + [1] * 5)
    constant, other = (Outcomes(answers, torch.full((20,), choice), choices) for choice in (0, 1))
    score = scores_with_intervals(constant, ["mcc"], seed=0)["mcc"]
    assert (score.value, score.low, score.high) == (0, 0, 0)
    difference = paired_differences(constant, other, ["mcc"], seed=0)["mcc"]
    assert (difference.value, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)
    none = Outcomes(answers, torch.full((20,), UNREADABLE), choices)
    assert math.isnan(values(none, ["mcc"])["mcc"])


@pytest.mark.parametrize("choices", [2, 4])
def test_correlation_where_answers_and_predictions_vary(choices):
    outcomes = make_outcomes(80, choices)
    expected = multiclass_matthews_corrcoef(outcomes.predictions, outcomes.answers, choices).item()
    assert values(outcomes, ["mcc"])["mcc"] == pytest.approx(expected, abs=1e-6)
    if choices == 2:  # Pearson's
        pearson = torch.corrcoef(torch.stack([outcomes.predictions, outcomes.answers]).double())[0, 1].item()
        assert expected == pytest.approx(pearson, abs=1e-6)


def test_relatives_are_drawn_together():
    # Ten groups of 40, in each of which all is right or all is wrong: as much is known as from ten samples.
    right = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0]).repeat_interleave(40)
    groups = torch.arange(10).repeat_interleave(40) * 7
    zeros = torch.zeros(400, dtype=torch.long)
    grouped, alone = Outcomes(zeros, 1 - right, 2, groups=groups), Outcomes(zeros, 1 - right, 2)
    drawn = torch.cat(list(resample_weights(grouped, seed=0, resamples=30)))
    assert torch.equal(drawn.view(30, 10, 40).amax(dim=2), drawn.view(30, 10, 40).amin(dim=2))
    assert torch.equal(drawn.sum(dim=1), torch.full((30,), 400.0, dtype=torch.float64))
    few = Outcomes(zeros[:10], 1 - right[::40], 2)
    scores = [scores_with_intervals(outcomes, ["accuracy"], seed=0)["accuracy"] for outcomes in (grouped, few, alone)]
    assert scores[0] == scores[1]
    assert scores[0].high - scores[0].low > 4 * (scores[2].high - scores[2].low)


def test_a_model_does_not_differ_from_itself():
    outcomes = make_outcomes(100, 3)
    for difference in paired_differences(outcomes, outcomes, METRICS, seed=0).values():
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert difference.p_value == 1


def test_a_better_model_is_found_and_chance_is_not():
    weak, strong = make_outcomes(300, 2, skill=0.3), make_outcomes(300, 2, skill=2.5)
    difference = paired_differences(weak, strong, ["accuracy", "auroc"], seed=0)["accuracy"]
    assert difference.low > 0
    assert difference.p_value < 0.01
    # Two models that are equally good: p values are spread evenly.
    answers = torch.zeros(100, dtype=torch.long)
    p_values = []
    for seed in range(60):
        first, second = (
            Outcomes(answers, (torch.rand(100, generator=torch.Generator().manual_seed(s)) < 0.4).long(), 2)
            for s in (seed, seed + 1000)
        )
        p_values.append(paired_differences(first, second, ["accuracy"], seed)["accuracy"].p_value)
    assert 0.3 < sum(p_values) / 60 < 0.7
    assert sum(p < 0.05 for p in p_values) <= 9


def test_pairing_finds_what_separate_intervals_do_not():
    # The second model answers ten more of 200 right, and none of the others differently.
    answers = torch.zeros(200, dtype=torch.long)
    first, second = torch.ones(200, dtype=torch.long), torch.ones(200, dtype=torch.long)
    first[:100], second[:110] = 0, 0
    one, two = Outcomes(answers, first, 2), Outcomes(answers, second, 2)
    intervals = [scores_with_intervals(outcomes, ["accuracy"], 0)["accuracy"] for outcomes in (one, two)]
    assert intervals[0].high > intervals[1].low
    assert paired_differences(one, two, ["accuracy"], 0)["accuracy"].p_value < 0.01
