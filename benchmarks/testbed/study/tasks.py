"""What the study asks: single-modality and cross-modality tasks, their validation data, and a control."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

import benchmarks.tasks
from benchmarks.testbed.binding import pydta
from benchmarks.testbed.data import Modality
from benchmarks.testbed.drug_responses import pairs_of_middling_drugs

_FOLDER = Path(benchmarks.tasks.__file__).parent
VALIDATION = "validation"
SHUFFLED = "shuffled"


@dataclass(frozen=True)
class StudyTask:
    """A task of the study.

    Attributes:
        name: in `benchmarks/tasks`.
        title: in tables.
        specialist: whose own task it is; None for a task about two modalities.
        test, validation: how many samples are asked at most; no validation data is looked at where it is 0.
        counts: whether it enters means.
        control: whether it is also asked with shuffled partners.
        chance: the score of answers drawn at random.
    """

    name: str
    title: str
    specialist: Modality | None
    test: int
    validation: int
    counts: bool = True
    control: bool = False
    chance: float = 0.5


TASKS: tuple[StudyTask, ...] = (
    StudyTask("b3db", "BBB", "molecule", 300, 128),
    StudyTask("antimicrobial", "antimicrobial", "protein", 300, 128),
    StudyTask("tissue", "tissue", "cell", 300, 64, chance=1 / 14),
    StudyTask("cell_sensitivity", "sensitivity", "cell", 300, 64),
    StudyTask("gdsc2_mid_potency", "drug x cell", None, 200, 64, control=True),
    StudyTask("pydta", "drug x protein", None, 244, 96, control=True),
    # Doubly cold: nobody was taught anything about its proteins, nor how its molecules act.
    StudyTask("kiba", "KIBA", None, 150, 0, counts=False),
)
OWN = tuple(task for task in TASKS if task.specialist is not None)
CROSS = tuple(task for task in TASKS if task.specialist is None and task.counts)


@lru_cache
def partners(task: str) -> Mapping[str, tuple[str, str]]:
    """By a test sample's id, its molecule and its partner; of tasks about pairs that count, shuffled ones too."""
    match task.removesuffix(f"_{SHUFFLED}"):
        case "gdsc2_mid_potency":
            return {row["id"]: (row["molecule"], row["cell line"]) for row in pairs_of_middling_drugs()["test"]}
        case "pydta":
            return {row["id"]: (row["molecule"], row["protein"]) for row in pydta()["test"]}
    return {}


def write_tasks(folder: Path) -> None:
    """Write the tasks that ask about validation data, and those with shuffled partners."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        fields = yaml.safe_load((_FOLDER / f"{task.name}.yaml").read_text(encoding="utf-8"))
        if task.validation:
            _write(folder, f"{task.name}_{VALIDATION}", {**fields, "split": {"evaluated": VALIDATION}})
        if task.control:
            source = {**fields["source"], "testbed": f"{fields['source']['testbed']}_{SHUFFLED}"}
            _write(folder, f"{task.name}_{SHUFFLED}", {**fields, "source": source})


def _write(folder: Path, name: str, fields: Mapping[str, Any]) -> None:
    content = yaml.safe_dump({**fields, "name": name}, sort_keys=False, allow_unicode=True)
    (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
