"""Data in all formats and layouts, as conversations."""

import json

import datasets
import pytest

from benchmarks.testbed.splits import stable_fraction
from lightning_modules.samples import Item, Sample, Turn, load_samples
from lightning_modules.tasks import load_task

COLUMNS = {"Drug": ["CCO", "c1ccccc1", "CC(=O)O"], "Target": ["MKTAY", "GSHML", "MALWM"], "Y": [1, 0, 1]}


def question(protein, molecule):
    return ("Protein: ", Item("protein", protein), "\nMolecule: ", Item("molecule", molecule), "\nDo they bind?")


@pytest.fixture
def expected():
    system = Turn("system", ("You know proteins.",))
    rows = zip(COLUMNS["Target"], COLUMNS["Drug"], COLUMNS["Y"], strict=True)
    return [
        Sample(f"test-{number}", (system, Turn("user", question(protein, molecule))), 1 - label, None)
        for number, (protein, molecule, label) in enumerate(rows, start=1)
    ]


def test_a_row_becomes_a_conversation_with_items_in_their_places(write, content, expected):
    assert load_samples(load_task(write(content))) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tsv"])
def test_all_formats_give_the_same(write, content, tmp_path, expected, suffix):
    data = datasets.Dataset.from_dict(COLUMNS)
    for split in ("train", "test"):
        file = str(tmp_path / f"{split}.{suffix}")
        if suffix == "jsonl":
            data.to_json(file)
        elif suffix == "parquet":
            data.to_parquet(file)
        else:
            data.to_csv(file, sep="\t", index=False)
    content["source"]["files"] = {split: f"{split}.{suffix}" for split in ("train", "test")}
    assert load_samples(load_task(write(content))) == expected


def test_a_folder_that_datasets_saved(write, content, tmp_path, expected):
    data = datasets.Dataset.from_dict(COLUMNS)
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    content["source"] = {"path": "saved"}
    assert load_samples(load_task(write(content))) == expected


def test_a_folder_laid_out_as_on_the_hub(write, content, tmp_path, write_table, expected):
    rows = list(zip(*COLUMNS.values(), strict=True))
    for split in ("train", "test"):
        write_table(tmp_path / "laid_out" / f"{split}.csv", list(COLUMNS), rows)
    content["source"] = {"path": "laid_out"}
    assert load_samples(load_task(write(content))) == expected


def test_a_copy_of_a_hub_data_set_among_the_data(write, content, tmp_path, write_table, expected, monkeypatch):
    monkeypatch.setenv("ESMERGE_DATA", str(tmp_path / "data"))
    rows = list(zip(*COLUMNS.values(), strict=True))
    for split in ("train", "test"):
        write_table(tmp_path / "data" / "lab" / "pairs" / f"{split}.csv", list(COLUMNS), rows)
    content["source"] = {"hub": "lab/pairs@v1"}
    assert load_samples(load_task(write(content))) == expected


def test_values_are_taken_as_they_are_written(write, content):
    # pandas reads NA, nan and null as nothing, and a column of numbers as numbers.
    path = write(content, test=[("N", "NA", "1.0"), ("C", "nan", 0), ("C", "null", "0")])
    samples = load_samples(load_task(path))
    assert [sample.turns[1].parts[1].value for sample in samples] == ["NA", "nan", "null"]
    assert [sample.answer for sample in samples] == [0, 1, 1]


def test_lists_of_genes_are_joined(write, content, tmp_path):
    lines = [{"Genes": ["CD3D", "CD8A"], "Y": True}, {"Genes": ["LYZ"], "Y": False}]
    (tmp_path / "cells.jsonl").write_text("\n".join(map(json.dumps, lines)))
    content |= {"source": {"files": {"test": "cells.jsonl"}}, "columns": {"cell": "Genes"}}
    content |= {"prompt": "Cell: {cell}", "labels": {True: "Yes", False: "No"}}
    samples = load_samples(load_task(write(content)))
    assert [sample.turns[1].parts[1] for sample in samples] == [Item("cell", "CD3D, CD8A"), Item("cell", "LYZ")]
    assert [sample.answer for sample in samples] == [0, 1]


def test_a_limit_takes_the_first_rows(write, content, expected):
    assert load_samples(load_task(write(content)), limit=2) == expected[:2]


def test_another_split(write, content):
    task = load_task(write(content, train=[("C", "MKT", 0)]))
    assert [(sample.id, sample.answer) for sample in load_samples(task, "train")] == [("train-1", 1)]


def test_identifiers_and_groups_are_those_of_the_data(write, content):
    rows = [("CCO", "MKTAY", 1, "a", "x"), ("C", "GSHML", 0, "b", "x")]
    content |= {"id": "key", "group": "family"}
    path = write(content, train=rows, test=rows, header=("Drug", "Target", "Y", "key", "family"))
    assert [(sample.id, sample.group) for sample in load_samples(load_task(path))] == [("a", "x"), ("b", "x")]


def test_text_and_constants_are_not_items(write, content):
    content["columns"] = {"molecule": "Drug", "note": "Target"}
    content |= {"constants": {"protein": "MMM"}, "prompt": "{note} {protein} {{molecule}} {molecule}"}
    first = load_samples(load_task(write(content)))[0]
    assert first.turns[1].parts == ("MKTAY ", Item("protein", "MMM"), " {molecule} ", Item("molecule", "CCO"))


def test_splits_from_a_file_of_row_numbers(write, content, tmp_path):
    content["source"] = {"path": "test.csv", "split_file": "splits.json"}
    path = write(content)
    (tmp_path / "splits.json").write_text('{"train": [0], "test": [2, 1]}')
    assert [sample.id for sample in load_samples(load_task(path))] == ["test-3", "test-2"]


def test_splits_by_group_keep_groups_whole_and_do_not_depend_on_the_order(write, content):
    rows = [("C" * n, f"MKT{'A' * (n % 20)}", n % 2) for n in range(1, 101)]
    content |= {"source": {"path": "test.csv"}, "split": {"by": "protein", "test_share": 0.3}}

    def proteins(rows):
        task = load_task(write(content, test=rows))
        return {
            split: {sample.turns[1].parts[1].value for sample in load_samples(task, split)}
            for split in ("train", "validation", "test")
        }

    found = proteins(rows)
    assert sum(map(len, found.values())) == 20
    assert found["test"] == {protein for _, protein, _ in rows if stable_fraction(protein) < 0.3}
    assert proteins(rows[::-1]) == found


def test_splits_by_scaffold(write, content):
    rings = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNCC1", "c1ccc2ccccc2c1", "C1CCOC1"]
    rows = [(prefix + ring, "MKT", 1) for ring in rings for prefix in ("", "C", "CC", "O")]
    content |= {"source": {"path": "test.csv"}, "split": {"by": "scaffold", "validation_share": 0, "test_share": 0.5}}
    task = load_task(write(content, test=rows))
    found = {
        split: [sample.turns[1].parts[3].value for sample in load_samples(task, split)] for split in ("train", "test")
    }
    for ring in rings:
        assert {split for split in found for prefix in ("", "C", "CC", "O") if prefix + ring in found[split]} in (
            {"train"},
            {"test"},
        )
    assert found["train"] and found["test"]


def test_rows_that_stand_in_a_later_split_are_left_out_of_the_earlier(write, content):
    content["split"] = {"distinct": "protein"}
    path = write(content, train=[("C", "MKTAY", 0), ("CC", "AAA", 1)], test=[("CCO", "MKTAY", 1)])
    assert [sample.id for sample in load_samples(load_task(path), "train")] == ["train-2"]
    assert [sample.id for sample in load_samples(load_task(path))] == ["test-1"]


@pytest.mark.parametrize("order", [["train", "validation", "test"], ["test", "validation", "train"]])
def test_distinct_leaves_the_evaluated_split_whole_whatever_the_order(write, content, write_table, tmp_path, order):
    header = ("Drug", "Target", "Y")
    write_table(tmp_path / "validation.csv", header, [("OCC", "A", 1), ("CN", "A", 0), ("C", "A", 0)])
    content["source"] = {"files": {split: f"{split}.csv" for split in order}}
    content["split"] = {"distinct": "molecule"}
    path = write(
        content, train=[("C(C)O", "A", 0), ("NC", "A", 1), ("O", "A", 1)], test=[("CCO", "A", 1), ("C", "B", 1)]
    )
    kept = {split: [sample.id for sample in load_samples(load_task(path), split)] for split in order}
    assert kept == {"test": ["test-1", "test-2"], "validation": ["validation-2"], "train": ["train-3"]}
