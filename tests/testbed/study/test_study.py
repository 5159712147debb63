"""The study: its rows and jobs, and all stages on a tiny base."""

import itertools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study import (
    archive,
    embeddings,
    jobs,
    merges,
    page,
    results,
    rows,
    scoring,
    specialists,
    table_rows,
    tasks,
)
from benchmarks.testbed.study.__main__ import _with_needs, run_all
from benchmarks.testbed.study.jobs import Job, all_jobs
from benchmarks.testbed.study.merges import EXACT, recipe_of
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import BUDGET, PUBLISHED, PUBLISHED_VARIANT, ROWS, row
from esmerge.errors import InputError
from esmerge.methods import METHODS
from esmerge.mllm.loading import load_model
from lightning_modules.finetune_recipe import FinetuningRecipe

CHOSEN_ON = rows.CHOOSING_SEED


@pytest.fixture
def places(trained, tmp_path):
    for seed, modality in itertools.product(specialists.TRAININGS, MODALITIES):
        link = Places(tmp_path).model(seed, modality)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(trained / modality)
    return Places(tmp_path)


@pytest.fixture
def few_samples(monkeypatch):
    few = tuple(replace(task, test=4, validation=min(task.validation, 4)) for task in tasks.TASKS)
    for module in (page, results, scoring, tasks):
        monkeypatch.setattr(module, "TASKS", few)


@pytest.mark.parametrize("own", [*ROWS, *rows.VARIATIONS], ids=lambda own: own.name)
def test_every_setting_of_a_row_is_a_recipe_and_none_has_more_than_the_others_may(own, places):
    assert 1 <= len(own.variants) <= BUDGET
    made = [recipe_of(places, Path("base"), 42, own, variant, EXACT, 4) for variant in own.variants.values()]
    described = [recipe.model_dump_json() for recipe in made]
    assert len(set(described)) == len(described)
    assert own.settled is None or own.settled in own.variants
    assert own.probed == any(recipe.needs_probe for recipe in made)
    for recipe in made:
        assert recipe.method.name in METHODS


def test_the_published_procedure_is_the_default_one_in_factors(places):
    own = row(PUBLISHED)
    recipe = recipe_of(places, Path("base"), 42, own, own.variants[PUBLISHED_VARIANT], EXACT, 4)
    assert recipe.space == "factors" and recipe.method.name == "linear"
    plain = {"from": "embedding_signals", "granularity": "both"}
    default = recipe_of(places, Path("base"), 42, own, {"method": "linear", "coefficients": plain}, EXACT, 4)
    assert recipe.coefficients == default.coefficients


def test_jobs_need_only_earlier_ones_and_each_has_its_own_result(tmp_path):
    made = all_jobs(Places(tmp_path), tmp_path)
    seen = set()
    for name, job in made.items():
        assert set(job.needs) <= seen, name
        seen.add(name)
    assert len({job.result for job in made.values()}) == len(made)
    # What stands in for a training's specialists ranks no merges.
    assert sum(name.startswith("tuned-") for name in made) == len(specialists.SEEDS) == 3
    (stand_in,) = set(specialists.TUNED_SEEDS) - set(specialists.SEEDS)
    assert f"test/{stand_in}/tuned" in made and f"test/{stand_in}/ties" not in made
    only = _with_needs(made, [f"test/{CHOSEN_ON}/ties"])
    assert set(only) == {*(f"{name}-{CHOSEN_ON}" for name in MODALITIES), "choice/ties", f"test/{CHOSEN_ON}/ties"}


def test_jobs_wait_for_what_they_need_and_a_failure_stops_the_rest(tmp_path):
    def job(name, *needs):
        return Job(name, tmp_path / name, lambda: None, needs)

    made = {own.name: own for own in (job("a"), job("b", "a"), job("c", "b"), job("d", "c"))}
    (tmp_path / "a").mkdir()
    ran = []
    assert run_all(made, lambda name: not ran.append(name), workers=2) is None
    assert ran == ["b", "c", "d"]
    ran.clear()
    assert run_all(made, lambda name: ran.append(name) or name != "c", workers=2) == "c"
    assert ran == ["b", "c"]


def test_models_are_trained_again_only_for_what_is_missing(tmp_path):
    """Of results that were unpacked there are records, but no models."""

    def job(name, *needs, record=None):
        return Job(name, tmp_path / name, lambda: None, needs, record and tmp_path / record)

    made = {own.name: own for own in (job("model", record="record"), job("row", "model"), job("other", "model"))}
    assert list(jobs.unfinished(made)) == ["model", "row", "other"]
    for name in ("record", "row"):
        (tmp_path / name).mkdir()
    assert list(jobs.unfinished(made)) == ["model", "other"]
    (tmp_path / "other").mkdir()
    assert jobs.unfinished(made) == {}
    (tmp_path / "record").rmdir()
    (tmp_path / "model").mkdir()
    assert list(jobs.unfinished(made)) == ["model"]


def test_recipes_of_trainings_are_valid(tmp_path):
    for modality in MODALITIES:
        FinetuningRecipe.model_validate(specialists.training_recipe(tmp_path, modality, 42, tmp_path))
    joint = FinetuningRecipe.model_validate(specialists.joint_recipe(tmp_path, 42, tmp_path))
    tuned = FinetuningRecipe.model_validate(specialists.tuning_recipe(tmp_path, 42, tmp_path))
    assert joint.tasks == tuned.tasks and joint.train_encoders and not tuned.train_encoders


def test_an_untrained_specialist_is_the_base_with_encoders_that_depend_on_the_seed(llama, tmp_path):
    for seed in (1, 1, 2):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}-{seed}"
        specialists.write_untrained(llama / "base", MODALITIES, seed, folder)
    one, again, other = sorted(tmp_path.iterdir())
    for file in ("adapter_model.safetensors", "modalities/molecule/model.safetensors"):
        assert (one / file).read_bytes() == (again / file).read_bytes() != (other / file).read_bytes()
    model, processor = load_model(one, llama / "base", torch.float32)
    plain, _ = load_model(llama / "base", dtype=torch.float32)
    assert set(model.encoders) == {"molecule"} and set(processor.modalities) == set(MODALITIES)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**ids).logits, plain(**ids).logits)


def test_all_stages_on_a_tiny_base(llama, places, few_samples, tmp_path, monkeypatch):
    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft tokens"))
    monkeypatch.setattr("benchmarks.testbed.study.merges.PROBE_SAMPLES", 3)
    seed, base = CHOSEN_ON, llama / "base"
    made = all_jobs(places, base)
    tasks.write_tasks(places.tasks())
    done = [
        "test/base",
        "choice/embedding_matching",
        f"test/{CHOSEN_ON}/embedding_matching",
        f"test/{CHOSEN_ON}/uniform",
        f"test/{CHOSEN_ON}/published",
    ]
    done += [f"test/{CHOSEN_ON}/{modality}" for modality in MODALITIES]
    for name in done:
        made[name].run()
        assert made[name].result.exists(), name
    probed = made["probe-size/embedding_matching_merged_layers/8"]
    probed.run()
    assert probed.result.exists()
    choice = json.loads((places.validation("embedding_matching") / scoring.CHOICE_FILE).read_text())
    assert set(choice["scores"]) == set(row("embedding_matching").variants)
    assert choice["scores"][choice["chosen"]] == max(choice["scores"].values())
    # Matching the specialists' embeddings brings the merged model nearer to them than the base is.
    assert set(choice["gaps"]) == set(choice["scores"]) and max(choice["gaps"].values()) < 1
    record = (places.test(seed, "embedding_matching") / "esmerge.yaml").read_text()
    assert "name: embedding_matching" in record
    # Of merged models only results are left.
    left = {entry.name for entry in tmp_path.iterdir()}
    assert not list((tmp_path / "scratch").iterdir())
    assert left == {
        "scratch",
        *(f"seed-{own}" for own in specialists.TRAININGS),
        "tasks",
        "probes",
        "validation",
        "test",
        "probe sizes",
        "soft tokens",
    }

    readme = tmp_path / "README.md"
    readme.write_text("\n".join(("before", *page.CONCLUSION, *page.RESULTS, "after", "")))
    page.page(places, readme, tmp_path / "figures")
    lines = readme.read_text().splitlines()
    found = results.gather(places, list(table_rows.TITLES), [], jobs.PROBE_SIZES)
    uniform = next(line for line in lines if line.startswith("| uniform average"))
    cells = [cell.strip() for cell in uniform.split("|")[1:-1]]
    assert cells[1] == f"{found.scores['uniform'][seed]['b3db']:.3f}" and cells[-1] == f"{seed}"
    assert cells[-2] == f"{results.overall(found.scores['uniform'][seed]):.3f}"
    ties = next(line for line in lines if line.startswith("| TIES "))
    assert {cell.strip() for cell in ties.split("|")[2:-1]} == {page.NOTHING}
    for name in ("overall", "runtime", "probe_size", "gap", "distances", "coefficients", "embeddings_cell"):
        assert (tmp_path / "figures" / f"{name}.png").exists() and f"(figures/{name}.png)" in readme.read_text()

    nearest = min(choice["gaps"], key=choice["gaps"].__getitem__)
    told = next(
        line
        for line in lines
        if line.startswith("| embedding matching, equal terms | ") and f"{choice['gaps'][nearest]:.3f}" in line
    )
    assert f"{choice['scores'][nearest] - choice['scores'][choice['chosen']]:+.3f}" in told

    record = places.training(seed, "cell")
    record.parent.mkdir(parents=True)
    told = {"samples": {"tissue": 3}, "recipe": {"epochs": 2}, "steps": 7, "seconds": 123.0}
    record.write_text(yaml.safe_dump(told))
    page.page(places, readme, tmp_path / "figures")
    assert f"| cell | {seed} | 2 x tissue 3 | 7 | 2 |" in re.sub(" +", " ", readme.read_text())

    # Packed and unpacked elsewhere, the results make the same page: no model is needed for it.
    packed = archive.pack(places, tmp_path / "packed")
    assert {file.name for file in packed} == {
        f"test-{CHOSEN_ON}.tar.xz",
        "validation.tar.xz",
        f"specialists-{archive.SPECIALISTS_SEED}.tar.xz",
    }
    before = [file.read_bytes() for file in packed]
    assert [file.read_bytes() for file in archive.pack(places, tmp_path / "packed")] == before
    elsewhere = Places(tmp_path / "of another" / "elsewhere")
    assert archive.unpack(elsewhere, tmp_path / "packed") > 0
    assert archive.unpack(elsewhere, tmp_path / "packed") == 0
    record = (elsewhere.test(seed, "embedding_matching") / "esmerge.yaml").read_text()
    # Where a result was made is not told.
    assert f"{tmp_path}" not in record and f"model: {tmp_path.name}/seed-{seed}/cell" in record
    written = readme.read_text()
    page.page(elsewhere, readme, tmp_path / "figures")
    assert readme.read_text() == written
    assert not elsewhere.model(seed, "cell").exists()
    with pytest.raises(InputError, match="has no archives of results"):
        archive.unpack(elsewhere, tmp_path)
    elsewhere.training(seed, "cell").unlink()
    with pytest.raises(InputError, match=r"has trainings/seed-\d+/cell.yaml, .* has not: unpack it first"):
        archive.pack(elsewhere, tmp_path / "packed")
    assert [file.read_bytes() for file in packed] == before

    # Nor is there a page of settings that were not chosen.
    file = places.test(seed, "embedding_matching") / scoring.MERGE_FILE
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"variant": "another"}))
    with pytest.raises(InputError, match="what was tested is another, what was chosen"):
        page.page(places, readme, tmp_path / "figures")
    file.write_text(content)

    # What was asked is told once per task, and results of other data are not mixed with it.
    asked = [line for line in lines if line.startswith("| `b3db` ")]
    file = places.test(seed, "uniform") / "results" / "b3db.json"
    result = json.loads(file.read_text())
    digest = result["run"]["samples"].partition(":")[2]
    assert len(asked) == 1 and f"| {digest[:12]} " in asked[0]
    assert any(f"torch {torch.__version__}" in line for line in lines)
    result["run"]["samples"] = "sha256:0"
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match="b3db was asked with other data"):
        page.page(places, readme, tmp_path / "figures")

    # Nor are specialists of other trainings.
    result["run"]["samples"] = f"sha256:{digest}"
    file.write_text(json.dumps(result))
    file = places.test(seed, "cell") / jobs.DONE_FILE
    content = file.read_text()
    file.write_text(content.replace("xxh3:", "xxh3:0"))
    with pytest.raises(InputError, match="/done: its cell specialist is not that of"):
        page.page(places, readme, tmp_path / "figures")
    file.write_text(content)
    page.page(places, readme, tmp_path / "figures")

    # Nor are merges of other trainings.
    file = places.test(seed, "uniform") / "esmerge.yaml"
    file.write_text(re.sub("xxh3:.", "xxh3:", file.read_text()))
    with pytest.raises(InputError, match="specialist is not that of"):
        page.page(places, readme, tmp_path / "figures")


def test_packed_specialists_name_the_base_where_they_are_unpacked(llama, tmp_path):
    before, after = Places(tmp_path / "before" / "study"), Places(tmp_path / "after" / "study")
    for name in MODALITIES:
        folder = shutil.copytree(llama / name, before.model(archive.SPECIALISTS_SEED, name))
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"{before.root.parent}/the base"
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        (folder / "logs").mkdir()
        (folder / "logs" / "metrics.csv").write_text("step\n")
    (packed,) = archive.pack(before, tmp_path / "packed")
    assert str(tmp_path).encode() not in lzma.decompress(packed.read_bytes())
    assert archive.unpack(after, tmp_path / "packed") > 0
    for name in MODALITIES:
        old, new = (places.model(archive.SPECIALISTS_SEED, name) for places in (before, after))
        assert {file.name for file in new.iterdir()} == {file.name for file in old.iterdir()} - {"logs"}
        for file in new.iterdir():
            there = (old / file.name).read_bytes()
            assert file.read_bytes() == there.replace(str(before.root.parent).encode(), str(after.root.parent).encode())


def test_base_and_specialists_read_proteins_as_far_as_the_protein_specialist_does(llama, places):
    specialist = places.model(CHOSEN_ON, "molecule")
    known = {}
    for name, model in (("base", llama / "base"), ("molecule", specialist)):
        before = sorted(model.rglob("*"))
        with scoring.reading_all_text(places, model, name) as reader:
            loaded, processor = load_model(reader, None if name == "base" else llama / "base", torch.float32)
            known[name] = set(processor.modalities)
            protein = processor.modalities["protein"]
            assert protein.render("M" * 500) == protein.render("M" * 64) and set(loaded.encoders) == known[name] & {
                "molecule"
            }
        assert sorted(model.rglob("*")) == before and not reader.exists()
    assert known == {"base": {"protein", "cell"}, "molecule": {"molecule", "protein", "cell"}}


def test_what_killed_jobs_left_is_removed_and_what_running_ones_make_is_not(places):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getpid()):
        (places.scratch() / str(process) / "merged").mkdir(parents=True)
    merges.remove_abandoned(places)
    assert [folder.name for folder in places.scratch().iterdir()] == [str(os.getpid())]


def test_partners_of_test_pairs_are_known():
    for task in tasks.CROSS:
        known = tasks.partners(task.name)
        assert known == tasks.partners(f"{task.name}_{tasks.SHUFFLED}") and len(known) >= task.test
        assert 1 < len({molecule for molecule, _ in known.values()}) < len(known)
    assert tasks.partners("b3db") == {}


def test_the_embedding_gap_is_0_of_the_specialists_and_1_of_the_base():
    random = torch.Generator().manual_seed(0)
    base, own = ({name: torch.randn(5, 4, generator=random) for name in MODALITIES} for _ in range(2))
    assert embeddings.embedding_gap(own, own, base) == 0
    assert embeddings.embedding_gap(base, own, base) == 1
    half = {name: (base[name] + own[name]) / 2 for name in MODALITIES}
    assert embeddings.embedding_gap(half, own, base) == pytest.approx(0.25)


def test_means_are_over_the_tasks_that_count():
    scores = {"b3db": 0.8, "antimicrobial": 0.6, "tissue": 0.2, "cell_sensitivity": 0.5}
    scores |= {"gdsc2_mid_potency": 0.7, "pydta": 0.6, "kiba": 0.0}
    assert results.cross(scores) == pytest.approx(0.65)
    assert results.overall(scores) == pytest.approx(3.4 / 6)
    own = {
        "molecule": {"b3db": 1.0},
        "protein": {"antimicrobial": 0.6},
        "cell": {"tissue": 0.4, "cell_sensitivity": 0.5},
    }
    assert results.preservation(scores, own) == pytest.approx((0.8 + 1 + 0.5 + 1) / 4)
    own["cell"]["cell_sensitivity"] = 0.7
    tissue = (0.2 - 1 / 14) / (0.4 - 1 / 14)
    assert results.preservation(scores, own, above_chance=True) == pytest.approx((0.6 + 1 + tissue + 0) / 4)


def test_chance_is_one_of_the_choices():
    from lightning_modules.tasks import load_task

    for task in tasks.TASKS:
        loaded = load_task(task.name)
        auroc = loaded.metrics[0] == "auroc"
        assert task.chance == (0.5 if auroc else pytest.approx(1 / len(loaded.choices))), task.name


def test_tasks_about_validation_data_differ_in_nothing_else(tmp_path):
    from lightning_modules.tasks import load_task

    tasks.write_tasks(tmp_path)
    for task in tasks.TASKS:
        plain = load_task(task.name)
        if task.validation:
            other = load_task(str(tmp_path / f"{task.name}_validation.yaml"))
            assert other.split.evaluated == "validation" and (other.prompt, other.choices) == (
                plain.prompt,
                plain.choices,
            )
        if task.control:
            other = load_task(str(tmp_path / f"{task.name}_shuffled.yaml"))
            assert other.source.testbed == f"{plain.source.testbed}_shuffled" and other.split == plain.split


def test_all_rows_that_the_study_is_to_have_are_there():
    assert {"uniform", "task_arithmetic", "ties", "dare_ties", "pcb", "tsv", "iso_c", "regmean"} <= {
        r.name for r in rows.ROWS
    }
