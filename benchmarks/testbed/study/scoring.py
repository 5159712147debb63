"""Evaluating models of the study on its tasks, by `esmerge evaluate`, into result files that stay."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.testbed.report import evaluate_model
from benchmarks.testbed.study.embeddings import GapMeter
from benchmarks.testbed.study.merges import merged, merged_in_all_ways, scratch_folder
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import Row
from benchmarks.testbed.study.specialists import encodings
from benchmarks.testbed.study.tasks import SHUFFLED, TASKS, VALIDATION
from esmerge.modalities import TextModality, save_modality
from esmerge.modalities.registry import MODALITIES_FOLDER
from esmerge.results import COEFFICIENTS_FILE, RECORD_FILE, write_whole
from esmerge.sources import read_json

CHOICE_FILE = "choice.json"
MERGE_FILE = "merge.json"
# Of these trainings some data was looked at before all methods stood as they are.
DEVELOPED_ON = (42, 43)


def score_on_validation(places: Places, model: Path, base: Path, output: Path) -> float:
    """The mean of a model's scores on the validation data of all tasks that count."""
    asked = [task for task in TASKS if task.validation]
    scores: list[float] = []
    for limit in sorted({task.validation for task in asked}):
        names = [f"{task.name}_{VALIDATION}" for task in asked if task.validation == limit]
        files = [str(places.tasks() / f"{name}.yaml") for name in names]
        scores += [score.value for score in evaluate_model(model, base, files, limit, output).values()]
    return mean(scores)


@contextmanager
def reading_all_text(places: Places, model: Path, name: str) -> Iterator[Path]:
    """Yields the base or a specialist with all modalities that the specialists read as text, cut off as theirs are.

    Of others, it reads the whole item as text.
    """
    with scratch_folder(places.scratch("reading", name)) as folder:
        folder.mkdir()
        for entry in model.iterdir():
            if entry.is_file():
                (folder / entry.name).symlink_to(entry)
        if (model / MODALITIES_FOLDER).exists():
            shutil.copytree(model / MODALITIES_FOLDER, folder / MODALITIES_FOLDER)
        for modality, encoding in encodings().items():
            place = folder / MODALITIES_FOLDER / modality
            if isinstance(encoding, TextModality) and not place.exists():
                save_modality(encoding, place)
        yield folder


def score_on_test(places: Places, model: Path, base: Path, output: Path, control: bool) -> None:
    """Evaluate a model on the test data of all tasks.

    Args:
        control: also ask with shuffled partners.
    """
    asked = [(task.name, task.test) for task in TASKS]
    if control:
        controls = [task for task in TASKS if task.control]
        asked += [(str(places.tasks() / f"{task.name}_{SHUFFLED}.yaml"), task.test) for task in controls]
    for limit in sorted({limit for _, limit in asked}):
        evaluate_model(model, base, [name for name, own in asked if own == limit], limit, output)


def score_probe_size(places: Places, base: Path, seed: int, row: Row, variant: str, samples: int) -> None:
    """Evaluate a row's setting with another size of the probe on validation data."""
    output = places.probe_size(row.name, samples)
    with merged(places, base, seed, row, variant, samples=samples) as (model, seconds):
        score = score_on_validation(places, model, base, output)
    write_whole(output / CHOICE_FILE, json.dumps({"scores": {variant: score}, "seconds": round(seconds, 1)}) + "\n")


def choose(places: Places, base: Path, row: Row) -> None:
    """Evaluate all settings of a row on validation data and write down which is best; the first of equals.

    What embeddings alone tell of them is written down too, and decides nothing.
    """
    meter = GapMeter(places, base, row.chosen_on)
    with merged_in_all_ways(places, base, row.chosen_on, row) as models:
        gaps = {name: meter(model) for name, model in models.items()}
        merged_from = read_inputs(next(iter(models.values())))
        scores = {
            name: score_on_validation(places, model, base, places.validation(row.name, name))
            for name, model in models.items()
        }
    chosen = max(scores, key=scores.__getitem__)
    content = json.dumps({"chosen": chosen, "scores": scores, "gaps": gaps, "inputs": merged_from}, indent=2) + "\n"
    write_whole(places.validation(row.name) / CHOICE_FILE, content)


def read_inputs(merged: Path) -> dict[str, Any]:
    """What a merged model was made from, as its record has it."""
    record: dict[str, Any] = yaml.safe_load((merged / RECORD_FILE).read_text(encoding="utf-8"))["inputs"]
    return record


def chosen_variant(places: Places, row: Row) -> str:
    """The setting that was settled before, that validation data chose, or the only one."""
    if row.settled is not None:
        return row.settled
    if len(row.variants) == 1:
        return next(iter(row.variants))
    found: str = read_json(places.validation(row.name) / CHOICE_FILE)["chosen"]
    return found


def score_row(places: Places, base: Path, seed: int, row: Row, variant: str, output: Path, control: bool) -> None:
    """Merge as a row's setting says and evaluate the result on test data; what it was made from stands beside."""
    with merged(places, base, seed, row, variant) as (model, seconds):
        score_on_test(places, model, base, output, control)
        for name in (RECORD_FILE, COEFFICIENTS_FILE):
            shutil.copyfile(model / name, output / name)
    write_whole(output / MERGE_FILE, json.dumps({"variant": variant, "seconds": round(seconds, 1)}) + "\n")
