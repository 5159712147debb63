"""What the study says in a few lines, from the same results as its tables."""

from statistics import fmean

from benchmarks.testbed.study.comparisons import Difference, Resampled, compare, compare_with_all
from benchmarks.testbed.study.jobs import AS_PUBLISHED
from benchmarks.testbed.study.results import Found, best_on_validation, overall, preservation, specialists_of
from benchmarks.testbed.study.rows import MATCHING, ROWS
from benchmarks.testbed.study.scoring import DEVELOPED_ON
from benchmarks.testbed.study.specialists import SEEDS
from benchmarks.testbed.study.statistics import holm
from benchmarks.testbed.study.table_rows import MERGES, TITLES

PLAIN_AVERAGE = "uniform"
_KNOWING = [row.name for row in ROWS if row.own_prompts]


def conclusion(found: Found, drawn: Resampled) -> str:
    """As a list: how the embedding matching that validation data chose does, against whom, and the paper's procedure.

    Test data chooses only whom it is compared with, which is against it.
    """
    ours = best_on_validation(found, MATCHING)
    trainings = {name: tuple(found.scores.get(name, {})) for name in MERGES}
    if ours is None or len(set(trainings.values())) > 1 or not trainings[ours]:
        return "There are too few results to say."
    means = {name: fmean(map(overall, found.scores[name].values())) for name in MERGES}
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

    knows = " (which knows the questions of the tasks)" if ours in _KNOWING else ""
    others = ", ".join(f"{TITLES[name]} {means[name]:.3f}" for name in order if name in MATCHING and name != ours)
    plain = next(name for name in rivals if name not in _KNOWING)
    knowing = next(name for name in rivals if name in _KNOWING)
    lines = [
        f"**{TITLES[ours]}**{knows}, the embedding matching that validation data chose, scores {means[ours]:.3f} on "
        f"the mean of all tasks, over {_trainings(len(trainings[ours]))}: place {order.index(ours) + 1} of "
        f"{len(order)} merges. (The other ways to match: {others}.)",
        f"The best other merge is {against(plain)}.",
        f"With prompts of the tasks' own questions, the best other merge is {against(knowing)}.",
    ]
    untouched = [seed for seed in SEEDS if seed not in DEVELOPED_ON]
    strict = compare(found, drawn, ours, plain, untouched)
    if strict:
        numbers = " and ".join(map(str, untouched))
        lines.append(
            f"With the specialists of training {numbers} alone, whose results no development has seen (the test "
            f"questions are the same), against {TITLES[plain]}: {_told(strict)}."
        )
    lines += [
        f"On their own tasks it keeps {_kept(found, ours)} of what the specialists score; the aim was 95 %. "
        f"{TITLES[plain]} keeps {_kept(found, plain)}, {TITLES[knowing]} {_kept(found, knowing)}.",
        _published(found, drawn, means, order),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _published(found: Found, drawn: Resampled, means: dict[str, float], order: list[str]) -> str:
    difference = compare(found, drawn, AS_PUBLISHED, PLAIN_AVERAGE, SEEDS)
    assert difference is not None
    place = f"{order.index(AS_PUBLISHED) + 1} of {len(order)} merges"
    side = "below" if difference.mean < 0 else "above"
    return (
        f"{TITLES[AS_PUBLISHED]} comes to {means[AS_PUBLISHED]:.3f}, place {place}, {side} the "
        f"{TITLES[PLAIN_AVERAGE]}: {_told(difference)} (by training {difference.trainings})."
    )


def _kept(found: Found, name: str) -> str:
    known = [(own, s) for seed, own in found.scores[name].items() if (s := specialists_of(found, seed))]
    return f"{100 * fmean(preservation(own, s) for own, s in known):.1f} %" if known else "an unknown share"


def _told(difference: Difference) -> str:
    return f"{difference}, p = {difference.p:.3f}"


def _trainings(count: int) -> str:
    return "one training" if count == 1 else f"{count} trainings"
