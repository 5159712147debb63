"""Scores multiple-choice questions by likelihood with SmolLM2-135M: `esmerge evaluate` and lm-evaluation-harness.

The same questions, chat template, dtype (float32) and batch size, both from the command line, in turns;
lm-evaluation-harness in its own virtual environment. Says whether both choose the same answer to every question.

    python -m benchmarks.speed.lm_evaluation FOLDER

FOLDER is filled with the questions, their descriptions for both, and lm-evaluation-harness (2 GB), which a later run
uses again. What takes time is the model, so the first questions of each task do (`--samples`; 0 for all).
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.speed.measure import machine, markdown_table
from benchmarks.speed.side_by_side import Run, command_line, median, megabytes, peer_python, rounds, run, write_runs
from benchmarks.tasks.task import Task
from benchmarks.testbed.base_model import base_model_folder
from lightning_modules.samples import Item, load_samples
from lightning_modules.tasks import load_task

# Two answers of one token each, which the harness too scores in one pass; and many answers of several tokens.
SAMPLES = {"antimicrobial": 300, "tissue": 60}
BATCH_SIZE = 16
SPEEDUP = 1.5
PACKAGES = ["torch==2.13.0", "lm-eval[hf]==0.4.13"]
# Those with few samples are what both need beside the model: starting, loading, writing.
FEW = 8


@dataclass(frozen=True)
class Question:
    """One sample, as plain text."""

    id: str
    prompt: str
    answer: int


def questions(task: Task, count: int) -> list[Question]:
    """The first samples of a task, all of them for 0."""
    found = []
    for sample in load_samples(task, limit=count or None):
        (turn,) = sample.turns
        text = "".join(part.value if isinstance(part, Item) else part for part in turn.parts)
        found.append(Question(sample.id, text, sample.answer))
    return found


def prepare(folder: Path, name: str, count: int) -> str:
    """Write the questions of a task and its description for both engines; returns its name there."""
    task = load_task(name)
    asked = questions(task, count)
    label = f"{name}_{len(asked)}"
    lines = [{"id": q.id, "prompt": q.prompt, "answer": task.choices[q.answer], "target": q.answer} for q in asked]
    data = folder / f"{label}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = {
        "name": label,
        "version": 1,
        "title": task.title,
        "description": task.description,
        "source": {"files": {"test": str(data)}},
        "columns": {"text": "prompt"},
        "id": "id",
        "answer": "answer",
        "prompt": "{text}",
        "choices": list(task.choices),
        "metrics": ["accuracy"],
        "citation": task.citation,
        "licence": task.licence,
    }
    (folder / f"{label}.yaml").write_text(yaml.safe_dump(ours, sort_keys=False))
    theirs = {
        "task": label,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "target",
        "doc_to_choice": list(task.choices),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "harness").mkdir(exist_ok=True)
    (folder / "harness" / f"{label}.yaml").write_text(yaml.safe_dump(theirs, sort_keys=False))
    return label


def esmerge(folder: Path, model: Path, label: str) -> Run:
    """`esmerge evaluate`; the output is removed first."""
    output = folder / "esmerge-results" / label
    shutil.rmtree(output, ignore_errors=True)
    command: list[str | Path] = [
        Path(sys.executable).with_name("esmerge"),
        "evaluate",
        model,
        "--task",
        folder / f"{label}.yaml",
    ]
    return run([*command, "-o", output, "--dtype", "float32", "--batch-size", str(BATCH_SIZE), "--quiet"])


def harness(folder: Path, python: Path, model: Path, label: str) -> Run:
    """`lm_eval`; the output is removed first."""
    output = folder / "harness-results" / label
    shutil.rmtree(output, ignore_errors=True)
    command: list[str | Path] = [
        python.with_name("lm_eval"),
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
    ]
    command += ["--tasks", label, "--include_path", folder / "harness", "--device", "cpu"]
    command += ["--batch_size", str(BATCH_SIZE), "--apply_chat_template", "--log_samples", "--output_path", output]
    return run(command)


@dataclass(frozen=True)
class Scores:
    """Of every question, the log-likelihood of each choice, and the right one."""

    likelihoods: dict[str, dict[str, float]]
    answers: dict[str, str]

    def choices(self) -> dict[str, str]:
        """The likeliest of each."""
        return {name: max(values, key=values.__getitem__) for name, values in self.likelihoods.items()}

    def accuracy(self) -> float:
        """Share of right choices."""
        return sum(choice == self.answers[name] for name, choice in self.choices().items()) / len(self.answers)


def our_scores(folder: Path, label: str) -> Scores:
    """What `esmerge evaluate` logged."""
    records = _records(next((folder / "esmerge-results" / label).rglob(f"{label}.jsonl")))
    return Scores({r["id"]: r["log_likelihoods"] for r in records}, {r["id"]: r["answer"] for r in records})


def their_scores(folder: Path, label: str, choices: Sequence[str]) -> Scores:
    """What `lm_eval` logged."""
    records = _records(next((folder / "harness-results" / label).rglob("samples_*.jsonl")))
    likelihoods = {
        r["doc"]["id"]: {c: float(found[0]) for c, found in zip(choices, r["filtered_resps"], strict=True)}
        for r in records
    }
    return Scores(likelihoods, {r["doc"]["id"]: r["doc"]["answer"] for r in records})


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def agreement(folder: Path, tasks: Mapping[str, tuple[str, int]]) -> tuple[str, int]:
    """Markdown: how many choices are the same, and how far log-likelihoods are apart; and how many choices differ."""
    rows, different = [], 0
    for name, (label, count) in tasks.items():
        ours, theirs = our_scores(folder, label), their_scores(folder, label, load_task(name).choices)
        if ours.answers != theirs.answers:
            raise RuntimeError(f"{label}: the engines were asked different questions")
        mine, other = ours.choices(), theirs.choices()
        same = sum(mine[question] == other[question] for question in mine)
        different += count - same
        apart = max(abs(values[c] - theirs.likelihoods[q][c]) for q, values in ours.likelihoods.items() for c in values)
        rows.append([label, f"{same} of {count}", f"{ours.accuracy():.4f}", f"{theirs.accuracy():.4f}", f"{apart:.0e}"])
    header = ["task, questions", "same choice", "accuracy, esmerge", "accuracy, harness", "log-likelihoods apart"]
    return markdown_table(header, rows), different


def speed(runs: dict[str, list[Run]], tasks: dict[str, tuple[str, int]], few: dict[str, str]) -> str:
    """Markdown: medians of whole commands, and questions per second beyond the start."""
    rows = []
    for label, count in tasks.values():
        ours, theirs = median(runs[f"{label} esmerge"]), median(runs[f"{label} harness"])
        start = few[label]
        rates = [
            (count - FEW) / (one.seconds - median(runs[f"{start} {engine}"]).seconds)
            for one, engine in ((ours, "esmerge"), (theirs, "harness"))
        ]
        rows.append(
            [
                label,
                *(f"{one.seconds:.1f} s ({one.cpu:.1f})" for one in (ours, theirs)),
                f"{theirs.seconds / ours.seconds:.1f} x",
                *(f"{rate:.1f}" if math.isfinite(rate) else "-" for rate in rates),
                f"{rates[0] / rates[1]:.1f} x",
                f"{SPEEDUP} x: {'yes' if rates[0] >= SPEEDUP * rates[1] else 'no'}",
                *(megabytes(one.peak_rss) for one in (ours, theirs)),
            ]
        )
    header = ["task, questions", "esmerge", "harness", "faster", "questions/s, esmerge", "questions/s, harness"]
    header += ["faster", "aim", "memory, esmerge", "memory, harness"]
    return (
        f"{markdown_table(header, rows)}\n\nIn parentheses: seconds of CPU. Questions per second: without the "
        f"start and the first {FEW} questions."
    )


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--samples", type=int, help="of each task; 0 for all")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = peer_python(folder / "venv", PACKAGES)
    model = base_model_folder()
    tasks: dict[str, tuple[str, int]] = {}
    few: dict[str, str] = {}
    for name, default in SAMPLES.items():
        label = prepare(folder, name, default if options.samples is None else options.samples)
        tasks[name] = (label, int(label.rpartition("_")[2]))
        few[label] = prepare(folder, name, FEW)
    commands: dict[str, Callable[[], Run]] = {}
    for label in [*few.values(), *few]:
        commands[f"{label} esmerge"] = partial(esmerge, folder, model, label)
        commands[f"{label} harness"] = partial(harness, folder, python, model, label)
    runs = rounds(commands, options.rounds)
    choices, different = agreement(folder, tasks)
    print(f"\n{machine()}, medians of {options.rounds}\n\n{choices}\n\n{speed(runs, tasks, few)}")
    if options.json:
        write_runs(options.json, runs)
    if different:
        sys.exit(f"{different} choices differ")


if __name__ == "__main__":
    main()
