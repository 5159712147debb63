"""Tasks of one's own from files, as conversations."""

import csv
import json

import pytest
import yaml

from lightning_modules.samples import Item, Turn, load_samples
from lightning_modules.tasks import load_task

ROWS = [("CCO", "MKT", 1), ("c1ccccc1", "GSH", 0), ("CC(=O)O", "MAL", 1)]


@pytest.fixture
def content():
    """A task about molecules and proteins, as a mapping to change."""
    return {
        "name": "binding",
        "version": 1,
        "title": "Binding",
        "description": "Whether they bind.",
        "source": {"files": {"train": "train.csv", "test": "test.csv"}},
        "columns": {"molecule": "Drug", "protein": "Target"},
        "answer": "Y",
        "system": "You know proteins.",
        "prompt": "Protein: {protein}\nMolecule: {molecule}\nDo they bind?",
        "choices": ["Yes", "No"],
        "labels": {1: "Yes", 0: "No"},
        "metrics": ["accuracy"],
        "citation": "none",
        "licence": "cc0-1.0",
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes a task with its tables, rows as tuples, and returns the path of the YAML file."""

    def write(content, train=ROWS, test=ROWS, header=("Drug", "Target", "Y")):
        for name, rows in (("train", train), ("test", test)):
            with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows([header, *rows])
        file = tmp_path / f"{content['name']}.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write


def test_a_row_becomes_a_conversation_with_items_in_their_places(write, content):
    samples = load_samples(load_task(write(content)))
    assert [sample.answer for sample in samples] == [0, 1, 0]
    assert len({sample.id for sample in samples}) == 3
    question = ("Protein: ", Item("protein", "MKT"), "\nMolecule: ", Item("molecule", "CCO"), "\nDo they bind?")
    assert samples[0].turns == (Turn("system", ("You know proteins.",)), Turn("user", question))


def test_json_lines_give_the_same_as_csv(write, content, tmp_path):
    expected = load_samples(load_task(write(content)))
    for split in ("train", "test"):
        lines = [json.dumps({"Drug": drug, "Target": target, "Y": label}) for drug, target, label in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    content["source"]["files"] = {"train": "train.jsonl", "test": "test.jsonl"}
    assert load_samples(load_task(write(content))) == expected


def test_a_limit_takes_the_first_rows(write, content):
    task = load_task(write(content))
    assert load_samples(task, limit=2) == load_samples(task)[:2]
