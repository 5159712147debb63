"""Nothing that is evaluated was trained on: pairs, cell lines, clusters of proteins."""

from dataclasses import replace

import pytest
from rdkit import Chem

from benchmarks.testbed import drug_responses
from benchmarks.testbed.splits import cluster_sequences
from benchmarks.testbed.study.specialists import TASKS
from benchmarks.testbed.tables import load_table
from lightning_modules.tasks import load_task

EVALUATED = ("validation", "test")


def spelling(smiles, stereo=False):
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=stereo)


def evaluated(table, column):
    return {row[column] for split in EVALUATED for row in load_table(table)[split]}


def trained_on(column):
    """The items of a modality in the training data of all specialists."""
    found = set()
    for names in TASKS.values():
        for name in names:
            task = load_task(name)
            if column in task.columns:
                found |= {row[task.columns[column]] for row in load_table(task.source.testbed)["train"]}
    return found


def test_no_evaluated_cell_line_was_trained_on():
    lines = {"tissue": "id", "cell_sensitivity": "id", "gdsc2_mid_potency": "cell line"}
    training = {row[lines[t]] for t in lines for row in load_table(t)["train"]}
    assert not training & {line for t, column in lines.items() for line in evaluated(t, column)}
    profiles = {"tissue": "item", "cell_sensitivity": "cell", "gdsc2_mid_potency": "cell"}
    assert not trained_on("cell") & {item for t, column in profiles.items() for item in evaluated(t, column)}


def test_what_is_taught_about_drugs_and_cells_comes_from_training_cell_lines(monkeypatch):
    data = drug_responses.drug_responses()
    potencies, sensitivities = drug_responses.potencies(), drug_responses.sensitivities()["train"]
    other = {pair: value if data.splits[pair[0]] == "train" else -100.0 for pair, value in data.response.items()}
    monkeypatch.setattr(drug_responses, "drug_responses", lambda: replace(data, response=other))
    assert drug_responses.potencies() == potencies
    assert drug_responses.sensitivities()["train"] == sensitivities
    assert {row["sensitive"] for row in drug_responses.sensitivities()["test"]} == {"yes"}


@pytest.mark.parametrize(
    ("table", "partner"), [("gdsc2_mid_potency", "cell"), ("pydta", "protein"), ("kiba", "protein")]
)
def test_no_evaluated_pair_is_a_training_pair(table, partner):
    pairs = {
        split: {(spelling(row["molecule"], stereo=True), row[partner]) for row in rows}
        for split, rows in load_table(table).items()
    }
    assert pairs["train"] and not pairs["train"] & (pairs["validation"] | pairs["test"])


def test_no_protein_that_was_trained_on_is_related_to_an_evaluated_one_of_kiba():
    training, asked = sorted(trained_on("protein")), sorted(evaluated("kiba", "protein"))
    long = [sequence for sequence in training if len(sequence) > 200]
    clusters = cluster_sequences([*long, *asked])
    assert len(long) > 300 and not set(clusters[: len(long)]) & set(clusters[len(long) :])
    # In a long protein a short one finds half of its 3-mers by chance, of longer words it does not.
    short = [sequence for sequence in training if len(sequence) <= 200]
    words = {protein[i : i + 8] for protein in asked for i in range(len(protein) - 7)}
    assert not [sequence for sequence in short if sequence[:8] in words and sequence[-8:] in words]


def test_no_evaluated_antimicrobial_protein_is_part_of_one_that_was_trained_on():
    training = trained_on("protein")
    words = {protein[i : i + 8] for protein in training for i in range(len(protein) - 7)}
    for sequence in evaluated("antimicrobial", "item"):
        own = [sequence[i : i + 8] for i in range(len(sequence) - 7)]
        assert sum(word in words for word in own) <= 0.5 * max(1, len(own))


@pytest.mark.parametrize("lesson", ["ligand_binding", "drug_potency", "kiba"])
def test_no_evaluated_molecule_of_kiba_was_trained_on_for_what_it_does(lesson):
    training = {spelling(row["molecule"]) for row in load_table(lesson)["train"]}
    assert len(training) > 50 and not training & {spelling(molecule) for molecule in evaluated("kiba", "molecule")}


@pytest.mark.parametrize(("table", "partner"), [("gdsc2_mid_potency", "cell"), ("pydta", "protein")])
def test_shuffled_partners_are_those_of_other_rows(table, partner):
    rows, shuffled = load_table(table)["test"], load_table(f"{table}_shuffled")["test"]
    assert sorted(row[partner] for row in rows) == sorted(row[partner] for row in shuffled)
    assert [{**row, partner: ""} for row in rows] == [{**row, partner: ""} for row in shuffled]
    same = sum(a[partner] == b[partner] for a, b in zip(rows, shuffled, strict=True))
    assert same < 0.02 * len(rows)
