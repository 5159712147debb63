"""Tasks whose data is on the Hub: fetched over HTTP, then from the cache; pinned, or not there."""

import json

import pytest
import yaml

SMILES = ["CCO", "CCN", "CCS", "c1ccccc1", "Cc1ccccc1", "CC(=O)O", "C1CCNCC1", "C#N"]


@pytest.fixture
def pairs(content, tmp_path):
    """A function that writes a task about molecules in a data set on the Hub, and returns its file's name."""

    def pairs(hub):
        changes = {"source": {"hub": hub}, "columns": {"molecule": "Drug"}, "prompt": "Molecule: {molecule}"}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(content | changes))
        return "task.yaml"

    return pairs


@pytest.fixture
def tasks(online, esmerge_program, tmp_path, monkeypatch):
    """A function that runs `esmerge tasks` in a process that talks to the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESMERGE_DATA", raising=False)
    return lambda *names, **variables: online(esmerge_program, "tasks", *names, **variables)


def test_a_table_and_its_splits_are_fetched_once(tasks, on_hub):
    rows = "".join(f"{smiles},{number % 2}\n" for number, smiles in enumerate(SMILES))
    name = "tdc_cyp2c9_substrate_carbonmangels"
    files = {
        f"{name}.csv": f"SMILES,label\n{rows}".encode(),
        f"{name}_splits.json": json.dumps({"train": [0, 1, 2, 4, 5, 6], "valid": [7], "test": [3]}).encode(),
    }
    on_hub(files, "scikit-fingerprints/TDC_cyp2c9_substrate_carbonmangels", kind="datasets")
    first = tasks("cyp2c9_substrate")
    assert first.returncode == 0, first.stderr
    question = first.stdout.partition("--- user ---")[2]
    assert question.count("Final answer: ") == 5 + 2 + 1  # examples, what to end with, the expected answer
    assert question.index("[molecule Cc1ccccc1]") < question.index("[molecule c1ccccc1]")
    again = tasks("cyp2c9_substrate", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout.partition("--- user ---")[2] == question
    assert "to be fetched:  nothing" in again.stdout


def test_a_revision_is_kept(tasks, on_hub, pairs):
    tables = {f"{split}.csv": b"Drug,Y\nCCO,1\n" for split in ("train", "test")}
    commit = on_hub(tables, "lab/pairs", kind="datasets")
    on_hub(dict.fromkeys(tables, b"Drug,Y\nCCN,0\n"), "lab/pairs", kind="datasets")
    done = tasks(pairs(f"lab/pairs@{commit}"))
    assert done.returncode == 0, done.stderr
    assert "Molecule: [molecule CCO]" in done.stdout


def test_a_data_set_that_is_not_there_ends_in_one_sentence(tasks, hub, pairs):
    done = tasks(pairs("lab/pairs"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the task binding needs the data set lab/pairs from the Hub, with the columns Drug, Y: " in done.stderr
