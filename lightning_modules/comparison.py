"""Models side by side, on the samples that all of them were evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmerge.errors import InputError
from esmerge.sources import content_hash
from lightning_modules.evaluation_results import RESULTS_FOLDER, outcomes_of, read_results, results_file
from lightning_modules.metrics import OF_PREDICTIONS, Difference, Outcomes, paired_differences, values
from lightning_modules.sample_log import Record, log_file, read_log

# What has to be the same for scores to be comparable; the prompts need not, models differ in their templates.
_SAME = {"version": "versions of the task", "score": "ways to score", "normalise": "ways to normalise"}


@dataclass(frozen=True)
class TaskComparison:
    """How several models did on one task.

    Attributes:
        task: its name.
        models: their folders' names, told apart where these are the same.
        samples: that all were evaluated on.
        readable: those among them to which all gave an answer that could be read.
        values: of each metric, by model, on those samples; those of predictions on the readable ones.
        differences: of each metric, of every model but the first from the first.
    """

    task: str
    models: list[str]
    samples: int
    readable: int
    values: dict[str, list[float]]
    differences: dict[str, list[Difference]]


@dataclass(frozen=True)
class _Evaluated:
    folder: Path
    results: dict[str, Any]
    records: dict[str, Record]

    def outcomes(self, samples: Sequence[str]) -> Outcomes:
        settings = self.results["settings"]
        lengths = settings["choice_lengths"] if settings["score"] == "likelihood" else None
        return outcomes_of([self.records[sample] for sample in samples], self.results["task"]["choices"], lengths)


def compare_results(folders: Sequence[Path], tasks: Sequence[str], seed: int) -> list[TaskComparison]:
    """Compare the models in some folders, task by task.

    Args:
        folders: of models that were evaluated, or the `--output` of their evaluations.
        tasks: to compare; empty for all that every model was evaluated on.
        seed: of the bootstrap.

    Raises:
        InputError: if there are no such results, or they are of different questions.
    """
    if len(folders) < 2:
        raise InputError("--compare needs at least two folders of models that were evaluated.")
    found = [_tasks_of(folder) for folder in folders]
    common = sorted(set.intersection(*found))
    if not common:
        raise InputError(
            f"{folders[0]} and the other folders have no results of the same task: evaluate the models on one first."
        )
    for task in tasks:
        for folder, known in zip(folders, found, strict=True):
            if task not in known:
                raise InputError(f"{folder} has no results of {task} (it has: {', '.join(sorted(known))}).")
    return [_compare(task, folders, seed) for task in tasks or common]


def _tasks_of(folder: Path) -> set[str]:
    found = {file.stem for file in (folder / RESULTS_FOLDER).glob("*.json")}
    if not found:
        raise InputError(f"{folder} has no {RESULTS_FOLDER}/<task>.json: evaluate the model first.")
    return found


def _compare(task: str, folders: Sequence[Path], seed: int) -> TaskComparison:
    models = [_open(task, folder) for folder in folders]
    first = models[0]
    for other in models[1:]:
        for field, what in _SAME.items():
            if other.results["run"][field] != first.results["run"][field]:
                raise InputError(
                    f"{task}: the results of {first.folder} and {other.folder} are of different {what} "
                    f"({first.results['run'][field]}, {other.results['run'][field]}): evaluate one of them again."
                )
        if other.results["task"]["choices"] != first.results["task"]["choices"]:
            raise InputError(
                f"{task}: the results of {first.folder} and {other.folder} have different choices: evaluate one again."
            )
    samples = [sample for sample in first.records if all(sample in model.records for model in models)]
    if not samples:
        raise InputError(
            f"{task}: {first.folder} and {models[1].folder} were evaluated on different samples and have "
            "none in common: evaluate them on the same ones."
        )
    for other in models[1:]:
        for sample in samples:
            answers = [model.records[sample]["answer"] for model in (first, other)]
            if answers[0] != answers[1]:
                raise InputError(
                    f"{task}: the answer to sample {sample} is {answers[0]} in {first.folder} and {answers[1]} in "
                    f"{other.folder}: they were evaluated on different data."
                )
    wanted = [name for name in first.results["scores"] if all(name in model.results["scores"] for model in models)]
    # An answer that one model left out must not be counted for the other alone.
    readable = [name for name in samples if all(model.records[name]["prediction"] is not None for model in models)]
    found: dict[str, list[float]] = {}
    paired: dict[str, list[Difference]] = {}
    for names, chosen in (
        ([name for name in wanted if name in OF_PREDICTIONS], readable),
        ([name for name in wanted if name not in OF_PREDICTIONS], samples),
    ):
        outcomes = [model.outcomes(chosen) for model in models]
        of_models = [values(outcome, names) for outcome in outcomes]
        differences = [paired_differences(outcomes[0], outcome, names, seed) for outcome in outcomes[1:]]
        found |= {name: [entry[name] for entry in of_models] for name in names}
        paired |= {name: [entry[name] for entry in differences] for name in names}
    return TaskComparison(
        task,
        _names(folders),
        len(samples),
        len(readable),
        {name: found[name] for name in wanted},
        {name: paired[name] for name in wanted},
    )


def _open(task: str, folder: Path) -> _Evaluated:
    results = read_results(results_file(folder, task))
    log = log_file(folder / RESULTS_FOLDER, task)
    records = read_log(log)
    if content_hash(log) != results.get("log"):
        raise InputError(f"{log} is not the log of the results beside it: evaluate the model again.")
    return _Evaluated(folder, results, {record["id"]: record for record in records})


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names, or all of them where these do not tell them apart."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
