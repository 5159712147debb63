"""Merging the study's specialists: the probe, the recipe, and every setting of a row."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.testbed.cache import building
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.demo import PROBE_TEMPLATE
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import Row, Variant
from benchmarks.testbed.study.specialists import own_prompts
from esmerge.pipeline import compare, merge
from esmerge.recipe import Recipe

PROBE_SAMPLES = 32


def write_probe(folder: Path, first: int, samples: int) -> None:
    """Items that the specialists were trained on: a probe needs no labels, and held-out data stays untouched."""
    with building(folder) as temporary:
        for modality in MODALITIES:
            items = [example.item for example in load_task(modality).examples["train"][first : first + samples]]
            (temporary / f"{modality}.txt").write_text("\n".join(items) + "\n", encoding="utf-8")


def recipe_of(
    places: Places,
    base: Path,
    seed: int,
    row: Row,
    variant: Variant,
    output: Mapping[str, Any],
    samples: int,
    first: int = 0,
) -> Recipe:
    """The recipe of a row's setting, with a probe of `samples` training items from number `first` on."""
    fields: dict[str, Any] = {
        "base": str(base),
        "specialists": {modality: {"model": str(places.model(seed, modality))} for modality in MODALITIES},
        "space": row.space,
        "output": dict(output),
        "seed": seed,
        **variant,
    }
    if row.probed:
        probe = places.probe(first, samples)
        if not probe.exists():
            write_probe(probe, first, samples)
        data = {modality: str(probe / f"{modality}.txt") for modality in MODALITIES}
        template = own_prompts() if row.own_prompts else PROBE_TEMPLATE
        fields["probe"] = {"samples": samples, "template": template, "data": data}
    return Recipe.model_validate(fields)


# Whole in float32, so that neither a rank nor rounding takes anything from a method.
EXACT = {"format": "full", "dtype": "float32"}


@contextmanager
def merged_in_all_ways(
    places: Places, base: Path, seed: int, row: Row, samples: int = PROBE_SAMPLES
) -> Iterator[dict[str, Path]]:
    """Yields the merged models of a row's settings by name, which are gone afterwards."""
    # What signals are measured with is the same for all that are merged together.
    together: dict[tuple[Any, ...], dict[str, Variant]] = {}
    for name, variant in row.variants.items():
        fields = variant["coefficients"] if isinstance(variant["coefficients"], dict) else {}
        together.setdefault((fields.get("distance"), fields.get("tokens")), {})[name] = variant
    with scratch_folder(places.scratch(row.name, seed)) as folder:
        folder.mkdir()
        found: dict[str, Path] = {}
        for number, variants in enumerate(together.values()):
            recipe = recipe_of(places, base, seed, row, next(iter(variants.values())), EXACT, samples)
            compare(recipe, variants, folder / str(number), progress=False)
            found |= {name: folder / str(number) / name for name in variants}
        yield found


@contextmanager
def merged(
    places: Places,
    base: Path,
    seed: int,
    row: Row,
    variant: str,
    output: Mapping[str, Any] = EXACT,
    samples: int = PROBE_SAMPLES,
) -> Iterator[tuple[Path, float]]:
    """Yields one merged model, which is gone afterwards, and how many seconds merging took."""
    recipe = recipe_of(places, base, seed, row, row.variants[variant], output, samples)
    with scratch_folder(places.scratch(row.name, seed, variant, samples)) as folder:
        started = time.perf_counter()
        merge(recipe, folder, progress=False)
        yield folder, time.perf_counter() - started


def remove_abandoned(places: Places) -> None:
    """Remove what killed processes left."""
    for folder in places.scratch().glob("[0-9]*"):
        try:
            os.kill(int(folder.name), 0)
        except ProcessLookupError:
            shutil.rmtree(folder)
        except PermissionError:
            continue  # of someone else, so it is running


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder of this process that does not exist, and does not exist afterwards either."""
    own = folder.parent / str(os.getpid())
    own.mkdir(parents=True)
    try:
        yield own / folder.name
    finally:
        shutil.rmtree(own)
