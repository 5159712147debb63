"""The tasks that come with esmerge: every one validates, and asks what it should on data of the right shape."""

import json

import pytest

from benchmarks.tasks.task import Task
from lightning_modules.samples import Item, load_samples
from lightning_modules.task_data import load_rows
from lightning_modules.tasks import load_task, task_names

CYP = ["cyp1a2_inhibition", "cyp2c9_inhibition", "cyp2c19_inhibition", "cyp2d6_inhibition", "cyp3a4_inhibition"]
CYP += ["cyp2c9_substrate", "cyp2d6_substrate", "cyp3a4_substrate"]
DRUG_TARGET = ["bindingdb", "biosnap", "human"]
TESTBED = ["b3db", "antimicrobial", "tissue", "cell_sensitivity", "localisation", "gdsc2_mid_potency", "pydta", "kiba"]
SMILES = ["CCO", "CCN", "CCS", "c1ccccc1", "Cc1ccccc1", "CC(=O)O", "C1CCNCC1", "C#N", "CCCO"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("ESMERGE_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def provide(data, write_table):
    """A function that puts nine small training rows and three test rows where a task expects its own."""

    def provide(task):
        columns = list(dict.fromkeys([*task.columns.values(), task.answer]))
        values = {name: [f"{'GATC'[n % 4]}{n % 3}, TP53" for n in range(9)] for name in task.columns}
        for name in task.columns:
            if name.startswith("molecule"):
                values[name] = SMILES[::-1] if name.endswith("2") else SMILES
            if name == "protein":
                values[name] = ["MKTAY" + "GSH"[n % 3] for n in range(9)]
        labels = list(task.labels) or list(task.choices)
        rows = [[*(values[name][number] for name in task.columns), labels[number % len(labels)]] for number in range(9)]
        if task.source.hub is None:
            for split, rows_of_split in (("train", rows), ("test", rows[:3])):
                write_table(data / task.source.files[split], columns, rows_of_split)
        else:
            folder = data / task.source.hub
            write_table(folder / task.source.path, columns, rows)
            splits = {"train": [3, 4, 5, 6, 7, 8], "valid": [], "test": [0, 1, 2]}
            (folder / task.source.split_file).write_text(json.dumps(splits))

    return provide


def test_all_tasks_are_tested_here():
    assert set(task_names()) == {*CYP, *DRUG_TARGET, *TESTBED, "gdsc2", "drugcomb"}


@pytest.mark.parametrize("name", task_names())
def test_a_task_is_complete(name):
    task = load_task(name)
    assert task.name == name
    assert task.folder is None
    assert task == Task.model_validate(task.model_dump())
    assert task.title and task.description and task.citation and task.licence
    for choice in task.choices:
        assert task.parse(task.answer_prefix + choice) == task.choices.index(choice)
    for a in task.choices:
        assert not any(b.startswith(a) for b in task.choices if b != a), "likelihood could never choose the longer one"


@pytest.mark.parametrize("name", [*CYP, *DRUG_TARGET, "gdsc2", "drugcomb"])
def test_tasks_of_the_paper_ask_with_five_examples(name, provide):
    task = load_task(name)
    provide(task)
    samples = load_samples(task)
    assert [sample.answer for sample in samples] == [n % 2 for n in range(3)]
    for sample, row in zip(samples, load_rows(task, "test")[0], strict=True):
        assert [turn.role for turn in sample.turns] == ["system", "user"]
        question = sample.turns[1].parts
        text = "".join(part if isinstance(part, str) else f"<{part.modality}>" for part in question)
        assert text.count("\nFinal answer: ") == 5
        assert all(f"'Final answer: {choice}'" in text for choice in task.choices)
        items = [part for part in question if isinstance(part, Item)]
        names = [name for name in (*task.columns, *task.constants) if task.modality(name) is not None]
        assert len(items) == 6 * len(names)
        assert {item.value for item in items[-len(names) :]} == {row.values[name] for name in names}


@pytest.mark.parametrize("name", CYP)
def test_cyp_tasks_show_the_enzyme(name):
    sequence = load_task(name).constants["protein"]
    lengths = {"1a2": 516, "2c9": 490, "2c19": 490, "2d6": 497, "3a4": 503}
    assert len(sequence) == lengths[name.removeprefix("cyp").partition("_")[0]]
    assert set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY")


@pytest.mark.parametrize(("name", "modality"), [("b3db", "molecule"), ("antimicrobial", "protein"), ("tissue", "cell")])
def test_testbed_tasks_ask_what_the_specialists_were_trained_on(name, modality):
    from benchmarks.testbed.data import load_task as testbed_task

    trained = testbed_task(modality)
    task = load_task(name)
    assert task.choices == trained.answers
    for split, examples in trained.examples.items():
        samples = load_samples(task, split)
        assert len(samples) == task.source.rows[split]
        for sample, example in zip(samples, examples, strict=True):
            assert sample.id == example.id
            assert task.choices[sample.answer] == example.answer
            (turn,) = sample.turns
            assert [part for part in turn.parts if isinstance(part, Item)] == [Item(modality, example.item)]
            text = "".join(part if isinstance(part, str) else part.value for part in turn.parts)
            assert text == trained.prompt(example)


@pytest.mark.parametrize("name", ["localisation", "cell_sensitivity", "gdsc2_mid_potency", "pydta", "kiba"])
def test_testbed_tables(name):
    task = load_task(name)
    splits = ("train", "validation", "test")
    rows = dict(zip(splits, load_rows(task, *splits), strict=True))
    assert {split: len(rows[split]) for split in rows} == task.source.rows
    asked = {split: {tuple(row.values.items()) for row in rows[split]} for split in rows}
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    # The first rows are a fair sample, for evaluations with a limit.
    for choice in range(len(task.choices)):
        share = sum(row.answer == choice for row in rows["test"]) / len(rows["test"])
        assert sum(row.answer == choice for row in rows["test"][:200]) / 200 == pytest.approx(share, abs=0.02)


def test_cell_lines_of_the_drug_response_have_the_splits_and_genes_of_the_tissue_task():
    tissues = load_task("tissue")
    response = load_task("gdsc2_mid_potency")
    cells = {}
    for split in ("train", "validation", "test"):
        for row in load_rows(response, split)[0]:
            assert cells.setdefault(row.group, (split, row.values["cell"])) == (split, row.values["cell"])
    for split in ("train", "validation", "test"):
        for row in load_rows(tissues, split)[0]:
            assert cells.get(row.id, (split, row.values["cell"])) == (split, row.values["cell"])


@pytest.mark.parametrize("name", ["pydta", "kiba"])
def test_pairs_that_bind_are_half_of_those_asked(name):
    for split in ("validation", "test"):
        answers = [row.answer for row in load_rows(load_task(name), split)[0]]
        assert 2 * sum(answers) == len(answers) > 200


def test_kiba_tests_new_molecules_and_new_proteins():
    task = load_task("kiba")
    for name in ("molecule", "protein"):
        seen = {row.values[name] for row in load_rows(task, "train")[0]}
        assert not seen & {row.values[name] for row in load_rows(task, "test")[0]}
