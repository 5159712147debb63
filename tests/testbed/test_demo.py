import dataclasses

import pytest

from benchmarks.testbed import demo
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.evaluate import Score
from benchmarks.testbed.results_table import read_results, results_table, write_results
from benchmarks.testbed.train import PLANS, fingerprint
from esmerge.errors import InputError
from esmerge.recipe import load_recipe

RESULTS = {
    "base": {"barrier": Score("AUROC", 0.5, 200), "tissue": Score("accuracy", 0.1, 190)},
    "ES-Merging": {"barrier": Score("AUROC", 0.75, 200), "tissue": Score("accuracy", 0.25, 190)},
}


def test_table_names_metrics_and_numbers_of_samples():
    assert results_table(RESULTS).splitlines() == [
        "| model      | barrier (AUROC, n = 200) | tissue (accuracy, n = 190) | mean  |",
        "| ---------- | -----------------------: | -------------------------: | ----: |",
        "| base       | 0.500                    | 0.100                      | 0.300 |",
        "| ES-Merging | 0.750                    | 0.250                      | 0.500 |",
    ]


def test_results_are_read_as_they_were_written(tmp_path):
    write_results(RESULTS, tmp_path)
    assert read_results(tmp_path) == RESULTS
    assert (tmp_path / "demo.md").read_text() == results_table(RESULTS) + "\n"


def test_recipes_are_valid_and_their_probe_is_held_out(tmp_path):
    demo._write_probe(tmp_path)
    specialists = {modality: tmp_path / modality for modality in MODALITIES}
    for folder in (tmp_path / "base", *specialists.values()):
        folder.mkdir()
    for name, _, coefficients in demo.MERGES:
        load_recipe(demo._write_recipe(tmp_path / f"{name}.yaml", tmp_path / "base", specialists, coefficients))
    for modality in MODALITIES:
        items = (tmp_path / f"{modality}.txt").read_text().splitlines()
        assert len(set(items)) == demo.PROBE_SAMPLES
        for split in ("train", "test"):
            assert not set(items) & {example.item for example in load_task(modality).examples[split]}


def test_a_former_demo_is_replaced(tmp_path):
    output = tmp_path / "demo"
    for _ in range(2):
        with demo._demo_folder(output):
            assert not list(output.iterdir())
            (output / "demo.md").write_text("a table")
    assert (output / "demo.md").exists()


def test_a_failed_demo_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), demo._demo_folder(tmp_path / "demo"):
        (tmp_path / "demo" / "es.yaml").write_text("base: ")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_other_peoples_files_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds thesis\.tex, which no demo wrote"), demo._demo_folder(tmp_path):
        pass
    with pytest.raises(InputError, match="is a file"), demo._demo_folder(tmp_path / "thesis.tex"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_another_plan_is_another_specialist():
    plan = PLANS["molecule"]
    changed = [dataclasses.replace(plan, **{field.name: 99}) for field in dataclasses.fields(plan)]
    assert len({fingerprint(plan), *map(fingerprint, changed)}) == 1 + len(changed)
