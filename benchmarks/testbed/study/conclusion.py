"""What the study says in a few lines, from the same results as its tables."""

from statistics import fmean

from benchmarks.testbed.study.comparisons import Difference, Resampled, compare, compare_with_all
from benchmarks.testbed.study.jobs import AS_PUBLISHED
from benchmarks.testbed.study.results import Found, overall, preservation, specialists_of
from benchmarks.testbed.study.rows import MATCHING, REGMEAN_OWN_PROMPTS
from benchmarks.testbed.study.scoring import DEVELOPED_ON
from benchmarks.testbed.study.specialists import SEEDS
from benchmarks.testbed.study.statistics import holm
from benchmarks.testbed.study.table_rows import MERGES, TITLES

PLAIN_AVERAGE = "uniform"


def conclusion(found: Found, drawn: Resampled) -> str:
    """As a list: which merge is best, by how much, what it keeps, and where the paper's procedure stands."""
    means = {name: fmean(map(overall, found.scores[name].values())) for name in MERGES if name in found.scores}
    if not {AS_PUBLISHED, *MATCHING} <= means.keys():
        return "There are too few results to say."
    order = sorted(means, key=means.__getitem__, reverse=True)
    best = order[0]
    rival = next(name for name in order if name != best and name not in MATCHING)
    differences = compare_with_all(found, drawn, best)
    adjusted = dict(zip(differences, holm([own.p for own in differences.values()]), strict=True))

    def ahead_of(name: str) -> str:
        return f"{TITLES[name]}, {means[name]:.3f}: {_told(differences[name])}, Holm-adjusted {adjusted[name]:.3f}."

    seeds = len(found.scores[best])
    lines = [
        f"**{TITLES[best]}** is the best merge on the mean of all tasks: {means[best]:.3f}, over {_trainings(seeds)}.",
        f"The next best that is no embedding matching is {ahead_of(rival)}",
    ]
    if rival == REGMEAN_OWN_PROMPTS:
        other = next(name for name in order if name not in (best, rival, *MATCHING))
        lines.append(f"Of the others, which know no questions of the tasks, the best is {ahead_of(other)}")
    untouched = [seed for seed in SEEDS if seed not in DEVELOPED_ON]
    strict = compare(found, drawn, best, rival, untouched)
    if strict:
        numbers = " and ".join(map(str, untouched))
        lines.append(f"On the training on which nothing was developed or chosen ({numbers}) alone: {_told(strict)}.")
    lines += [
        f"On its own tasks it keeps {100 * _kept(found, best):.1f} % of what the specialists score; the aim was 95 %. "
        f"{TITLES[rival]} keeps {100 * _kept(found, rival):.1f} %.",
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
        f"{TITLES[PLAIN_AVERAGE]} ({_told(difference)}), over {_trainings(len(found.scores[AS_PUBLISHED]))}."
    )


def _kept(found: Found, name: str) -> float:
    known = [(own, s) for seed, own in found.scores[name].items() if (s := specialists_of(found, seed))]
    return fmean(preservation(own, specialists) for own, specialists in known)


def _told(difference: Difference) -> str:
    return f"{difference}, p = {difference.p:.3f}"


def _trainings(count: int) -> str:
    return "one training" if count == 1 else f"{count} trainings"
