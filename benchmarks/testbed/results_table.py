"""Scores of several models side by side, as a Markdown table."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """How well a model does at one task.

    Attributes:
        metric: the task's first, `auroc` or `accuracy`.
        value, low, high: with its 95 % confidence interval.
        samples: on how many held-out samples.
    """

    metric: str
    value: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def label(self) -> str:
        """The metric as tables call it."""
        return {"auroc": "AUROC"}.get(self.metric, self.metric)


# Models and tasks in the order of the table.
Scores = Mapping[str, Mapping[str, TaskScore]]


def first_scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskScore]:
    """The first metric of each task among the results of an evaluation."""
    found = {}
    for task, result in results.items():
        metric = next(iter(result["scores"]))
        found[task] = TaskScore(metric, **result["scores"][metric], samples=result["samples"])
    return found


def results_table(scores: Scores) -> str:
    """Markdown: a row per model, a column per task with its metric and number of samples, and the mean."""
    first = next(iter(scores.values()))
    tasks = [f"{task} ({score.label}, n = {score.samples})" for task, score in first.items()]
    rows = []
    for model, own in scores.items():
        rows.append([model, *map(str, own.values()), f"{mean(score.value for score in own.values()):.3f}"])
    return markdown_table(["model", *tasks, "mean"], rows)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
