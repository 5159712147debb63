"""What the page says of results in a few lines, on results that are made up."""

from statistics import fmean

import pytest
import torch

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study.comparisons import compare, compare_with_all, distinct_merges
from benchmarks.testbed.study.conclusion import conclusion
from benchmarks.testbed.study.results import Found, over_shared_trainings
from benchmarks.testbed.study.rows import MATCHING, PUBLISHED, PUBLISHED_VARIANT
from benchmarks.testbed.study.table_rows import MERGES
from benchmarks.testbed.study.tasks import TASKS

COUNTED = [task.name for task in TASKS if task.counts]
SEEDS = (43, 44)
SCORES = {
    **dict.fromkeys(MERGES, 0.45),
    "regmean_own_prompts": 0.71,
    "embedding_matching_as_read": 0.7,
    "embedding_matching_merged_layers": 0.695,
    "embedding_matching_own_prompts": 0.69,
    "embedding_matching": 0.68,
    "tsv": 0.6,
    "uniform": 0.5,
    "published": 0.4,
}


@pytest.fixture
def found():
    """Rows whose scores are the same on all tasks; the second training is 0.01 better in all rows."""
    scores = {
        name: {seed: {task.name: value + 0.01 * (seed - 43) for task in TASKS} for seed in SEEDS}
        for name, value in {**SCORES, **dict.fromkeys(MODALITIES, 0.72)}.items()
    }
    choices = {name: {"one": 0.6, "other": 0.5} for name in MATCHING}
    choices["embedding_matching_merged_layers"]["other"] = 0.65
    return Found(scores, {}, choices, {}, {}, {}, scores)


@pytest.fixture
def drawn(found):
    """Resamples around the scores."""
    random = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(len(COUNTED), 500, generator=random, dtype=torch.float64)
    return {
        name: {seed: torch.full_like(noise, own["b3db"]) + noise for seed, own in seeds.items()}
        for name, seeds in found.scores.items()
        if name in SCORES
    }


def test_rows_are_compared_over_the_trainings_that_both_have(found, drawn):
    del found.scores["tsv"][44]
    difference = compare(found, drawn, "embedding_matching", "tsv", SEEDS)
    assert (difference.better, difference.count) == (6, 6)
    # The same samples were drawn for both, so nothing but the difference is left.
    assert [difference.mean, difference.low, difference.high] == pytest.approx([0.08] * 3)
    assert difference.p == pytest.approx(2 / 501) and difference.p_over_tasks == 2 / 64
    assert difference.trainings == "43: +0.080"
    assert compare(found, drawn, "embedding_matching", "tsv", [44]) is None
    others = compare_with_all(found, drawn, "published")
    expected = {name: 0.4 - score for name, score in SCORES.items() if name != "published"}
    assert {name: own.mean for name, own in others.items()} == pytest.approx(expected)


def test_trainings_that_disagree_are_told_with_their_interval(found, drawn):
    for task in COUNTED:
        found.scores["tsv"][44][task] += 0.02
    difference = compare(found, drawn, "embedding_matching", "tsv", SEEDS)
    # By R: t.test(c(0.08, 0.06))$conf.int is 0.07 -+ 0.1270620.
    assert difference.trainings == "43: +0.080, 44: +0.060; ± 0.127"


def test_rows_are_ranked_over_the_trainings_that_all_merges_have(found):
    del found.scores["tsv"][44]
    found.scores["joint"] = {44: found.scores["cell"][44]}
    found.scores["tuned"] = dict(found.scores["cell"])
    shared = over_shared_trainings(found, MERGES)
    assert {tuple(shared.scores[name]) for name in (*MERGES, *MODALITIES)} == {(43,)}
    # What is no merge and has none of these is shown with what it has.
    assert tuple(shared.scores["joint"]) == (44,)
    # So is one that has not all of these: another training stands in.
    del found.scores["tuned"][43]
    assert tuple(over_shared_trainings(found, MERGES).scores["tuned"]) == (44,)
    del found.scores["tsv"]
    assert over_shared_trainings(found, MERGES).scores == found.scores


def test_what_validation_data_chose_is_told_against_what_test_data_ranks_highest(found, drawn):
    told = conclusion(found, drawn).splitlines()
    assert told[0] == (
        "- **embedding matching, merged layers**, the embedding matching that validation data chose, scores 0.700 on "
        f"the mean of all tasks, over 2 trainings: place 3 of {len(MERGES)} merges. (The other ways to match: "
        "embedding matching, as read 0.705, embedding matching, own prompts 0.695, embedding matching, equal terms "
        "0.685.)"
    )
    assert told[1].startswith(
        "- Of other merges that know none of the tasks' questions, the best is TSV-M, 0.605: +0.095 [+0.095, +0.095]"
    )
    # Each p is as many times as large as there are rows that it is compared with.
    assert f"p = 0.004, Holm-adjusted {(len(MERGES) - 1) * 2 / 501:.3f} (by training 43: +0.095, 44:" in told[1]
    assert told[2].startswith("- Of those that know them, the best is RegMean, own prompts, 0.715: -0.015")
    rivals = len(MERGES) - len(MATCHING)
    assert told[3] == (
        f"- The aim was to be above every merge that is no embedding matching with p < 0.05: it is above {rivals - 1} "
        f"of {rivals}, but not above RegMean, own prompts (Holm-adjusted: above 0)."
    )
    assert told[4].startswith("- With the specialists of training 44 alone")
    assert "against TSV-M: +0.095 [+0.095, +0.095], p = 0.004" in told[4]
    assert told[5].startswith("- By task, against TSV-M: BBB +0.095, antimicrobial +0.095, tissue +0.095,")
    assert "Against the uniform average: BBB +0.195," in told[5]
    assert told[6] == (
        "- On tasks about two modalities: embedding matching, merged layers 0.700, TSV-M 0.605, RegMean, own prompts "
        "0.715, uniform average 0.505, the molecule specialist alone 0.725."
    )
    kept = 100 * (0.695 / 0.72 + 0.705 / 0.73) / 2
    assert f"it keeps {kept:.1f} % of what the specialists score" in told[7]
    # Of `tissue`, of 14 tissues, what exceeds chance is more than of the others, of two answers.
    chances = [1 / 14, 0.5, 0.5, 0.5]
    beyond = 100 * fmean((x - c) / (x + 0.025 - c) for x in (0.695, 0.705) for c in chances)
    assert f"Of what that exceeds chance by, they keep {beyond:.1f} %, " in told[7]
    assert f"comes to 0.405, place {len(MERGES)} of {len(MERGES)} merges, below the uniform average: -0.100" in told[8]


def test_a_row_whose_chosen_setting_is_the_published_one_is_no_other_merge(found, drawn):
    found.choices[PUBLISHED] = {PUBLISHED_VARIANT: 0.6, "other": 0.7}
    assert distinct_merges(found) == MERGES
    found.choices[PUBLISHED] = {PUBLISHED_VARIANT: 0.7, "other": 0.6}
    assert set(MERGES) - set(distinct_merges(found)) == {PUBLISHED}
    told = conclusion(found, drawn).splitlines()
    assert f"place 3 of {len(MERGES) - 1} merges" in told[0]
    assert f"Holm-adjusted {(len(MERGES) - 2) * 2 / 501:.3f}" in told[1]


def test_what_chance_could_have_made_is_not_told_apart(found, drawn):
    for own in drawn["published"].values():
        own += torch.linspace(0, 0.25, own.shape[1], dtype=torch.float64)
    assert "not told apart from the uniform average" in conclusion(found, drawn).splitlines()[-1]


def test_scores_on_validation_data_with_other_specialists_choose_nothing(found, drawn):
    found.choices["embedding_matching_own_prompts"]["one"] = 0.66
    assert conclusion(found, drawn).startswith("- **embedding matching, merged layers**, the")
    found.choices["embedding_matching_as_read"]["one"] = 0.66
    assert conclusion(found, drawn).startswith("- **embedding matching, as read**, the")


def test_what_was_trained_further_is_compared_but_is_no_merge(found, drawn):
    for values in (found.scores, drawn):
        values["tuned"] = values["embedding_matching_as_read"]
    told = conclusion(found, drawn).splitlines()
    assert f"place 3 of {len(MERGES)} merges" in told[0]
    assert told[4].startswith(
        "- Against what learns all tasks from labels: average + fine-tuning -0.005 [-0.005, -0.005]"
    )
    # It is one more row that is compared.
    assert f"Holm-adjusted {len(MERGES) * 2 / 501:.3f}" in told[1]


def test_what_was_trained_further_is_compared_over_trainings_that_rank_nothing(found, drawn):
    for values in (found.scores, drawn):
        values["tuned"] = {43: values["tsv"][43], 45: values["tsv"][44]}
        values["published"][45] = values["published"][44]
    shared = over_shared_trainings(found, MERGES)
    assert tuple(shared.scores["published"]) == SEEDS and tuple(shared.scores["tuned"]) == (43, 45)
    others = compare_with_all(shared, drawn, "published")
    assert tuple(others["tuned"].by_training) == (43, 45) and tuple(others["tsv"].by_training) == SEEDS
    assert others["tuned"].mean == pytest.approx(0.4 - 0.6)


@pytest.mark.parametrize("missing", ["published", "uniform", "tsv"])
def test_too_few_results_say_nothing(found, drawn, missing):
    del found.scores[missing]
    assert conclusion(found, drawn) == "There are too few results to say."


def test_nothing_is_said_of_rows_of_unlike_trainings_or_before_a_choice(found, drawn):
    del found.scores["tsv"][44]
    assert conclusion(found, drawn) == "There are too few results to say."
    assert conclusion(over_shared_trainings(found, MERGES), drawn).startswith("- **embedding matching, merged layers**")
    del found.choices["embedding_matching"]
    assert conclusion(over_shared_trainings(found, MERGES), drawn) == "There are too few results to say."


def test_missing_specialists_leave_the_rest_to_tell(found, drawn):
    del found.scores["cell"]
    assert "it keeps an unknown share of what the specialists score" in conclusion(found, drawn)
