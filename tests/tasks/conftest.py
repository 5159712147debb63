"""A task of one's own on disk, to change and to break."""

import csv

import pytest
import yaml

ROWS = [("CCO", "MKTAY", 1), ("c1ccccc1", "GSHML", 0), ("CC(=O)O", "MALWM", 1)]


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
def write_table():
    """A function that writes rows as CSV and returns the file."""

    def write_table(file, header, rows):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return file

    return write_table


@pytest.fixture
def write(tmp_path, write_table):
    """A function that writes a task with its tables, rows as tuples, and returns the path of the YAML file."""

    def write(content, train=ROWS, test=ROWS, header=("Drug", "Target", "Y")):
        for name, rows in (("train", train), ("test", test)):
            write_table(tmp_path / f"{name}.csv", header, rows)
        file = tmp_path / f"{content['name']}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file)

    return write
