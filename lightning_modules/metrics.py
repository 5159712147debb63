"""How good predictions are: torchmetrics for the values, a seeded bootstrap for how far they can be trusted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_accuracy,
    multiclass_f1_score,
)

# Metrics of what was predicted, over the answers that could be read; and of the likelihoods of two choices.
OF_PREDICTIONS = ("accuracy", "macro_f1", "mcc")
OF_LIKELIHOODS = ("auroc", "average_precision")
# Over all samples: an answer that cannot be read is wrong.
OF_ALL = ("total_accuracy", "invalid_rate")
METRICS = (*OF_PREDICTIONS, *OF_LIKELIHOODS, *OF_ALL)
UNREADABLE = -1

RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Outcomes:
    """What came out for n samples of a task with K choices.

    Attributes:
        answers: the right choices, int64 [n].
        predictions: int64 [n]; `UNREADABLE` where a generated text holds no answer.
        choices: K. The first choice is the positive one of a question with two.
        log_odds: of the first of two choices against the second, float64 [n]; None for more choices, and if answers
            were generated.
        groups: of relatives, int64 [n]; None where each sample stands for itself.
    """

    answers: Tensor
    predictions: Tensor
    choices: int
    log_odds: Tensor | None = None
    groups: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> "Outcomes":
        index = torch.tensor(rows, dtype=torch.long)
        odds, groups = (None if of is None else of[index] for of in (self.log_odds, self.groups))
        return Outcomes(self.answers[index], self.predictions[index], self.choices, odds, groups)

    def metrics(self, wanted: Sequence[str]) -> list[str]:
        """Those of the `wanted` metrics that these outcomes have."""
        return [name for name in wanted if name not in OF_LIKELIHOODS or self.log_odds is not None]


@dataclass(frozen=True)
class Score:
    """A metric's value with its confidence interval; NaN where it is not defined, as with one kind of answer only."""

    value: float
    low: float
    high: float


def values(outcomes: Outcomes, wanted: Sequence[str]) -> dict[str, float]:
    """The metrics, by torchmetrics.

    Accuracy, macro-F1 (over the choices that occur among answers or predictions) and Matthews' correlation (0 where
    all answers or all predictions are one choice) are over the samples whose answer could be read. Area under the ROC
    curve and average precision are those of the first of two choices.
    """
    readable = outcomes.predictions != UNREADABLE
    predictions, answers, choices = outcomes.predictions[readable], outcomes.answers[readable], outcomes.choices
    found = {"invalid_rate": 1 - readable.double().mean().item()}
    found["total_accuracy"] = (outcomes.predictions == outcomes.answers).double().mean().item()
    if len(predictions):
        found["accuracy"] = multiclass_accuracy(predictions, answers, choices, average="micro").item()
        found["macro_f1"] = multiclass_f1_score(predictions, answers, choices, average="macro").item()
        # Of a single predicted choice torchmetrics gives something other than 0, so that values and resamples differ.
        confusion = _confusion(outcomes, readable, torch.ones(1, len(outcomes.answers), dtype=torch.float64))
        found["mcc"] = _matthews_correlation(confusion).item()
    positive = (outcomes.answers == 0).long()
    if outcomes.log_odds is not None and 0 < positive.sum() < len(positive):
        # Ranks lie within 0 and 1, where torchmetrics takes them for probabilities; only their order matters.
        ranks = outcomes.log_odds.unique(return_inverse=True)[1].double() / len(positive)
        found["auroc"] = binary_auroc(ranks, positive).item()
        found["average_precision"] = binary_average_precision(ranks, positive).item()
    # To the digits that torchmetrics' float32 has.
    return {name: round(found.get(name, math.nan), 7) for name in outcomes.metrics(wanted)}


def resample_weights(outcomes: Outcomes, seed: int, resamples: int = RESAMPLES) -> Iterator[Tensor]:
    """How often each sample is drawn in each resample, float64 [some resamples, n]; all of them in chunks.

    Groups are drawn as a whole, as many as there are (the cluster bootstrap; Davison & Hinkley 1997, section 3.8): what
    is asked about relatives is right or wrong together, so they tell less than as many independent samples.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = len(outcomes.answers)
    groups = torch.arange(samples) if outcomes.groups is None else outcomes.groups.unique(return_inverse=True)[1]
    units = int(groups.max()) + 1
    chunk = max(1, min(resamples, _CHUNK_ELEMENTS // samples))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = torch.randint(units, (rows, units), generator=generator)
        counts = torch.zeros(rows, units, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(counts))[:, groups]


def weighted_values(outcomes: Outcomes, wanted: Sequence[str], weights: Tensor) -> dict[str, Tensor]:
    """The same metrics as `values` with samples counted as often as `weights` [R, n] say; float64 [R] each."""
    found = {}
    readable = outcomes.predictions != UNREADABLE
    right = outcomes.predictions == outcomes.answers
    total = weights.sum(dim=1)
    found["invalid_rate"] = 1 - weights[:, readable].sum(dim=1) / total
    found["total_accuracy"] = weights[:, right].sum(dim=1) / total
    found |= _from_confusion(_confusion(outcomes, readable, weights))
    names = outcomes.metrics(wanted)
    if outcomes.log_odds is not None and any(name in OF_LIKELIHOODS for name in names):
        found |= _weighted_ranking(outcomes.log_odds, outcomes.answers, weights)
    return {name: found[name] for name in names}


def _confusion(outcomes: Outcomes, readable: Tensor, weights: Tensor) -> Tensor:
    """[R, answers, predictions] over the samples whose answer could be read."""
    choices = outcomes.choices
    cells = (outcomes.answers * choices + outcomes.predictions)[readable]
    flat = weights.new_zeros(len(weights), choices * choices).index_add_(1, cells, weights[:, readable])
    return flat.view(-1, choices, choices)


def _from_confusion(confusion: Tensor) -> dict[str, Tensor]:
    hits = confusion.diagonal(dim1=1, dim2=2)
    answered, predicted = confusion.sum(dim=2), confusion.sum(dim=1)
    count, right = confusion.sum(dim=(1, 2)), hits.sum(dim=1)
    occurs = answered + predicted > 0
    f1 = torch.where(occurs, 2 * hits / (answered + predicted), 0)
    return {
        "accuracy": right / count,
        "macro_f1": f1.sum(dim=1) / occurs.sum(dim=1),
        "mcc": _matthews_correlation(confusion),
    }


def _matthews_correlation(confusion: Tensor) -> Tensor:
    """For any number of choices (Gorodkin 2004), [R]; 0 where answers or predictions do not vary, as is usual."""
    answered, predicted = confusion.sum(dim=2), confusion.sum(dim=1)
    count, right = confusion.sum(dim=(1, 2)), confusion.diagonal(dim1=1, dim2=2).sum(dim=1)
    covariance = right * count - (answered * predicted).sum(dim=1)
    spreads = (count**2 - (answered**2).sum(dim=1)) * (count**2 - (predicted**2).sum(dim=1))
    return torch.where(spreads > 0, covariance / spreads.sqrt(), torch.where(count > 0, 0.0, torch.nan))


def _weighted_ranking(odds: Tensor, answers: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The area under the ROC curve by the Mann-Whitney statistic, ties counted half; average precision."""
    distinct, place = odds.unique(return_inverse=True)
    positive = answers == 0
    hits = weights.new_zeros(len(weights), len(distinct)).index_add_(1, place[positive], weights[:, positive])
    misses = weights.new_zeros(len(weights), len(distinct)).index_add_(1, place[~positive], weights[:, ~positive])
    positives, negatives = hits.sum(dim=1), misses.sum(dim=1)
    below = misses.cumsum(dim=1) - misses / 2
    found = hits.flip(1).cumsum(dim=1).flip(1)
    precision = found / (found + misses.flip(1).cumsum(dim=1).flip(1)).clamp_min(1)
    judged = (positives > 0) & (negatives > 0)
    return {
        "auroc": torch.where(judged, (hits * below).sum(dim=1) / (positives * negatives), torch.nan),
        "average_precision": torch.where(judged, (hits * precision).sum(dim=1) / positives, torch.nan),
    }


def scores_with_intervals(outcomes: Outcomes, wanted: Sequence[str], seed: int) -> dict[str, Score]:
    """Each metric with its percentile bootstrap interval (Efron 1979; 95 %); the same seed gives the same bits."""
    found = values(outcomes, wanted)
    drawn = [weighted_values(outcomes, wanted, weights) for weights in resample_weights(outcomes, seed)]
    return {name: Score(value, *interval(torch.cat([d[name] for d in drawn]))) for name, value in found.items()}


def interval(resampled: Tensor) -> tuple[float, float]:
    """The middle 95 % of a metric's values over resamples; those in which it is not defined are left out."""
    tail = (1 - CONFIDENCE) / 2
    # Of at most a few thousand values, well below the limit of torch's quantile.
    low, high = resampled.nanquantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    return low, high


@dataclass(frozen=True)
class Difference:
    """How much better the second of two models is by a metric.

    Attributes:
        low, high: its confidence interval.
        p_value: two-sided: how readily resamples of the same samples for both put the difference on the other side.
    """

    value: float
    low: float
    high: float
    p_value: float


def paired_differences(first: Outcomes, second: Outcomes, wanted: Sequence[str], seed: int) -> dict[str, Difference]:
    """The paired bootstrap (Koehn 2004): both models' outcomes, on the same samples in the same order, are resampled
    together.
    """
    if not torch.equal(first.answers, second.answers):
        raise ValueError("the outcomes are of different samples")
    names = [name for name in first.metrics(wanted) if name in second.metrics(wanted)]
    if not len(first.answers):
        return dict.fromkeys(names, Difference(math.nan, math.nan, math.nan, math.nan))
    before, after = values(first, names), values(second, names)
    drawn: dict[str, list[Tensor]] = {name: [] for name in names}
    for weights in resample_weights(first, seed):
        ours, theirs = (weighted_values(outcomes, names, weights) for outcomes in (second, first))
        for name in names:
            drawn[name].append(ours[name] - theirs[name])
    found = {}
    for name in names:
        differences = torch.cat(drawn[name])
        differences = differences[~differences.isnan()]
        if not len(differences):
            found[name] = Difference(math.nan, math.nan, math.nan, math.nan)
            continue
        found[name] = Difference(after[name] - before[name], *interval(differences), bootstrap_p_value(differences))
    return found


def bootstrap_p_value(differences: Tensor) -> float:
    """Two-sided p-value from resampled differences [R]: how readily they fall on the other side of zero.

    It is at least 2 / (R + 1).
    """
    other_side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (other_side + 1) / (len(differences) + 1))
