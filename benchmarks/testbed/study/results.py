"""What the study found, gathered from the result files that `esmerge evaluate` wrote."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.results_table import TaskScore, first_scores
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import CHOOSING_SEED, row
from benchmarks.testbed.study.scoring import CHOICE_FILE, MERGE_FILE
from benchmarks.testbed.study.specialists import TRAININGS
from benchmarks.testbed.study.tasks import CROSS, OWN, SHUFFLED, TASKS
from esmerge.sources import read_json
from lightning_modules.evaluation_results import read_results, results_file

T = TypeVar("T")
# Scores by task of one model.
Scores = dict[str, float]


@dataclass(frozen=True)
class Found:
    """All results.

    Attributes:
        scores: row -> seed -> task -> score on test data; of complete rows only, and of trainings that they share.
        controls: row -> seed -> task -> score with shuffled partners.
        choices: row or variation -> setting -> mean score on validation data.
        gaps: row or variation -> setting -> gap between merged embeddings and the specialists'.
        probe_sizes: row -> samples -> mean score on validation data.
        seconds: row -> seed -> how long merging took.
        all_scores: the same as `scores`, of all trainings.
    """

    scores: dict[str, dict[int, Scores]]
    controls: dict[str, dict[int, Scores]]
    choices: dict[str, dict[str, float]]
    gaps: dict[str, dict[str, float]]
    probe_sizes: dict[str, dict[int, float]]
    seconds: dict[str, dict[int, float]]
    all_scores: dict[str, dict[int, Scores]]


def gather(places: Places, rows: Sequence[str], variations: Sequence[str], probe_sizes: Sequence[int]) -> Found:
    """What is there so far of rows, of variations that have validation scores alone, and of sizes of the probe."""
    scores: dict[str, dict[int, Scores]] = {}
    controls: dict[str, dict[int, Scores]] = {}
    seconds: dict[str, dict[int, float]] = {}
    for name in rows:
        for seed in TRAININGS:
            folder = places.test(seed, name)
            own = _scores(folder, [task.name for task in TASKS])
            if len(own) == len(TASKS):
                scores.setdefault(name, {})[seed] = own
                shuffled = _scores(folder, [f"{task.name}_{SHUFFLED}" for task in TASKS if task.control])
                if len(shuffled) == sum(task.control for task in TASKS):
                    controls.setdefault(name, {})[seed] = shuffled
                if (folder / MERGE_FILE).exists():
                    seconds.setdefault(name, {})[seed] = read_json(folder / MERGE_FILE)["seconds"]
    files = {name: places.validation(name) / CHOICE_FILE for name in (*rows, *variations)}
    chosen = {name: read_json(file) for name, file in files.items() if file.exists()}
    choices, gaps = ({name: own[field] for name, own in chosen.items()} for field in ("scores", "gaps"))
    sizes = {
        name: {
            samples: fmean(read_json(file)["scores"].values())
            for samples in probe_sizes
            if (file := places.probe_size(name, samples) / CHOICE_FILE).exists()
        }
        for name in rows
    }
    sizes = {name: own for name, own in sizes.items() if own}
    return Found(scores, controls, choices, gaps, sizes, seconds, scores)


def over_shared_trainings(found: Found, merges: Collection[str]) -> Found:
    """Only the trainings that all merges have results of, where a row has all of these, so that rows can be ranked.

    As it is where there is no such training.
    """
    every = [set(found.scores.get(name, {})) for name in merges]
    shared = set.intersection(*every) if every else set()

    scores = {
        name: {seed: own for seed, own in seeds.items() if seed in shared} if shared and shared <= set(seeds) else seeds
        for name, seeds in found.scores.items()
    }

    def of_these(rows: dict[str, dict[int, T]]) -> dict[str, dict[int, T]]:
        kept = {
            name: {seed: own for seed, own in seeds.items() if seed in scores.get(name, {})}
            for name, seeds in rows.items()
        }
        return {name: own for name, own in kept.items() if own}

    return replace(found, scores=scores, controls=of_these(found.controls), seconds=of_these(found.seconds))


def best_on_validation(found: Found, rows: Iterable[str]) -> str | None:
    """Of some rows, the one with the setting that is best on validation data; None if one of them has none yet.

    Those that were validated with other specialists than most cannot be compared, and are left out.
    """
    comparable = [name for name in rows if row(name).chosen_on == CHOOSING_SEED]
    best = {name: max(found.choices[name].values()) if name in found.choices else None for name in comparable}
    known = {name: score for name, score in best.items() if score is not None}
    return max(known, key=known.__getitem__) if known and len(known) == len(best) else None


def _scores(folder: Path, tasks: Sequence[str]) -> Scores:
    results = {task: read_results(file) for task in tasks if (file := results_file(folder, task)).exists()}
    found: dict[str, TaskScore] = first_scores(results)
    return {task: score.value for task, score in found.items()}


def specialists_of(found: Found, seed: int) -> dict[str, Scores]:
    """The scores of a seed's specialists; empty if one is missing."""
    own = {name: found.all_scores.get(name, {}).get(seed) for name in MODALITIES}
    return {name: scores for name, scores in own.items() if scores} if all(own.values()) else {}


def preservation(scores: Scores, specialists: dict[str, Scores], above_chance: bool = False) -> float:
    """The mean over single-modality tasks of the score relative to that of the task's specialist.

    Args:
        above_chance: of both scores count only what exceeds that of answers drawn at random.
    """
    kept = []
    for task in OWN:
        chance = task.chance if above_chance else 0.0
        reference = specialists[str(task.specialist)][task.name] - chance
        kept.append((scores[task.name] - chance) / reference if reference else math.nan)
    return fmean(kept)


def cross(scores: Scores) -> float:
    """The mean score on tasks about two modalities."""
    return fmean(scores[task.name] for task in CROSS)


def overall(scores: Scores) -> float:
    """The mean score on all tasks that count."""
    return fmean(scores[task.name] for task in TASKS if task.counts)
