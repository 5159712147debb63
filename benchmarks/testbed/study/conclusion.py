"""What the study says in a few lines, from the same results as its tables."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study.comparisons import Difference, Resampled, compare, compare_with_all, distinct_merges
from benchmarks.testbed.study.jobs import AS_PUBLISHED
from benchmarks.testbed.study.results import Found, best_on_validation, cross, overall, preservation, specialists_of
from benchmarks.testbed.study.rows import MATCHING, ROWS
from benchmarks.testbed.study.scoring import DEVELOPED_ON
from benchmarks.testbed.study.statistics import holm
from benchmarks.testbed.study.table_rows import MERGES, TITLES, TRAINED
from benchmarks.testbed.study.tasks import TASKS

PLAIN_AVERAGE = "uniform"
_LEVEL = 0.05
_KNOWING = [row.name for row in ROWS if row.own_prompts]


def conclusion(found: Found, drawn: Resampled) -> str:
    """As a list: how embedding matching does, against whom, and the paper's procedure.

    Of matching, it tells of what validation data chose, among the rows that were validated with the same specialists.
    Test data chooses only whom it is compared with, which is against it.
    """
    ours = best_on_validation(found, MATCHING)
    merges = distinct_merges(found)
    trainings = {name: tuple(found.scores.get(name, {})) for name in MERGES}
    if ours is None or len(set(trainings.values())) > 1 or not trainings[ours]:
        return "There are too few results to say."
    means = {name: fmean(map(overall, found.scores[name].values())) for name in merges}
    order = sorted(means, key=means.__getitem__, reverse=True)
    rivals = [name for name in order if name not in MATCHING]
    differences = compare_with_all(found, drawn, ours)
    adjusted = dict(zip(differences, holm([own.p for own in differences.values()]), strict=True))

    def against(name: str) -> str:
        own = differences[name]
        return (
            f"{TITLES[name]}, {means[name]:.3f}: {_told(own)}, Holm-adjusted {adjusted[name]:.3f} "
            f"(by training {own.trainings})"
        )

    others = ", ".join(f"{TITLES[name]} {means[name]:.3f}" for name in order if name in MATCHING and name != ours)
    plain = next(name for name in rivals if name not in _KNOWING)
    knowing = next(name for name in rivals if name in _KNOWING)
    lines = [
        f"**{TITLES[ours]}**, the embedding matching that validation data chose, scores {means[ours]:.3f} on "
        f"the mean of all tasks, over {_trainings(len(trainings[ours]))}: place {order.index(ours) + 1} of "
        f"{len(order)} merges. (The other ways to match: {others}.)",
        f"Of other merges that know none of the tasks' questions, the best is {against(plain)}.",
        f"Of those that know them, the best is {against(knowing)}.",
    ]
    short = [name for name in rivals if differences[name].mean <= 0 or differences[name].p >= _LEVEL]
    strictly = sum(differences[name].mean > 0 and adjusted[name] < _LEVEL for name in rivals)
    missed = f", but not above {' and '.join(TITLES[name] for name in short)}" if short else ""
    lines.append(
        f"The aim was to be above every merge that is no embedding matching with p < {_LEVEL}: it is above "
        f"{len(rivals) - len(short)} of {len(rivals)}{missed} (Holm-adjusted: above {strictly})."
    )
    if learnt := [f"{TITLES[name]} {_told_of_each(differences[name])}" for name in TRAINED if name in differences]:
        lines.append(f"Against what learns all tasks from labels: {'; '.join(learnt)}.")
    untouched = [seed for seed in trainings[ours] if seed not in DEVELOPED_ON]
    strict = compare(found, drawn, ours, plain, untouched)
    if strict:
        numbers = " and ".join(map(str, untouched))
        lines.append(
            f"With the specialists of training {numbers} alone, whose results no development has seen (the test "
            f"questions are the same), against {TITLES[plain]}: {_told(strict)}."
        )
    lines += [
        f"By task, against {TITLES[plain]}: {_by_task(found, ours, plain)}. Against the {TITLES[PLAIN_AVERAGE]}: "
        f"{_by_task(found, ours, PLAIN_AVERAGE)}.",
        _of_pairs(found, [ours, plain, knowing, PLAIN_AVERAGE]),
        f"On their own tasks it keeps {_kept(found, ours)} of what the specialists score; the aim was 95 %. "
        f"{TITLES[plain]} keeps {_kept(found, plain)}, {TITLES[knowing]} {_kept(found, knowing)}. Of what that exceeds "
        f"chance by, they keep {', '.join(_kept(found, name, True) for name in (ours, plain, knowing))}.",
        _published(found, drawn, means, order),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _published(found: Found, drawn: Resampled, means: dict[str, float], order: list[str]) -> str:
    difference = compare(found, drawn, AS_PUBLISHED, PLAIN_AVERAGE, list(found.scores[AS_PUBLISHED]))
    assert difference is not None
    place = f"{order.index(AS_PUBLISHED) + 1} of {len(order)} merges"
    side = (
        "not told apart from" if difference.low <= 0 <= difference.high else "below" if difference.mean < 0 else "above"
    )
    return (
        f"{TITLES[AS_PUBLISHED]} comes to {means[AS_PUBLISHED]:.3f}, place {place}, {side} the "
        f"{TITLES[PLAIN_AVERAGE]}: {_told_of_each(difference)}."
    )


def _by_task(found: Found, ours: str, theirs: str) -> str:
    """How much higher one row scores on each task, over the trainings."""
    first, second = found.scores[ours], found.scores[theirs]
    return ", ".join(
        f"{task.title} {fmean(first[seed][task.name] - second[seed][task.name] for seed in first):+.3f}"
        for task in TASKS
        if task.counts
    )


def _of_pairs(found: Found, names: Sequence[str]) -> str:
    """The mean scores of rows on tasks about two modalities, beside that of the best specialist."""
    means = {name: fmean(map(cross, found.scores[name].values())) for name in dict.fromkeys(names)}
    alone = {name: fmean(map(cross, found.scores[name].values())) for name in MODALITIES if name in found.scores}
    told = [f"{TITLES[name]} {mean:.3f}" for name, mean in means.items()]
    if alone:
        best = max(alone, key=alone.__getitem__)
        told.append(f"the {TITLES[best]} alone {alone[best]:.3f}")
    return f"On tasks about two modalities: {', '.join(told)}."


def _kept(found: Found, name: str, above_chance: bool = False) -> str:
    known = [(own, s) for seed, own in found.scores[name].items() if (s := specialists_of(found, seed))]
    kept = [preservation(own, s, above_chance) for own, s in known]
    return f"{100 * fmean(kept):.1f} %" if kept else "an unknown share"


def _told(difference: Difference) -> str:
    return f"{difference}, p = {difference.p:.3f}"


def _told_of_each(difference: Difference) -> str:
    return f"{_told(difference)} (by training {difference.trainings})"


def _trainings(count: int) -> str:
    return "one training" if count == 1 else f"{count} trainings"
