"""Rows against each other, over the tasks and the trainings that both have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.resampling import Unit, resampled_differences, resampled_scores
from benchmarks.testbed.study.results import Found
from benchmarks.testbed.study.rows import PUBLISHED, PUBLISHED_VARIANT
from benchmarks.testbed.study.statistics import half_width, sign_flip_p_value
from benchmarks.testbed.study.table_rows import MERGES, TRAINED
from benchmarks.testbed.study.tasks import SHUFFLED, TASKS
from lightning_modules.metrics import bootstrap_p_value, interval

# Of rows that are compared: training -> scores [tasks, resamples].
Resampled = dict[str, dict[int, Tensor]]
_COUNTED = [task.name for task in TASKS if task.counts]
_Z_95 = 1.96


@dataclass(frozen=True)
class Difference:
    """How much higher one row scores than another, on average over tasks and trainings.

    Attributes:
        low, high: 95 % interval over resamples of test samples and trainings.
        by_training: training -> the mean difference over tasks.
        better: in how many pairs of task and training it is higher.
        count: how many pairs there are.
        p: from the same resamples.
        p_over_tasks: of the exact paired permutation test on the means of the tasks.
    """

    mean: float
    low: float
    high: float
    by_training: dict[int, float]
    better: int
    count: int
    p: float
    p_over_tasks: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def trainings(self) -> str:
        """What each training tells, and what they tell by themselves: their interval by Student's t."""
        told = ", ".join(f"{seed}: {own:+.3f}" for seed, own in self.by_training.items())
        width = half_width(list(self.by_training.values()))
        return told if math.isnan(width) else f"{told}; ± {width:.3f}"


def resampled(places: Places, found: Found) -> Resampled:
    """The scores of all complete rows, of all trainings, over resamples of the test samples."""
    return {
        name: {seed: resampled_scores(places.test(seed, name), _COUNTED) for seed in seeds}
        for name, seeds in found.all_scores.items()
        if name in {*MERGES, *TRAINED}
    }


def compare(found: Found, drawn: Resampled, ours: str, theirs: str, seeds: Sequence[int]) -> Difference | None:
    """One row against another, over those of the trainings that both have; None if there are none."""
    first, second = (found.all_scores.get(name, {}) for name in (ours, theirs))
    common = [seed for seed in seeds if seed in first and seed in second]
    if not common:
        return None
    by_task = [[first[seed][task] - second[seed][task] for seed in common] for task in _COUNTED]
    differences = [difference for own in by_task for difference in own]
    resamples = resampled_differences(*(torch.stack([drawn[own][seed] for seed in common]) for own in (ours, theirs)))
    return Difference(
        fmean(differences),
        *interval(resamples),
        by_training={seed: fmean(own[place] for own in by_task) for place, seed in enumerate(common)},
        better=sum(difference > 0 for difference in differences),
        count=len(differences),
        p=bootstrap_p_value(resamples),
        p_over_tasks=sign_flip_p_value([fmean(own) for own in by_task]),
    )


def width_of_control(places: Places, name: str, task: str, seeds: Sequence[int]) -> float:
    """Of how much higher a row scores on a task than with shuffled partners, half of the 95 % interval.

    From the variance over molecules, plus that over partners, less that over pairs, which both have in them (Cameron,
    Gelbach & Miller 2011, doi 10.1198/jbes.2010.07136). What is drawn by both sides at once has the latter three times,
    which is too wide an interval to tell of a difference that there is none.
    """
    folders = [places.test(seed, name) for seed in seeds]

    def variance(unit: Unit) -> float:
        true, shuffled = (
            torch.stack([resampled_scores(folder, [asked], unit)[0] for folder in folders]).mean(dim=0)
            for asked in (task, f"{task}_{SHUFFLED}")
        )
        return float((true - shuffled).var())

    molecules, others = variance("molecules"), variance("partners")
    # Of few samples the difference may come out too small, or below zero.
    return _Z_95 * math.sqrt(max(molecules, others, molecules + others - variance("pairs")))


def distinct_merges(found: Found) -> list[str]:
    """All merges, each once: validation data may have chosen the published settings for the row that has others too."""
    scores = found.choices.get(PUBLISHED)
    same = scores and max(scores, key=scores.__getitem__) == PUBLISHED_VARIANT
    return [name for name in MERGES if not (same and name == PUBLISHED)]


def compare_with_all(found: Found, drawn: Resampled, ours: str) -> dict[str, Difference]:
    """A row against every other merge, over the trainings that rank them, and against what was trained further."""
    ranked, every = (list(scores.get(ours, {})) for scores in (found.scores, found.all_scores))
    others = [name for name in (*distinct_merges(found), *TRAINED) if name != ours]
    pairs = {name: compare(found, drawn, ours, name, every if name in TRAINED else ranked) for name in others}
    return {name: own for name, own in pairs.items() if own}
