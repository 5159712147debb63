"""Scores of the specialists, and the table of the testbed's README."""

import json

import pytest

from benchmarks.testbed.report import BEGIN, END, README, evaluate_model, score_of_first, specialists_table, write_table
from benchmarks.testbed.specialists import TASKS


def test_scores_of_the_first_samples_are_those_of_an_evaluation_of_these(llama, trained, tmp_path):
    """With an encoder for molecules only, so that everything else is text."""
    evaluate_model(trained / "molecule", llama / "base", list(TASKS.values()), 24, tmp_path / "all")
    some = evaluate_model(trained / "molecule", llama / "base", list(TASKS.values()), 10, tmp_path / "some")
    assert list(some) == list(TASKS.values())
    for task, score in some.items():
        first = score_of_first(10, tmp_path / "all", task)
        assert (first.metric, first.samples) == (score.metric, 10)
        # Other batches round the likelihoods differently, which may swap two samples.
        assert first.value == pytest.approx(score.value, abs=0.05)
        found = json.loads((tmp_path / "some" / "results" / f"{task}.json").read_text())
        assert found["items"] == {"b3db": {"molecule": "encoder"}}.get(task, {next(iter(found["items"])): "text"})


def test_the_table_names_samples_scores_and_sizes(trained, tmp_path):
    score = {"metric": "auroc", "value": 0.875, "low": 0.85, "high": 0.9, "samples": 748}
    base = {**score, "value": 0.5, "low": 0.45, "high": 0.55}
    own = dict.fromkeys(TASKS.values(), score)
    scores = {"test": {"base": dict.fromkeys(TASKS.values(), base), **dict.fromkeys(TASKS, own)}}
    for modality in TASKS:
        (tmp_path / modality).symlink_to(trained / modality)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    rows = specialists_table(tmp_path).splitlines()[2:]
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert cells[:6] == [
        "molecule",
        "`b3db`",
        "fingerprint",
        "16 / 4 / 4",
        "AUROC 0.875 [0.85, 0.90]",
        "0.500 [0.45, 0.55]",
    ]
    weights = [trained / "molecule" / name for name in ("adapter_model", "modalities/molecule/model")]
    size = sum(file.with_suffix(".safetensors").stat().st_size for file in weights)
    assert cells[6] == f"{size / 1e6:.1f} MB"
    assert cells[7] == "0 min"


def test_only_the_table_of_a_readme_is_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for table in ("| new |", "| newer |"):
        write_table(table, readme)
        assert readme.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"


def test_the_readme_has_the_table_of_the_specialists_that_come_with_it():
    assert f"{BEGIN}\n{specialists_table()}\n{END}" in README.read_text()
