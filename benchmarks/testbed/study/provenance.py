"""What the study's results were made from, and how long it took: read from the records beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.results_table import markdown_table
from benchmarks.testbed.study.jobs import DONE_FILE
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import ROWS, VARIATIONS
from benchmarks.testbed.study.scoring import CHOICE_FILE, MERGE_FILE, chosen_variant, read_inputs
from benchmarks.testbed.study.specialists import TRAININGS
from esmerge.errors import InputError
from esmerge.results import RECORD_FILE
from esmerge.sources import read_json
from lightning_modules.evaluation_results import RESULTS_FOLDER, read_results

# Of hashes, as many characters as tell them apart.
_SHOWN = 12


def data_table(places: Places) -> str:
    """Of every task that was asked: how many samples of which data.

    Raises:
        InputError: if results of one task are of different data.
    """
    asked: dict[str, tuple[tuple[str, ...], Path]] = {}
    for file, result in _results(places):
        run = result["run"]
        own = (f"{result['task']['version']}", f"{result['samples']}", _short(run["samples"]))
        known, other = asked.setdefault(result["task"]["name"], (own, file))
        if known != own:
            raise InputError(
                f"{file}: {result['task']['name']} was asked with other data than in {other}; delete what is older "
                "and run the study again."
            )
    rows = [[f"`{name}`", *own] for name, (own, _) in sorted(asked.items())]
    return markdown_table(["task", "version", "samples", "hash of ids, answers and groups"], rows)


def trainings_table(places: Places) -> str:
    """Of every model that was trained: its weights, steps and minutes."""
    rows = []
    for seed in TRAININGS:
        for file in sorted(places.training(seed, "any").parent.glob("*.yaml"), key=_place):
            record = yaml.safe_load(file.read_text(encoding="utf-8"))
            samples = ", ".join(f"{task} {count}" for task, count in record["samples"].items())
            recipe = record["recipe"]
            how = f"{recipe['epochs']} x {samples}"
            rows.append([file.stem, f"{seed}", how, f"{record['steps']}", f"{record['seconds'] / 60:.0f}"])
    return markdown_table(["model", "seed", "epochs x samples", "steps", "minutes"], rows)


def check_specialists(places: Places) -> None:
    """Raise `InputError` if results of one seed are of different trainings of its specialists."""
    for seed in TRAININGS:
        known: dict[str, tuple[str, Path]] = {}
        for file, hashes in _made_of(places, seed):
            for name, digest in hashes.items():
                first, other = known.setdefault(name, (digest, file))
                if digest != first:
                    raise InputError(
                        f"{file}: its {name} specialist is not that of {other}; delete what is older and run the "
                        "study again."
                    )


def _made_of(places: Places, seed: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """Of the results with the specialists of a seed, the file that says so, and the hashes of the specialists."""

    def of_merge(inputs: dict[str, Any]) -> dict[str, str]:
        return {name: inputs["specialists"][name]["hash"] for name in MODALITIES}

    tests = places.test(seed, "any").parent
    for file in sorted(tests.glob(f"*/{RECORD_FILE}")):
        yield file, of_merge(read_inputs(file.parent))
    for own in (*ROWS, *VARIATIONS):
        file = places.validation(own.name) / CHOICE_FILE
        if own.chosen_on == seed and file.exists():
            yield file, of_merge(read_json(file)["inputs"])
    for file in sorted(tests.glob(f"*/{DONE_FILE}")):
        if file.stat().st_size:  # of the first results, nothing was written down
            yield file, read_json(file)["specialists"]


def check_settings(places: Places) -> None:
    """Raise `InputError` if test data was asked of a setting that is not the one that validation data chose."""
    for own in ROWS:
        for seed in TRAININGS:
            file = places.test(seed, own.name) / MERGE_FILE
            if not file.exists() or (
                len(own.variants) > 1 and not (places.validation(own.name) / CHOICE_FILE).exists()
            ):
                continue
            tested, chosen = read_json(file)["variant"], chosen_variant(places, own)
            if tested != chosen:
                raise InputError(
                    f"{file}: what was tested is {tested}, what was chosen {chosen}; delete the file and run the study "
                    "again."
                )


def versions_sentence(places: Places) -> str:
    """The versions of all packages that wrote results, the base's hash, and how long evaluating took."""
    versions: dict[str, set[str]] = {}
    bases = set()
    seconds = 0.0
    for _, result in _results(places):
        for package, version in result["versions"].items():
            versions.setdefault(package, set()).add(version)
        if "base" in result["model"]:  # a merged model has it in itself
            bases.add(_short(result["model"]["base"]["hash"]))
        seconds += result["seconds"]
    shown = ", ".join(f"{package} {' and '.join(sorted(own))}" for package, own in versions.items())
    base = f"Base {' and '.join(sorted(bases))}; " if bases else ""
    return f"{base}{shown}. Evaluating took {seconds / 3600:.1f} hours."


def _results(places: Places) -> Iterator[tuple[Path, dict[str, Any]]]:
    for part in ("test", "validation", "probe sizes"):
        for file in sorted((places.root / part).glob(f"**/{RESULTS_FOLDER}/*.json")):
            yield file, read_results(file)


def _place(file: Path) -> tuple[int, str]:
    name = file.stem
    order: list[str] = list(MODALITIES)
    return (order.index(name) if name in order else len(order)), name


def _short(digest: str) -> str:
    return digest.partition(":")[2][:_SHOWN]
