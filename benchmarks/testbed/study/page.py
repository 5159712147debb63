"""The study's part of the testbed's README: tables and figures from result files, nothing typed.

    python -m benchmarks.testbed.study.page

What is not there yet is shown as a dash.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.testbed.report import write_table
from benchmarks.testbed.results_table import markdown_table
from benchmarks.testbed.study.classical import drug_and_cell, drug_and_target
from benchmarks.testbed.study.coefficients import SHOWN_COEFFICIENTS
from benchmarks.testbed.study.comparisons import Resampled, compare_with_all, resampled, width_of_control
from benchmarks.testbed.study.conclusion import conclusion
from benchmarks.testbed.study.figures import gap_figure, line_figure, runtime_figure, save, score_figure
from benchmarks.testbed.study.jobs import AS_PUBLISHED, PROBE_SIZE_SEED, PROBE_SIZES
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.provenance import (
    check_settings,
    check_specialists,
    data_table,
    trainings_table,
    versions_sentence,
)
from benchmarks.testbed.study.results import (
    Found,
    Scores,
    best_on_validation,
    cross,
    gather,
    over_shared_trainings,
    overall,
    preservation,
    specialists_of,
)
from benchmarks.testbed.study.rows import (
    CHOOSING_SEED,
    FROM_SIGNALS,
    MATCHING,
    PUBLISHED,
    REGMEAN_OWN_PROMPTS,
    ROWS,
    VARIATIONS,
    Row,
    row,
)
from benchmarks.testbed.study.specialists import SEEDS
from benchmarks.testbed.study.statistics import half_width, holm, rank_correlation
from benchmarks.testbed.study.table_rows import MERGES, REFERENCES, SIGNALS, TITLES, TRAINED
from benchmarks.testbed.study.tasks import SHUFFLED, TASKS
from esmerge.figures import draw_figures
from esmerge.methods import METHODS
from esmerge.results import COEFFICIENTS_FILE, read_coefficients

README = Path(__file__).parent.parent / "README.md"
FIGURES = Path(__file__).parent / "figures"
# Marks in the README.
CONCLUSION = ("<!-- conclusion: begin -->", "<!-- conclusion: end -->")
RESULTS = ("<!-- study: begin -->", "<!-- study: end -->")
NOTHING = "-"


def scores_table(found: Found) -> str:
    """Every row: each task's mean over seeds, and the means with their intervals."""
    header = [
        "row",
        *(f"{task.title}" for task in TASKS),
        "kept of the specialists'",
        "kept above chance",
        "cross-modality",
        "overall",
        "trainings",
    ]
    rows = []
    for name, title in TITLES.items():
        seeds = found.scores.get(name, {})
        if not seeds:
            rows.append([title, *[NOTHING] * (len(header) - 1)])
            continue
        tasks = [f"{fmean(own[task.name] for own in seeds.values()):.3f}" for task in TASKS]
        known = [(own, s) for seed, own in seeds.items() if (s := specialists_of(found, seed))]
        kept = [[preservation(own, s, above) for own, s in known] for above in (False, True)]
        means = [_with_interval(values) for values in (*kept, _map(cross, seeds), _map(overall, seeds))]
        rows.append([title, *tasks, *means, ", ".join(map(str, seeds))])
    return markdown_table(header, rows)


def _map(function: object, seeds: dict[int, Scores]) -> list[float]:
    assert callable(function)
    return [function(own) for own in seeds.values()]


def _with_interval(values: Sequence[float]) -> str:
    if not values:
        return NOTHING
    if len(values) <= 2:  # Student's t makes an interval of two, but not a useful one
        return " / ".join(f"{value:.3f}" for value in values)
    return f"{fmean(values):.3f} ± {half_width(values):.3f}"


def paired_table(found: Found, drawn: Resampled, reference: str) -> str:
    """The difference of a row from every other merge, over the trainings and tasks that both have."""
    differences = compare_with_all(found, drawn, reference)
    if not differences:
        return NOTHING
    adjusted = holm([own.p for own in differences.values()])
    rows = [
        [
            TITLES[name],
            str(own),
            f"{own.better} of {own.count}",
            f"{own.p:.3f}",
            f"{p:.3f}",
            f"{own.p_over_tasks:.3f}",
            own.trainings,
        ]
        for (name, own), p in zip(differences.items(), adjusted, strict=True)
    ]
    header = [f"{TITLES[reference]} minus", "mean difference", "better", "p", "p, Holm", "p over tasks", "by training"]
    return markdown_table(header, rows)


def choices_table(found: Found, of: Sequence[Row]) -> str:
    """Every setting of rows with its score on validation data; the best one in bold; tested if no other is named."""
    rows = []
    for own in of:
        scores = found.choices.get(own.name)
        if len(own.variants) == 1:
            continue
        if scores is None:
            rows.append([own.title, NOTHING, f"{own.chosen_on}"])
            continue
        best = max(scores, key=scores.__getitem__)
        shown = [f"{_readable(name)}: {score:.3f}" for name, score in scores.items()]
        marked = [f"**{text}**" if name == best else text for name, text in zip(scores, shown, strict=True)]
        told = f" (tested: {_readable(own.settled)})" if own.settled else ""
        rows.append([own.title, "; ".join(marked) + told, f"{own.chosen_on}"])
    return markdown_table(["row", "mean score on validation data", "training"], rows)


def _readable(variant: str) -> str:
    return re.sub(r"-(?=[a-z])", ", ", re.sub(r"([a-z])_([\d.]+)", r"\1 \2", variant))


def unlabelled_table(found: Found) -> str:
    """Of every row, the setting that embeddings alone would choose, beside the one that validation data chose."""
    rows = []
    for own in ROWS:
        if own.name not in found.choices or len(own.variants) == 1:
            continue
        scores, gaps = found.choices[own.name], found.gaps[own.name]
        best, nearest = max(scores, key=scores.__getitem__), min(gaps, key=gaps.__getitem__)
        cells = [f"{_readable(name)}: {gaps[name]:.3f}, {scores[name]:.3f}" for name in (nearest, best)]
        rows.append([own.title, *cells, f"{scores[nearest] - scores[best]:+.3f}"])
    header = ["row", "nearest to the specialists: gap, score", "best on validation data: gap, score", "lost"]
    return markdown_table(header, rows)


def unlabelled_sentence(found: Found) -> str:
    """How well the gap tells the score over all settings that were measured with the same specialists, each once."""
    # One merge may stand in several rows, but no two have the same numbers.
    families: dict[str, set[tuple[float, float]]] = {}
    for name, scores in _of_same_specialists(found).items():
        for variant, score in scores.items():
            own = row(name).variants[variant]
            reads = METHODS[own["method"]["name"]].match is not None
            signals = isinstance(own["coefficients"], dict) and "from" in own["coefficients"]
            family = "that match" if reads else "with coefficients from signals" if signals else "of other methods"
            families.setdefault(family, set()).add((found.gaps[name][variant], score))
    told = [
        f"{_correlation(own)} over the {len(own)} settings {family}"
        for family, own in families.items()
        if len(own) > 2  # a correlation of two is no number to tell
    ]
    every = set().union(*families.values())
    return (
        f"The rank correlation of gap and score is {_correlation(every)} over all {len(every)} settings measured with "
        f"the specialists of training {CHOOSING_SEED}{''.join(f', {own}' for own in told)}."
    )


def _of_same_specialists(found: Found) -> dict[str, dict[str, float]]:
    return {name: own for name, own in found.choices.items() if row(name).chosen_on == CHOOSING_SEED}


def _correlation(points: Collection[tuple[float, float]]) -> str:
    gaps, scores = zip(*sorted(points), strict=True)
    return f"{rank_correlation(gaps, scores):+.2f}"


def control_table(places: Places, found: Found) -> str:
    """What is left with shuffled partners, and what main effects alone would give."""
    controlled = [task for task in TASKS if task.control]
    header = [""]
    for task in controlled:
        header += [task.title, f"{task.title}, shuffled", "difference"]
    rows = []
    for name, controls in found.controls.items():
        cells = []
        for task in controlled:
            true = fmean(found.scores[name][seed][task.name] for seed in controls)
            shuffled = fmean(own[f"{task.name}_{SHUFFLED}"] for own in controls.values())
            width = width_of_control(places, name, task.name, list(controls))
            cells += [f"{true:.3f}", f"{shuffled:.3f}", f"{true - shuffled:+.3f} ± {width:.3f}"]
        rows.append([TITLES[name], *cells])
    limits = {task.name: task.test for task in TASKS}
    effects = [drug_and_cell(limits["gdsc2_mid_potency"]), drug_and_target(limits["pydta"])]
    for title, field in (
        ("molecule's main effect", "molecule"),
        ("partner's main effect, of a cell line that of its other test pairs", "partner"),
        ("both main effects added", "both"),
    ):
        rows.append([title, *(text for own in effects for text in (f"{getattr(own, field):.3f}", NOTHING, NOTHING))])
    return markdown_table(header, rows)


def draw(places: Places, found: Found, folder: Path) -> list[Path]:
    """All figures for which there are results."""
    files = []
    titles = {TITLES[name]: name for name in TITLES}
    signals = [TITLES[name] for name in SIGNALS]
    means = {title: _map(overall, found.scores[name]) for title, name in titles.items() if name in found.scores}
    lines = {
        TITLES[AS_PUBLISHED if name == PUBLISHED else name]: {float(samples): score for samples, score in own.items()}
        for name, own in found.probe_sizes.items()
    }
    figures = {}
    if means:
        figures["overall"] = score_figure(means, signals, [*REFERENCES.values(), *TRAINED.values()])
    if found.seconds:
        figures["runtime"] = runtime_figure({TITLES[name]: own for name, own in found.seconds.items()}, signals)
    if lines:
        figures["probe_size"] = line_figure(lines, f"probe samples (specialists of training {PROBE_SIZE_SEED})")
    if found.choices:
        points = {
            TITLES[name]: [(found.gaps[name][variant], score) for variant, score in own.items()]
            for name, own in _of_same_specialists(found).items()
            if name in TITLES
        }
        figures["gap"] = gap_figure(points, signals)
    for name, setting in (("es_layer_factors", "temperature"), ("es_element_factors", "tau")):
        if name in found.choices:
            values = {float(v.rpartition("_")[2]): score for v, score in found.choices[name].items()}
            figures[setting] = line_figure({TITLES[name]: values}, setting)
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        save(figure, files[-1])
    published = places.test(CHOOSING_SEED, AS_PUBLISHED)
    if (published / COEFFICIENTS_FILE).exists():
        files += draw_figures(read_coefficients(published), folder)
    return files


def page(places: Places, readme: Path, figures: Path) -> None:
    """Write tables and figures into a README between its marks."""
    check_specialists(places)
    check_settings(places)
    everything = gather(places, list(TITLES), [own.name for own in VARIATIONS], PROBE_SIZES)
    found = over_shared_trainings(everything, MERGES)
    drawn = draw(places, found, figures)
    resamples = resampled(places, found)
    parts = [
        "### Scores on test data",
        f"Means over those of the {len(SEEDS)} trainings of the specialists of which all merges have results, with "
        "95 % intervals (Student's t) over them; of one or two, each by itself. A row that lacks one of these has the "
        "trainings in its last column.",
        scores_table(found),
        *(_paired(found, resamples, name) for name in _compared(found)),
        "### Settings, and how they were chosen",
        choices_table(found, ROWS),
        "### What else embedding signals could do, on validation data",
        choices_table(found, VARIATIONS),
        *_without_labels(found),
        "### Shuffled partners and main effects",
        "±: half of the 95 % interval over the test samples, of these trainings; other trainings may differ more.",
        control_table(places, found),
        *_coefficients(places),
        "### Figures",
        *(f"![{file.stem.replace('_', ' ')}]({file.relative_to(readme.parent).as_posix()})" for file in drawn),
    ]
    if found.scores:
        parts += [
            "### What this was made from",
            versions_sentence(places),
            trainings_table(places),
            data_table(places),
        ]
    write_table(conclusion(found, resamples), readme, *CONCLUSION)
    write_table("\n\n".join(parts), readme, *RESULTS)


def _coefficients(places: Places) -> list[str]:
    """What they were, as far as there are any."""
    lines = [
        f"- {TITLES[name]}, training {CHOOSING_SEED}: {sentence(read_coefficients(folder).tensors)}"
        for name, sentence in SHOWN_COEFFICIENTS.items()
        if ((folder := places.test(CHOOSING_SEED, name)) / COEFFICIENTS_FILE).exists()
    ]
    return ["### What coefficients from embedding signals are like", "\n".join(lines)] if lines else []


def _without_labels(found: Found) -> list[str]:
    if not found.choices:
        return []
    return [
        "### What the embeddings alone would choose",
        "The gap is the squared distance of the merged model's last hidden states from each specialist's, at the "
        "probe's positions of its modality, relative to the base's distance: it needs no labels.",
        unlabelled_sentence(found),
        unlabelled_table(found),
    ]


def _compared(found: Found) -> list[str]:
    """The rows that are compared with all others: the paper's, and of other ways what validation data chose."""
    chosen = (best_on_validation(found, own) for own in (FROM_SIGNALS, MATCHING))
    return [name for name in (AS_PUBLISHED, *chosen, REGMEAN_OWN_PROMPTS) if name in found.scores]


def _paired(found: Found, drawn: Resampled, name: str) -> str:
    return f"#### {TITLES[name]} against the others\n\n{paired_table(found, drawn, name)}"


if __name__ == "__main__":
    page(Places.usual(), README, FIGURES)
