"""The demo's results as a Markdown table and as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from benchmarks.testbed.evaluate import Score

# What each model scored on each task, models and tasks in the order of the table.
Results = Mapping[str, Mapping[str, Score]]


def results_table(results: Results) -> str:
    """Markdown: a row per model, a column per task with its metric and number of samples, and the mean."""
    first = next(iter(results.values()))
    tasks = [f"{task} ({score.metric}, n = {score.samples})" for task, score in first.items()]
    cells = [["model", *tasks, "mean"]]
    for model, scores in results.items():
        values = [score.value for score in scores.values()]
        cells.append([model, *(f"{value:.3f}" for value in [*values, mean(values)])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    header, *rows = [" | ".join(map(str.ljust, row, widths)) for row in cells]
    rule = " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {line} |" for line in [header, rule, *rows])


def write_results(results: Results, folder: Path) -> None:
    """Write `demo.md` and `demo.json`."""
    (folder / "demo.md").write_text(results_table(results) + "\n", encoding="utf-8")
    content = {model: {task: vars(score) for task, score in scores.items()} for model, scores in results.items()}
    (folder / "demo.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_results(folder: Path) -> dict[str, dict[str, Score]]:
    """What `write_results` wrote there."""
    content = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return {model: {task: Score(**score) for task, score in scores.items()} for model, scores in content.items()}
