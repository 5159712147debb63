"""What `results/` says of a merged model, and how the Hub is told."""

from collections.abc import Sequence
from typing import Annotated, Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from esmerge.errors import InputError
from esmerge.records import is_recorded_base, model_hashes
from esmerge.sources import read_json
from esmerge.yaml_files import first_error
from hub_cards.merged_model import MergedModel
from hub_cards.portable import portable_recipe

RESULTS_FOLDER = "results"
EVAL_RESULTS_FOLDER = ".eval_results"
EVAL_RESULTS_MARK = "# Written by esmerge card.\n"

# Name in results -> the Hub's identifier of the metric (https://hf.co/metrics) and its name for people.
_METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "total_accuracy": ("accuracy", "accuracy, unreadable answers counted as wrong"),
    "macro_f1": ("f1", "macro F1"),
    "mcc": ("matthews_correlation", "Matthews' correlation"),
    "auroc": ("roc_auc", "area under the ROC curve"),
    "average_precision": ("average_precision", "average precision"),
    "invalid_rate": ("invalid_rate", "share of unreadable answers"),
}


class _Read(BaseModel):
    # Results hold more than cards tell, and later versions may hold more still.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Baseline(_Read):
    """A published result on the same task."""

    model: str
    metric: str
    value: float
    source: str = ""


class TaskInfo(_Read):
    """The task as results describe it."""

    name: str
    version: int = 1
    title: str | None = None
    dataset: str | None = None
    benchmark: str | None = None
    licence: str | None = None
    citation: str | None = None
    metrics: tuple[str, ...] = ()
    baselines: tuple[Baseline, ...] = ()


class Score(_Read):
    """A value with its 95 % confidence interval; None where it is not defined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval for people; empty if there is none."""
        return "" if self.low is None or self.high is None else f"{self.low:.3f} to {self.high:.3f}"


class Settings(_Read):
    """How the model was evaluated."""

    score: str = "likelihood"
    normalise: str = "none"
    limit: int | None = None


class _Model(_Read):
    hash: str | None = None
    weights: str | None = None
    commit: str | None = None
    base: "_Model | None" = None


class TaskResults(_Read):
    """results/<task>.json."""

    task: TaskInfo
    samples: Annotated[int, Field(ge=1)]
    scores: Annotated[dict[str, Score], Field(min_length=1)]
    settings: Settings = Settings()
    model: Annotated[_Model, BeforeValidator(lambda value: value or {})] = _Model()
    items: dict[str, str] = {}
    esmerge: dict[str, Any] | None = None

    @field_validator("scores")
    @classmethod
    def _named(cls, scores: dict[str, Score]) -> dict[str, Score]:
        for name, score in scores.items():
            for value in (score.low, score.value, score.high):
                if value is not None and not -1 <= value <= 1:
                    raise ValueError(f"{name} is {value}, expected a number from -1 to 1")
        return scores

    @property
    def title(self) -> str:
        """The task's name for people."""
        return self.task.title or self.task.name

    @property
    def main_metric(self) -> str:
        """The one that a task with a single number is known by."""
        return next((name for name in self.task.metrics if name in self.scores), next(iter(self.scores)))

    def metric_name(self, metric: str) -> str:
        """A metric's name for people."""
        return _METRICS.get(metric, ("", metric))[1]

    def baselines(self, metric: str) -> list[Baseline]:
        """The published results in a metric."""
        return [baseline for baseline in self.task.baselines if baseline.metric == metric]


def read_results(model: MergedModel) -> list[TaskResults]:
    """All results in a model's folder, by file name.

    Raises:
        InputError: if a file is no result, or is of another merge, other weights or another base.
    """
    found: list[TaskResults] = []
    recipe = portable_recipe(model.recipe)
    files = sorted((model.folder / RESULTS_FOLDER).glob("*.json"))
    weights = model_hashes(model.folder)[1] if files else None
    for file in files:
        try:
            results = TaskResults.model_validate(read_json(file))
        except ValidationError as error:
            sentence = first_error(error, TaskResults)
            raise InputError(f"{file}: {sentence} Evaluate the model again, or move the file away.") from error
        if results.esmerge is not None and portable_recipe(results.esmerge) != recipe:
            raise InputError(f"{file} is of another merge: evaluate this model, or move the file away.")
        if results.model.weights not in (None, weights):
            raise InputError(
                f"{file} is of other weights than {model.folder} holds: evaluate this model again, or move the file "
                "away."
            )
        base = None if results.model.base is None else results.model.base.model_dump()
        if base is not None and not is_recorded_base(base, model.record["inputs"]["base"]):
            raise InputError(
                f"{file} is of this adapter on another base than it was merged for: evaluate it again without --base, "
                "or move the file away."
            )
        found.append(results)
    return found


def eval_results(results: Sequence[TaskResults]) -> list[EvalResult]:
    """The scores as a card's model-index has them; what is not defined is left out."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name=one.title,
            dataset_type=one.task.dataset or one.task.name,
            dataset_name=one.title,
            dataset_config=one.task.name,  # two tasks may share a data set
            dataset_args={"version": one.task.version, "samples": one.samples, **_limit(one)},
            metric_type=_METRICS.get(metric, (metric, ""))[0],
            metric_name=one.metric_name(metric),
            metric_value=score.value,
            metric_args={"confidence_level": 0.95, "low": score.low, "high": score.high},
        )
        for one in results
        for metric, score in one.scores.items()
        if score.value is not None
    ]


def _limit(results: TaskResults) -> dict[str, int]:
    return {"limit": results.settings.limit} if results.settings.limit else {}


def eval_results_files(results: Sequence[TaskResults]) -> dict[str, str]:
    """Files in `.eval_results/` by path, for the tasks that belong to a benchmark on the Hub.

    A score on some of the samples is no score of the benchmark.
    """
    files = {}
    for one in results:
        score = one.scores[one.main_metric]
        if one.task.benchmark is None or one.settings.limit or score.value is None:
            continue
        interval = f", 95% confidence interval {score.interval}" if score.interval else ""
        entry = EvalResultEntry(
            dataset_id=one.task.benchmark,
            task_id=one.task.name,
            value=score.value,
            notes=f"{one.metric_name(one.main_metric)} over {one.samples} samples{interval}; esmerge evaluate, "
            f"version {one.task.version} of the task",
        )
        text = yaml_dump(eval_result_entries_to_yaml([entry]))
        files[f"{EVAL_RESULTS_FOLDER}/{one.task.name}.yaml"] = EVAL_RESULTS_MARK + text
    return files
