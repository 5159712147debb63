"""The demo: merges the specialists that come with the testbed, evaluates, and asks."""

import pytest

from benchmarks.testbed import demo
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.results_table import TaskScore, results_table
from esmerge.errors import InputError
from esmerge.recipe import load_recipe


def test_table_names_metrics_and_numbers_of_samples():
    scores = {
        "base": {
            "barrier": TaskScore("auroc", 0.5, 0.45, 0.55, 200),
            "tissue": TaskScore("accuracy", 0.1, 0.06, 0.14, 190),
        },
        "ES-Merging": {
            "barrier": TaskScore("auroc", 0.75, 0.7, 0.8, 200),
            "tissue": TaskScore("accuracy", 0.25, 0.2, 0.3, 190),
        },
    }
    assert results_table(scores).splitlines() == [
        "| model      | barrier (AUROC, n = 200) | tissue (accuracy, n = 190) | mean  |",
        "| ---------- | -----------------------: | -------------------------: | ----: |",
        "| base       | 0.500 [0.45, 0.55]       | 0.100 [0.06, 0.14]         | 0.300 |",
        "| ES-Merging | 0.750 [0.70, 0.80]       | 0.250 [0.20, 0.30]         | 0.500 |",
    ]


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
