"""The study's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from matplotlib.figure import Figure

from benchmarks.testbed.study.statistics import half_width

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
_SIGNALS, _OTHERS, _REFERENCES = "#D55E00", "#0072B2", "#7f7f7f"
_MARKERS = ("o", "s", "^")
# Of an axis of scores, so that noise does not look like a trend.
_SMALLEST_RANGE = 0.05


def score_figure(values: Mapping[str, Sequence[float]], signals: Sequence[str], references: Sequence[str]) -> Figure:
    """Mean and interval over seeds of every row.

    Args:
        values: title of a row -> a score for each seed.
        signals: titles of the rows that use embedding signals.
        references: titles of rows that are no merges.
    """
    order = sorted(values, key=lambda title: fmean(values[title]))
    figure = Figure(figsize=(7, 0.28 * len(order) + 1), layout="constrained")
    axes = figure.subplots()
    for place, title in enumerate(order):
        own = values[title]
        color = _SIGNALS if title in signals else _REFERENCES if title in references else _OTHERS
        error = half_width(own) if len(own) > 2 else 0.0
        axes.errorbar(fmean(own), place, xerr=error, color=color, fmt="none", linewidth=1, alpha=0.5)
        axes.plot(fmean(own), place, "o", color=color)
        axes.plot(own, [place] * len(own), ".", color=color, alpha=0.5)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("mean score on test data, of each training and their mean; the 95 % interval of three or more")
    axes.grid(axis="x", alpha=0.3)
    return figure


def runtime_figure(seconds: Mapping[str, Mapping[int, float]], signals: Sequence[str]) -> Figure:
    """How long merging took with every row, of each training by itself: machines, and what else they did, differ.

    Args:
        seconds: title of a row -> seconds by training.
        signals: titles of the rows that use embedding signals.
    """
    order = sorted(seconds, key=lambda title: median(seconds[title].values()))
    figure = Figure(figsize=(7, 0.28 * len(order) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, title in enumerate(order):
        color = _SIGNALS if title in signals else _OTHERS
        for seed, own in sorted(seconds[title].items()):
            axes.plot(own, place, _MARKERS[seed % len(_MARKERS)], color=color, markersize=5)
    for seed in sorted({seed for own in seconds.values() for seed in own}):
        axes.plot([], [], _MARKERS[seed % len(_MARKERS)], color=_REFERENCES, label=f"training {seed}")
    axes.set_yticks(range(len(order)), order)
    axes.set_xscale("log")
    axes.set_xlabel("seconds to merge on one core, probe included; other jobs and machines for each training")
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    return figure


def gap_figure(points: Mapping[str, Sequence[tuple[float, float]]], signals: Sequence[str]) -> Figure:
    """Every setting of every row: the gap of its embeddings, and its score.

    Args:
        points: title -> (gap, score) of each setting.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for title, own in points.items():
        color = _SIGNALS if title in signals else _OTHERS
        axes.plot([gap for gap, _ in own], [score for _, score in own], "o", color=color, markersize=4)
        best = max(own, key=lambda point: point[1])
        axes.annotate(title, best, textcoords="offset points", xytext=(4, 3), fontsize=6)
    axes.set_xlabel("distance from the specialists' embeddings (1: the base's)")
    axes.set_ylabel("mean score on validation data")
    axes.grid(alpha=0.3)
    return figure


def line_figure(lines: Mapping[str, Mapping[float, float]], label: str) -> Figure:
    """Validation scores over a setting, on a logarithmic axis.

    Args:
        lines: title -> value of the setting -> score.
        label: the setting.
    """
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for title, own in lines.items():
        axes.plot(list(own), list(own.values()), "o-", label=title)
    axes.set_xscale("log")
    ticks = sorted({value for own in lines.values() for value in own})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("mean score on validation data")
    low, high = axes.get_ylim()
    margin = max(0.0, _SMALLEST_RANGE - (high - low)) / 2
    axes.set_ylim(low - margin, high + margin)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def save(figure: Figure, file: Path) -> None:
    """As PNG, the same bytes for the same figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight", metadata={"Software": None})
