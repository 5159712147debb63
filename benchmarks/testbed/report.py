"""How good the specialists are: evaluates them and the base on held-out data, for the README and the demo.

    python -m benchmarks.testbed.report [--specialists FOLDER]

Writes `scores.json` into the specialists' folder and the table into README.md. Results are kept in the cache, so an
interrupted run goes on where it stopped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.testbed.base_model import base_model_folder, base_to_load
from benchmarks.testbed.cache import cache_folder
from benchmarks.testbed.results_table import TaskScore, first_scores, markdown_table
from benchmarks.testbed.specialists import FOLDER, RECORD, TASKS, specialist_folders
from esmerge.mllm.loading import load_processor
from lightning_modules.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation_results import RESULTS_FOLDER, outcomes_of, read_results, results_file
from lightning_modules.metrics import scores_with_intervals
from lightning_modules.sample_log import log_file, read_log

SCORES_FILE = "scores.json"
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"
# Of each task in the demo: a standard error of about 0.04 on each number.
DEMO_SAMPLES = 128
BASE = "base"
SEED = 42


def evaluate_model(
    model: Path, base: Path, tasks: Sequence[str], limit: int | None, output: Path | None = None
) -> dict[str, TaskScore]:
    """Evaluate the base or an adapter of it on some tasks; return the first metric of each.

    Items of modalities that the model does not know are text to it. Results in `output`, by default the model's own
    folder, are kept if they are those of the same evaluation.
    """
    named = base_to_load(model, base)
    known = load_processor(model, named).modalities
    settings = EvaluationSettings(
        base=named,
        limit=limit,
        batch_size=16,
        # Without matrix units for bfloat16, float32 is what a CPU multiplies fastest.
        dtype="float32",
        as_text=tuple(modality for modality in TASKS if modality not in known),
        resume=True,
        seed=SEED,
    )
    return first_scores(evaluate(str(model), tasks, settings, output))


def score_of_first(samples: int, output: Path, task: str) -> TaskScore:
    """The first metric of a task on its first samples only, from a finished evaluation in `output`."""
    results = read_results(results_file(output, task))
    records = read_log(log_file(output / RESULTS_FOLDER, task))[:samples]
    outcomes = outcomes_of(records, results["task"]["choices"], results["settings"]["choice_lengths"])
    metric = next(iter(results["scores"]))
    return TaskScore(metric, **asdict(scores_with_intervals(outcomes, [metric], SEED)[metric]), samples=len(records))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specialists", type=Path, default=FOLDER)
    folder = parser.parse_args().specialists
    base = base_model_folder()
    scores: dict[str, dict[str, dict[str, TaskScore]]] = {"test": {}, "demo": {}}
    for name, model in {BASE: base, **specialist_folders(folder)}.items():
        print(f"Evaluating {name}")
        output = cache_folder() / "evaluations" / name
        # All of a task's samples where the README needs them.
        whole = [task for modality, task in TASKS.items() if name in (BASE, modality)]
        part = [task for task in TASKS.values() if task not in whole]
        scores["test"][name] = evaluate_model(model, base, whole, None, output)
        found = {task: score_of_first(DEMO_SAMPLES, output, task) for task in whole}
        if part:
            found |= evaluate_model(model, base, part, DEMO_SAMPLES, output)
        scores["demo"][name] = {task: found[task] for task in TASKS.values()}
    (folder / SCORES_FILE).write_text(json.dumps(scores, indent=2, default=asdict) + "\n", encoding="utf-8")
    table = specialists_table(folder)
    print(table)
    write_table(table, README)


def read_scores(split: str, folder: Path = FOLDER) -> dict[str, dict[str, TaskScore]]:
    """The scores in `scores.json`: `test` on all samples, of own tasks and the base's; `demo` on the first of each."""
    content: Mapping[str, Any] = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))[split]
    return {name: {task: TaskScore(**score) for task, score in own.items()} for name, own in content.items()}


def specialists_table(folder: Path = FOLDER) -> str:
    """Each specialist beside the base on its own task's held-out samples, with what it was trained on."""
    scores = read_scores("test", folder)
    rows = []
    for modality, task in TASKS.items():
        record = json.loads((folder / modality / RECORD).read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in (folder / modality).rglob("*.safetensors"))
        own = scores[modality][task]
        rows.append(
            [
                modality,
                f"`{task}`",
                str(record["plan"]["settings"]["kind"]),
                " / ".join(str(record["samples"][split]) for split in ("train", "validation", "test")),
                f"{own.label} {own}",
                str(scores[BASE][task]),
                f"{size / 1e6:.1f} MB",
                f"{record['seconds'] / 60:.0f} min",
            ]
        )
    header = [
        "specialist",
        "task",
        "modality",
        "train / validation / test",
        "on the test set",
        "base",
        "size",
        "training",
    ]
    return markdown_table(header, rows)


def write_table(table: str, readme: Path, begin: str = BEGIN, end: str = END) -> None:
    """Put a table between the marks in a file."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    readme.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
