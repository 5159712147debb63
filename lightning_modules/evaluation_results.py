"""results/<task>.json: what an evaluation found, and all that is needed to know what was evaluated."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.tasks.task import Task
from esmerge.errors import InputError
from esmerge.hub import is_commit, split_reference
from esmerge.records import is_recorded_base, model_hashes
from esmerge.remote_code import code_files
from esmerge.results import RECORD_FILE, versions, write_whole
from esmerge.sources import Source, content_hash, read_json
from lightning_modules.metrics import UNREADABLE, Outcomes, Score
from lightning_modules.prompts import content_digest
from lightning_modules.sample_log import Record

RESULTS_FOLDER = "results"
# Fields of a task that cards and comparisons read.
_TASK_FIELDS = ("name", "version", "title", "dataset", "benchmark", "licence", "citation", "metrics", "choices")
# Fields of recipes: models, each a folder or a repository; files.
_MODELS = ("base", "model", "encoder", "specialists")
_FILES = ("features", "data", "tensors", "chat_template", "tasks")
_PACKAGES = ("peft", "pytorch-lightning", "torchmetrics")


def results_file(folder: Path, task: str) -> Path:
    """The results of a task in the folder of a model."""
    return folder / RESULTS_FOLDER / f"{task}.json"


def describe_task(task: Task) -> dict[str, Any]:
    """What a reader of results has to know about a task."""
    fields = task.model_dump(mode="json")
    return {name: fields[name] for name in (*_TASK_FIELDS, "baselines")}


def describe_model(source: Source, base: Source | None) -> dict[str, Any]:
    """Name, commit and content hash of a model; of an adapter, its base's too. No path of this machine."""
    found: dict[str, Any] = {"name": source.folder.resolve().name}
    if source.commit is not None:
        found = {"name": source.reference, "commit": source.commit}
    found["hash"], found["weights"] = model_hashes(source.folder)
    if code := code_files(source.folder):
        found["code"] = content_digest([content_hash(file) for file in code])
    if base is not None:
        found["base"] = describe_model(base, None)
    return found


def esmerge_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of a merged model, with the last names of folders only; None if esmerge did not merge it."""
    recipe = _recorded(folder, "recipe")
    if recipe is None:
        return None
    # What a merge took from the Hub, it recorded with the commit.
    found: dict[str, Any] = portable(recipe, lambda reference: is_commit(split_reference(reference)[1]))
    return found


def is_own_base(folder: Path, base: Mapping[str, Any]) -> bool:
    """Whether a base, as `describe_model` has it, is the one that a merged model in a folder was merged on, if any."""
    inputs = _recorded(folder, "inputs")
    return inputs is None or is_recorded_base(base, inputs.get("base", {}))


def _recorded(folder: Path, section: str) -> dict[str, Any] | None:
    """A section of a merge's record; None if there is no record."""
    file = folder / RECORD_FILE
    if not file.exists():
        return None
    try:
        found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))[section]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no record of a merge: restore or remove it.") from error
    return found


def portable(value: Any, on_hub: Callable[[str], bool], field: str = "") -> Any:
    """A recipe without paths of this machine: of each, the last name is left.

    Args:
        value: the recipe of a merge or a training, or a part of it.
        on_hub: whether a model's reference names a repository rather than a folder.
        field: that the value stands in.
    """
    if isinstance(value, Mapping):
        # Below `specialists` and `data` stand modalities, whose names are the user's.
        return {key: portable(entry, on_hub, key if key in _MODELS + _FILES else field) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry, on_hub, field) for entry in value]
    if not isinstance(value, str) or field not in _MODELS + _FILES or value.startswith("hf://"):
        return value
    if (field in _MODELS and on_hub(value)) or re.search(r"[\n{]", value):  # a template itself
        return value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def all_versions() -> dict[str, str]:
    """Versions of what results depend on."""
    return {**versions(), **{name: version(name) for name in _PACKAGES}}


def outcomes_of(records: Sequence[Record], choices: Sequence[str], lengths: Sequence[float] | None = None) -> Outcomes:
    """What metrics are made of.

    Args:
        records: of a log.
        choices: of the task.
        lengths: what each choice's log-likelihood is divided by; None for generated answers.
    """
    index = {choice: number for number, choice in enumerate(choices)}
    answers = torch.tensor([index[record["answer"]] for record in records], dtype=torch.long)
    predictions = torch.tensor([index.get(r["prediction"], UNREADABLE) for r in records], dtype=torch.long)
    odds, groups = None, None
    if lengths is not None and len(choices) == 2:
        found = [[record["log_likelihoods"][choice] for choice in choices] for record in records]
        scores = torch.tensor(found, dtype=torch.float64) / torch.tensor(lengths, dtype=torch.float64)
        odds = scores[:, 0] - scores[:, 1]
    if all(record.get("group") is not None for record in records):
        names = {name: number for number, name in enumerate(dict.fromkeys(record["group"] for record in records))}
        groups = torch.tensor([names[record["group"]] for record in records], dtype=torch.long)
    return Outcomes(answers, predictions, len(choices), odds, groups)


def summary(records: Sequence[Record], choices: Sequence[str], scores: Mapping[str, Score]) -> dict[str, Any]:
    """Scores and counts as results hold them."""
    answers = Counter(record["answer"] for record in records)
    predictions = Counter(record["prediction"] for record in records)
    return {
        "samples": len(records),
        "scores": {
            name: {key: _number(value) for key, value in asdict(score).items()} for name, score in scores.items()
        },
        "invalid_rate": predictions[None] / len(records),
        "answers": {choice: answers[choice] for choice in choices},
        "predictions": {choice: predictions[choice] for choice in choices},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def write_results(file: Path, content: Mapping[str, Any]) -> None:
    """Write results, all or nothing."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_results(file: Path) -> dict[str, Any]:
    """Results that `write_results` wrote; `InputError` if they are missing or not what it writes."""
    content = read_json(file)
    if missing := [name for name in ("task", "run", "scores", "samples") if name not in content]:
        raise InputError(f"{file} is no result of esmerge evaluate: it has no {missing[0]}; evaluate the model again.")
    return content
