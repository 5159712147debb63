"""The demo: merges the specialists that come with the testbed, evaluates, and asks."""

import json

import pytest

from benchmarks.testbed import ask, demo
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.results_table import TaskScore, results_table
from benchmarks.testbed.specialists import TASKS
from esmerge.errors import InputError
from esmerge.mllm.loading import load_model
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


def test_the_demo_on_a_tiny_base(llama, trained, tmp_path, monkeypatch, capsys):
    """Everything but the base, the specialists and their scores is as it is for people."""
    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft_tokens"))
    monkeypatch.setattr(demo, "base_model_folder", lambda: llama / "base")
    monkeypatch.setattr(demo, "specialist_folders", lambda: {modality: trained / modality for modality in MODALITIES})
    known = {task: TaskScore("accuracy" if task == "tissue" else "auroc", 0.5, 0.4, 0.6, 6) for task in TASKS.values()}
    monkeypatch.setattr(demo, "read_scores", lambda split: dict.fromkeys(("base", *MODALITIES), known))
    monkeypatch.setattr(demo, "DEMO_SAMPLES", 6)
    monkeypatch.setattr(demo, "PROBE_SAMPLES", 3)
    output = tmp_path / "demo"
    demo.run_demo(output)
    shown = capsys.readouterr().out
    assert "loading back from there" in shown
    table = (output / "demo.md").read_text()
    assert table in shown
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == [
        "base",
        "molecule specialist",
        "protein specialist",
        "cell specialist",
        "uniform average",
        "ES-Merging",
        "embedding matching",
    ]
    scores = json.loads((output / "demo.json").read_text())
    assert {task: score["samples"] for task, score in scores["embedding matching"].items()} == dict.fromkeys(
        TASKS.values(), 6
    )
    assert "\nMerged model: " in shown and ask.QUESTION in shown
    for name in ("uniform", "es", "matching"):
        model, processor = load_model(output / name, llama / "base")
        assert set(model.encoders) == {"molecule", "protein"} and set(processor.modalities) == set(MODALITIES)
        results = json.loads((output / name / "results" / "b3db.json").read_text())
        assert results["items"] == {"molecule": "encoder"}
    demo.run_demo(output)  # in place of the former


def test_recipes_are_valid_and_their_probe_is_held_out(tmp_path):
    demo._write_probe(tmp_path)
    specialists = {modality: tmp_path / modality for modality in MODALITIES}
    for folder in (tmp_path / "base", *specialists.values()):
        folder.mkdir()
    for own in demo.MERGES:
        load_recipe(demo._write_recipe(tmp_path / f"{own.name}.yaml", tmp_path / "base", specialists, own))
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
