"""The study as jobs: each leaves one result that is kept, and says which others it needs."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.testbed.data import MODALITIES, Modality
from benchmarks.testbed.study.merges import merged
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import (
    CHOOSING_SEED,
    MATCHING,
    MERGED_LAYERS,
    PUBLISHED,
    PUBLISHED_VARIANT,
    REGMEAN_OWN_PROMPTS,
    ROWS,
    VARIATIONS,
    Row,
    row,
)
from benchmarks.testbed.study.scoring import (
    CHOICE_FILE,
    DEVELOPED_ON,
    MERGE_FILE,
    choose,
    chosen_variant,
    reading_all_text,
    score_on_test,
    score_probe_size,
    score_row,
)
from benchmarks.testbed.study.specialists import (
    RANK,
    SEEDS,
    TUNED_SEEDS,
    joint_recipe,
    training_recipe,
    tuning_recipe,
    write_recipe,
    write_untrained,
)
from esmerge.results import write_whole
from esmerge.sources import checkpoint_hash
from lightning_modules.finetune import RECORD, finetune
from lightning_modules.finetune_recipe import load_finetuning_recipe
from lightning_modules.running import Devices

# Stands beside results of all tasks.
DONE_FILE = "done"
BASE, JOINT, TUNED, AS_PUBLISHED = "base", "joint", "tuned", "published"
# Whether a row composes what it knows about both partners is asked of these.
_CONTROLLED = ("uniform", "tsv", "es_both_factors", REGMEAN_OWN_PROMPTS, *MATCHING)
# Compared with what was trained further, so they have a result wherever that has one.
_BESIDE_TUNED = ("es_element", MERGED_LAYERS, REGMEAN_OWN_PROMPTS)

PROBE_SIZES = (8, 32, 100, 330)
# A training of which nothing was chosen.
PROBE_SIZE_SEED = next(seed for seed in SEEDS if seed not in DEVELOPED_ON)
MEASURED_BY_PROBE_SIZE = {PUBLISHED: PUBLISHED_VARIANT, MERGED_LAYERS: "shrink_0.9-lambda_1.25"}


@dataclass(frozen=True)
class Job:
    """A piece of work in a process of its own.

    Attributes:
        name: what it makes.
        result: the file or folder that is there when it is done.
        run: does it.
        needs: names of the jobs whose results it takes.
        record: of what was made, if there is one; once it is there, the result has to be there only for others.
    """

    name: str
    result: Path
    run: Callable[[], None]
    needs: tuple[str, ...] = ()
    record: Path | None = None


def unfinished(jobs: dict[str, Job]) -> dict[str, Job]:
    """The jobs that are to be run, in their order, which puts what is needed first."""
    found: dict[str, Job] = {}
    for name, job in reversed(jobs.items()):
        there = job.result.exists()
        if job.record is not None:
            needed = any(name in other.needs for other in found.values())
            there = job.record.exists() and (there or not needed)
        if not there:
            found[name] = job
    return dict(reversed(found.items()))


def all_jobs(places: Places, base: Path) -> dict[str, Job]:
    """All jobs by name, in the order in which they are best done: what one seed tells comes before the next seed."""
    jobs: list[Job] = []
    # That of which settings are chosen comes first, then what nothing was developed on.
    order = sorted(SEEDS, key=lambda own: (own != CHOOSING_SEED, own in DEVELOPED_ON))
    for seed in order:
        jobs += _choices(places, base, seed)
    for seed in order:
        jobs += _of_seed(places, base, seed)
    jobs += _probe_sizes(places, base)
    for seed in TUNED_SEEDS:
        if seed not in SEEDS:
            jobs += _beside_tuned(places, base, seed)
    for seed in SEEDS:
        jobs += _joint(places, base, seed)
    return {job.name: job for job in jobs}


def _trainings(places: Places, base: Path, seed: int) -> list[Job]:
    return [_training(places, base, seed, modality) for modality in MODALITIES]


def _choices(places: Places, base: Path, seed: int) -> list[Job]:
    """What is chosen with the specialists of a training, before test data is asked of anything."""
    trained = _trainings(places, base, seed)
    needs = tuple(job.name for job in trained)
    kinds = [("choice", own) for own in ROWS if len(own.variants) > 1] + [("variation", own) for own in VARIATIONS]
    choices = [_choice(places, base, own, kind, needs) for kind, own in kinds if own.chosen_on == seed]
    return trained + choices if choices else []


def _of_seed(places: Places, base: Path, seed: int) -> list[Job]:
    trained = _trainings(places, base, seed)
    specialists = tuple(job.name for job in trained)
    jobs = trained
    if seed == CHOOSING_SEED:
        jobs.append(_test(places, base, BASE, places.test(seed, BASE), ()))
    jobs += _tests_of_specialists(places, base, seed)
    for own in ROWS:
        needs = (*specialists, f"choice/{own.name}") if len(own.variants) > 1 else specialists
        jobs.append(_test_of_row(places, base, seed, own.name, None, own.name, needs))
    jobs.append(_test_of_row(places, base, seed, PUBLISHED, PUBLISHED_VARIANT, AS_PUBLISHED, specialists))
    if seed in TUNED_SEEDS:
        jobs += _tuned(places, base, seed, specialists)
    return jobs


def _beside_tuned(places: Places, base: Path, seed: int) -> list[Job]:
    """Of a training that is there for what is trained further: that, and what it is compared with."""
    trained = _trainings(places, base, seed)
    specialists = tuple(job.name for job in trained)
    tested = [
        _test_of_row(places, base, seed, name, None, name, (*specialists, f"choice/{name}"), controlled=False)
        for name in _BESIDE_TUNED
    ]
    published = _test_of_row(places, base, seed, PUBLISHED, PUBLISHED_VARIANT, AS_PUBLISHED, specialists)
    tuned = _tuned(places, base, seed, specialists)
    return [*trained, *_tests_of_specialists(places, base, seed), *tuned, *tested, published]


def _tests_of_specialists(places: Places, base: Path, seed: int) -> list[Job]:
    return [_test_of_trained(places, base, seed, name, (f"{name}-{seed}",), (name,)) for name in MODALITIES]


def _choice(places: Places, base: Path, own: Row, kind: str, needs: tuple[str, ...]) -> Job:
    return Job(
        f"{kind}/{own.name}", places.validation(own.name) / CHOICE_FILE, partial(choose, places, base, own), needs
    )


def _test_of_row(
    places: Places,
    base: Path,
    seed: int,
    name: str,
    variant: str | None,
    output: str,
    needs: tuple[str, ...],
    controlled: bool = True,
) -> Job:
    own = row(name)
    control = controlled and output in _CONTROLLED

    def run() -> None:
        chosen = variant or chosen_variant(places, own)
        score_row(places, base, seed, own, chosen, places.test(seed, output), control)

    return Job(f"test/{seed}/{output}", places.test(seed, output) / MERGE_FILE, run, needs)


def _test(
    places: Places,
    model: Path,
    name: str,
    output: Path,
    needs: tuple[str, ...],
    base: Path | None = None,
    made_of: Mapping[str, Path] | None = None,
) -> Job:
    """Of a model that is no merge of a row; which specialists it is made of is written down beside its results."""

    def run() -> None:
        hashes = {modality: checkpoint_hash(folder) for modality, folder in (made_of or {}).items()}
        with reading_all_text(places, model, name.replace("/", "-")) as reader:
            score_on_test(places, reader, base or reader, output, control=False)
        write_whole(output / DONE_FILE, json.dumps({"specialists": hashes}) + "\n")

    return Job(f"test/{name}", output / DONE_FILE, run, needs)


def _test_of_trained(
    places: Places, base: Path, seed: int, name: str, needs: tuple[str, ...], made_of: Collection[str]
) -> Job:
    folders = {modality: places.model(seed, modality) for modality in made_of}
    model, output = places.model(seed, name), places.test(seed, name)
    return _test(places, model, f"{seed}/{name}", output, needs, base, folders)


def _training(places: Places, base: Path, seed: int, modality: Modality) -> Job:
    def run() -> None:
        untrained = places.untrained(seed, modality)
        if not untrained.exists():
            write_untrained(base, (modality,), seed, untrained)
        _train(places, seed, modality, training_recipe(base, modality, seed, untrained))

    return Job(f"{modality}-{seed}", places.model(seed, modality), run, record=places.training(seed, modality))


def _joint(places: Places, base: Path, seed: int) -> list[Job]:
    """Of the rank of a merge that loses nothing."""

    def run() -> None:
        untrained = places.untrained(seed, JOINT)
        if not untrained.exists():
            write_untrained(base, MODALITIES, seed, untrained, RANK * len(MODALITIES))
        _train(places, seed, JOINT, joint_recipe(base, seed, untrained))

    return _trained_model(places, base, seed, JOINT, run, ())


def _tuned(places: Places, base: Path, seed: int, specialists: tuple[str, ...]) -> list[Job]:
    def run() -> None:
        start = places.untrained(seed, TUNED)
        if not start.exists():
            output = {"format": "adapter", "rank": RANK * len(MODALITIES)}
            with merged(places, base, seed, row("uniform"), "only", output) as (model, _):
                start.parent.mkdir(parents=True, exist_ok=True)
                model.rename(start)
        _train(places, seed, TUNED, tuning_recipe(base, seed, start))

    return _trained_model(places, base, seed, TUNED, run, specialists)


def _trained_model(
    places: Places, base: Path, seed: int, name: str, train: Callable[[], None], specialists: tuple[str, ...]
) -> list[Job]:
    return [
        Job(f"{name}-{seed}", places.model(seed, name), train, specialists, places.training(seed, name)),
        _test_of_trained(places, base, seed, name, (f"{name}-{seed}",), MODALITIES if specialists else ()),
    ]


def _probe_sizes(places: Places, base: Path) -> list[Job]:
    jobs = []
    for name, variant in MEASURED_BY_PROBE_SIZE.items():
        for samples in PROBE_SIZES:
            file = places.probe_size(name, samples) / CHOICE_FILE
            run = partial(score_probe_size, places, base, PROBE_SIZE_SEED, row(name), variant, samples)
            needs = tuple(f"{modality}-{PROBE_SIZE_SEED}" for modality in MODALITIES)
            jobs.append(Job(f"probe-size/{name}/{samples}", file, run, needs))
    return jobs


def _train(places: Places, seed: int, name: str, recipe: dict[str, Any]) -> None:
    file, model, record = places.recipe(seed, name), places.model(seed, name), places.training(seed, name)
    write_recipe(recipe, file)
    if not model.exists():
        finetune(load_finetuning_recipe(file), model, Devices(), resume=True, progress=False)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(record, (model / RECORD).read_text(encoding="utf-8"))
