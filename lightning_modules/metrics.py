"""How good predictions are: torchmetrics for the values, a seeded bootstrap for how far they can be trusted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.functional.classification.auroc import binary_auroc

# Metrics of what was predicted, over the answers that could be read; and of the choices' likelihoods.
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
        log_odds: of each choice against all others, float64 [n, K]; None if answers were generated.
    """

    answers: Tensor
    predictions: Tensor
    choices: int
    log_odds: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> "Outcomes":
        index = torch.tensor(rows, dtype=torch.long)
        odds = None if self.log_odds is None else self.log_odds[index]
        return Outcomes(self.answers[index], self.predictions[index], self.choices, odds)

    def metrics(self, wanted: Sequence[str]) -> list[str]:
        """Those of the `wanted` metrics that these outcomes have."""
        return [name for name in wanted if name not in OF_LIKELIHOODS or self.log_odds is not None]


@dataclass(frozen=True)
class Score:
    """A metric's value with its confidence interval; NaN where it is not defined, as with one kind of answer only."""

    value: float
    low: float
    high: float


def log_odds(scores: Tensor) -> Tensor:
    """The log-odds log p_k - log(sum of the others' p) of log-likelihoods [n, K], in float64.

    They order samples as the probabilities do, without saturating.
    """
    scores = scores.double()
    own = torch.eye(scores.shape[1], dtype=torch.bool)
    others = scores[:, None, :].expand(-1, len(own), -1).masked_fill(own, -torch.inf).logsumexp(dim=2)
    return scores - others


def values(outcomes: Outcomes, wanted: Sequence[str]) -> dict[str, float]:
    """The metrics, by torchmetrics.

    Accuracy, macro-F1 (over the choices that occur among answers or predictions) and Matthews' correlation (0 if all
    answers or all predictions are the same) are over the samples whose answer could be read. Area under the ROC curve
    and average precision are those of the first choice if there are two, else the mean over the choices that are the
    answer to some samples and not to all.
    """
    readable = outcomes.predictions != UNREADABLE
    predictions, answers, choices = outcomes.predictions[readable], outcomes.answers[readable], outcomes.choices
    found = {"invalid_rate": 1 - readable.double().mean().item()}
    found["total_accuracy"] = (outcomes.predictions == outcomes.answers).double().mean().item()
    if len(predictions):
        found["accuracy"] = multiclass_accuracy(predictions, answers, choices, average="micro").item()
        found["macro_f1"] = multiclass_f1_score(predictions, answers, choices, average="macro").item()
        vary = len(predictions.unique()) > 1 and len(answers.unique()) > 1
        # 0 is the convention where it is not defined; torchmetrics gives another number if there are two choices.
        found["mcc"] = multiclass_matthews_corrcoef(predictions, answers, choices).item() if vary else 0.0
    if outcomes.log_odds is not None:
        found |= _ranking_values(_ranks(outcomes.log_odds), outcomes.answers)
    # To the digits that torchmetrics' float32 has.
    return {name: round(found.get(name, math.nan), 7) for name in outcomes.metrics(wanted)}


def _ranking_values(ranks: Tensor, answers: Tensor) -> dict[str, float]:
    # Within 0 and 1, where torchmetrics takes them for probabilities; only their order matters.
    ranks = ranks.double() / max(1, len(ranks))
    if not (counted := _counted(answers, ranks.shape[1])):
        return {}
    if ranks.shape[1] == 2:
        positive = (answers == 0).long()
        return {
            "auroc": binary_auroc(ranks[:, 0], positive).item(),
            "average_precision": binary_average_precision(ranks[:, 0], positive).item(),
        }
    kinds = {"auroc": multiclass_auroc, "average_precision": multiclass_average_precision}
    # Of ranks that are no distribution: each choice against the rest is all that is asked for.
    return {
        name: kind(ranks, answers, ranks.shape[1], average="none")[counted].double().mean().item()
        for name, kind in kinds.items()
    }


def _ranks(odds: Tensor) -> Tensor:
    """Each choice's samples in order, equal ones with equal ranks [n, K]."""
    columns = [odds[:, choice].unique(return_inverse=True)[1] for choice in range(odds.shape[1])]
    return torch.stack(columns, dim=1)


def _counted(answers: Tensor, choices: int) -> list[int]:
    """The choices whose ranking can be judged."""
    counts = answers.bincount(minlength=choices).tolist()
    judged = [choice for choice, count in enumerate(counts) if 0 < count < len(answers)]
    return judged[:1] if choices == 2 else judged


def resample_weights(samples: int, seed: int, resamples: int = RESAMPLES) -> Iterator[Tensor]:
    """How often each sample is drawn in each resample, float64 [some resamples, samples]; all of them in chunks."""
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, min(resamples, _CHUNK_ELEMENTS // samples))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = torch.randint(samples, (rows, samples), generator=generator)
        counts = torch.zeros(rows, samples, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(counts))


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
    # Matthews' correlation for any number of choices (Gorodkin 2004).
    covariance = right * count - (answered * predicted).sum(dim=1)
    spreads = (count**2 - (answered**2).sum(dim=1)) * (count**2 - (predicted**2).sum(dim=1))
    return {
        "accuracy": right / count,
        "macro_f1": f1.sum(dim=1) / occurs.sum(dim=1),
        "mcc": torch.where(spreads > 0, covariance / spreads.sqrt(), torch.where(count > 0, 0.0, torch.nan)),
    }


def _weighted_ranking(odds: Tensor, answers: Tensor, weights: Tensor) -> dict[str, Tensor]:
    areas, precisions = [], []
    for choice in [0] if odds.shape[1] == 2 else range(odds.shape[1]):
        _, group = odds[:, choice].unique(return_inverse=True)
        positive = answers == choice
        groups = int(group.max()) + 1
        hits = weights.new_zeros(len(weights), groups).index_add_(1, group[positive], weights[:, positive])
        misses = weights.new_zeros(len(weights), groups).index_add_(1, group[~positive], weights[:, ~positive])
        positives, negatives = hits.sum(dim=1), misses.sum(dim=1)
        below = misses.cumsum(dim=1) - misses / 2
        judged = (positives > 0) & (negatives > 0)
        area = (hits * below).sum(dim=1) / (positives * negatives)
        found = hits.flip(1).cumsum(dim=1).flip(1)
        precision = found / (found + misses.flip(1).cumsum(dim=1).flip(1)).clamp_min(1)
        average = (hits * precision).sum(dim=1) / positives
        areas.append(torch.where(judged, area, torch.nan))
        precisions.append(torch.where(judged, average, torch.nan))
    return {
        "auroc": torch.stack(areas).nanmean(dim=0),
        "average_precision": torch.stack(precisions).nanmean(dim=0),
    }


def scores_with_intervals(outcomes: Outcomes, wanted: Sequence[str], seed: int) -> dict[str, Score]:
    """Each metric with its percentile bootstrap interval (Efron 1979; 95 %); the same seed gives the same bits."""
    found = values(outcomes, wanted)
    samples = len(outcomes.answers)
    drawn = [weighted_values(outcomes, wanted, weights) for weights in resample_weights(samples, seed)]
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
    before, after = values(first, names), values(second, names)
    drawn: dict[str, list[Tensor]] = {name: [] for name in names}
    for weights in resample_weights(len(first.answers), seed):
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
        other_side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
        p_value = min(1.0, 2 * (other_side + 1) / (len(differences) + 1))
        found[name] = Difference(after[name] - before[name], *interval(differences), p_value)
    return found
