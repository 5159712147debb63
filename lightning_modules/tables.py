"""Results for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_modules.comparison import TaskComparison


def print_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the scores of a model, a row for each metric of each task."""
    if not results:
        return
    title = next(iter(results.values()))["model"]["name"]
    table = Table(title=title, caption="intervals: 95 %, bootstrap")
    table.add_column("task")
    for name in ("metric", "score", "interval", "samples", "per second"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for task, found in results.items():
        table.add_section()
        described = [str(found["samples"]), f"{found['samples_per_second']:.3g}"]
        for metric, score in found["scores"].items():
            interval = f"{_number(score['low'])} to {_number(score['high'])}"
            table.add_row(task, metric, _number(score["value"]), interval, *described)
            # Of the task, not of a metric.
            task, described = "", ["", ""]
    Console().print(table)


def print_comparison(comparisons: Sequence[TaskComparison]) -> None:
    """Print models side by side, and how much better than the first each other is."""
    for found in comparisons:
        title = f"{found.task}: {found.samples} samples in common"
        if found.readable < found.samples:
            title += f", {found.readable} of them read from all models"
        table = Table(title=title, caption=f"differences from {found.models[0]}; p: paired bootstrap, two-sided")
        table.add_column("metric", no_wrap=True)
        for model in found.models:
            table.add_column(model, justify="right")
        for metric, values in found.values.items():
            cells = [_number(values[0])]
            for value, difference in zip(values[1:], found.differences[metric], strict=True):
                cells.append(
                    f"{_number(value)}  {_number(difference.value, '+')} "
                    f"[{_number(difference.low, '+')}, {_number(difference.high, '+')}]  p {difference.p_value:.2g}"
                )
            table.add_row(metric, *cells)
        Console().print(table)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or value != value else f"{value:{sign}.3f}"
