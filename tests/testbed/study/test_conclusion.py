"""What the page says of results in a few lines, on results that are made up."""

import pytest
import torch

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study.comparisons import compare, compare_with_all
from benchmarks.testbed.study.conclusion import conclusion
from benchmarks.testbed.study.results import Found
from benchmarks.testbed.study.tasks import TASKS

COUNTED = [task.name for task in TASKS if task.counts]
SEEDS = (43, 44)
SCORES = {
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
    return Found(scores, {}, {}, {}, {}, {})


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
    assert compare(found, drawn, "embedding_matching", "tsv", [44]) is None
    others = compare_with_all(found, drawn, "published")
    assert {name: own.mean for name, own in others.items()} == pytest.approx(
        {
            "embedding_matching_as_read": -0.3,
            "embedding_matching_merged_layers": -0.295,
            "embedding_matching_own_prompts": -0.29,
            "embedding_matching": -0.28,
            "tsv": -0.2,
            "uniform": -0.1,
        }
    )


def test_the_best_merge_and_the_papers_are_told(found, drawn):
    told = conclusion(found, drawn).splitlines()
    assert (
        told[0]
        == "- **embedding matching, as read** is the best merge on the mean of all tasks: 0.705, over 2 trainings."
    )
    assert told[1].startswith("- The next best that is no embedding matching is TSV-M, 0.605: +0.100 [+0.100, +0.100]")
    # Six rows are compared with the best, so each p is six times as large.
    assert told[1].endswith("p = 0.004, Holm-adjusted 0.024.")
    assert told[2].startswith("- On the training on which nothing was developed or chosen (44) alone: +0.100")
    kept = 100 * (0.7 / 0.72 + 0.71 / 0.73) / 2
    assert f"it keeps {kept:.1f} % of what the specialists score" in told[3]
    assert "comes to 0.405, place 7 of 7 merges, below the uniform average (-0.100" in told[4]


def test_a_rival_that_knows_the_questions_is_told_beside_one_that_does_not(found, drawn):
    for values in (found.scores, drawn):
        values["regmean_own_prompts"] = values["embedding_matching"]
    told = conclusion(found, drawn).splitlines()
    assert told[1].startswith("- The next best that is no embedding matching is RegMean, own prompts, 0.685: +0.020")
    assert told[2].startswith("- Of the others, which know no questions of the tasks, the best is TSV-M, 0.605: +0.100")
    assert told[3].startswith("- On the training on which nothing was developed or chosen (44) alone: +0.020")


def test_what_was_trained_further_is_compared_but_is_no_merge(found, drawn):
    for values in (found.scores, drawn):
        values["tuned"] = values["embedding_matching_as_read"]
    told = conclusion(found, drawn).splitlines()
    assert told[0].startswith("- **embedding matching, as read** is the best merge")
    # It is one of seven rows that are compared with the best.
    assert told[1].startswith("- The next best that is no embedding matching is TSV-M, 0.605: +0.100")
    assert told[1].endswith("Holm-adjusted 0.028.")


def test_too_few_results_say_nothing(found, drawn):
    del found.scores["published"]
    assert conclusion(found, drawn) == "There are too few results to say."
