"""`esmerge tasks`: what it shows, and what it says about tasks and data that are not as they should be."""

import sys

import pytest
import yaml

from lightning_modules.tasks import task_names

TASK = {
    "name": "binding",
    "version": 1,
    "title": "Binding",
    "description": "Whether they bind.",
    "source": {"files": {"train": "train.csv", "test": "test.csv"}, "obtain": "ask the lab"},
    "columns": {"molecule": "Drug", "protein": "Target"},
    "answer": "Y",
    "prompt": "Protein: {protein}\nMolecule: {molecule}\nDo they bind?",
    "choices": ["Yes", "No"],
    "labels": {1: "Yes", 0: "No"},
    "examples": {"rank_by": ["molecule"], "count": 2},
    "metrics": ["accuracy"],
    "citation": "none",
    "licence": "cc0-1.0",
}
TRAIN = "key,Drug,Target,Y\n1,CCN,MKT,1\n2,CCS,GSH,0\n3,c1ccccc1,MAL,1\n"
TEST = "key,Drug,Target,Y\n1,CCO,MKT,1\n2,CCC,GSH,0\n3,CC=O,MAL,1\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a good task `task.yaml` and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESMERGE_DATA", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK, sort_keys=False))
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "test.csv").write_text(TEST)
    return tmp_path


def changed(**fields):
    return lambda folder: (folder / "task.yaml").write_text(yaml.safe_dump({**TASK, **fields}, sort_keys=False))


def text(old, new):
    file = "task.yaml"
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new))


def table(name, content, **fields):
    def change(folder):
        changed(**fields)(folder)
        (folder / name).write_text(content)

    return change


def test_what_only_tables_and_cards_need_can_be_left_out(esmerge, folder):
    left_out = ("version", "title", "description", "metrics", "citation", "licence", "examples")
    task = {name: value for name, value in TASK.items() if name not in left_out}
    (folder / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    code, output, _ = esmerge("tasks", "task.yaml")
    assert code == 0
    lines = [line.split() for line in output.splitlines()]
    assert ["task:", "binding,", "version", "1"] in lines
    assert ["metrics:", "accuracy"] in lines
    assert "about:" not in output and "licence:" not in output


def test_all_tasks_are_listed(esmerge, folder):
    code, output, _ = esmerge("tasks")
    assert code == 0
    assert all(name in output for name in task_names())
    assert "scikit-fingerprints/TDC_cyp2c9_veith" in output
    assert "12579" in output


def test_a_task_is_shown_with_its_first_question(esmerge, folder):
    code, output, error = esmerge("tasks", "task.yaml")
    assert (code, error) == (0, "")
    assert "--- user ---\nProtein: [protein MKT]\nMolecule: [molecule CCO]\nDo they bind?\n" in output
    assert output.index("[molecule CCS]") < output.index("[molecule CCO]")  # an example, before the question
    assert output.endswith("--- expected ---\nYes\n")


@pytest.mark.parametrize("name", ["b3db", "pydta"])
def test_a_testbed_task_is_shown(esmerge, name, monkeypatch):
    code, output, _ = esmerge("tasks", name)
    assert code == 0
    assert "[molecule " in output


def test_data_is_found_in_the_folder_for_it(esmerge, folder, monkeypatch):
    content = {**TASK, "source": {"files": {"train": "own/train.csv", "test": "own/test.csv"}}}
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "task.yaml").write_text(yaml.safe_dump(content))
    (folder / "files" / "own").mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        (folder / name).rename(folder / "files" / "own" / name)
    assert esmerge("tasks", "elsewhere/task.yaml")[0] == 2
    monkeypatch.setenv("ESMERGE_DATA", "files")
    assert esmerge("tasks", "elsewhere/task.yaml")[0] == 0


BAD = {
    "no such task": (lambda folder: None, "b3bd", "there is no task b3bd; did you mean b3db? (known: antimicrobial,"),
    "no such file": (lambda folder: None, "mine.yaml", "the task mine.yaml cannot be read (No such file or directory)"),
    "no mapping": (
        lambda folder: (folder / "task.yaml").write_text("- a\n"),
        None,
        "the task task.yaml must be a YAML mapping with the fields name, version,",
    ),
    "a key twice": (text("version: 1", "version: 1\nversion: 2"), None, "line 3: version stands there twice"),
    "an unknown field": (changed(promt="x"), None, "promt is no known field; did you mean prompt? (known: name, "),
    "an unknown nested field": (
        changed(examples={"rank_by": ["molecule"], "cuont": 2}),
        None,
        "examples.cuont is no known field; did you mean count? (known: count, rank_by,",
    ),
    "a field missing": (text("answer: Y\n", ""), None, "the task task.yaml: answer is missing."),
    "a field missing that is misspelt": (
        text("answer: Y\n", "answers: Y\n"),
        None,
        "answers is no known field; did you mean answer? (known: name,",
    ),
    "an unknown metric": (
        changed(metrics=["accuracy", "acuracy"]),
        None,
        "metrics.1 is 'acuracy'; did you mean accuracy? (known: accuracy, macro_f1,",
    ),
    "a metric of two choices for three": (
        changed(metrics=["auroc"], choices=["Yes", "No", "Maybe"]),
        None,
        "metrics: auroc is for two choices, there are 3.",
    ),
    "choices that YAML takes for truth values": (
        text("- 'Yes'\n- 'No'", "- Yes\n- No"),
        None,
        "choices.0 is True: input should be a valid string; write it in quotes.",
    ),
    "a choice twice": (changed(choices=["Yes", "yes "]), None, "choices: 'yes ' stands there twice."),
    "a label of no choice": (
        changed(labels={1: "Yes", 0: "Nope"}),
        None,
        "labels.0 is 'Nope', which is none of the choices ['Yes', 'No'].",
    ),
    "a label twice": (changed(labels={1: "Yes", "1.0": "No"}), None, "labels: 1 stands there twice."),
    "a placeholder without a column": (
        changed(prompt="{molecule} {protien}"),
        None,
        "prompt: the placeholder {protien} has no column; columns names molecule, protein.",
    ),
    "a prompt without placeholders": (changed(prompt="Why?"), None, "prompt has no placeholder of a column"),
    "unbalanced braces": (changed(prompt="{molecule"), None, "prompt: expected '}' before end of string; write {{"),
    "examples ranked by text": (
        changed(columns={"molecule": "Drug", "note": "Target"}, prompt="{molecule}", examples={"rank_by": ["note"]}),
        None,
        "examples: there is no similarity of note, only of molecule, protein, cell.",
    ),
    "examples from the evaluated rows": (
        changed(split={"evaluated": "test", "training": "test"}),
        None,
        "examples: split.training and split.evaluated must differ, or answers leak.",
    ),
    "two sources": (changed(source={"path": "a.csv", "files": {"test": "b.csv"}}), None, "source: path and files excl"),
    "no source": (changed(source={"obtain": "ask"}), None, "source: give hub, path, files or testbed."),
    "no Hub id": (changed(source={"hub": "pairs"}), None, "source.hub is 'pairs': string should match pattern"),
    "a file that is not there": (
        lambda folder: (folder / "test.csv").unlink(),
        None,
        "the task binding needs test.csv with the columns Drug, Target, Y, which is not there; ask the lab.",
    ),
    "files to be fetched by hand": (
        lambda folder: None,
        "bindingdb",
        "the task bindingdb needs data/BindingDB_protein/train.csv with the columns Ligand, Protein, "
        "classification_label, which is not there; they are train.csv and test.csv of BindingDB/protein",
    ),
    "a data set that is not to be had offline": (
        lambda folder: None,
        "cyp1a2_inhibition",
        "the task cyp1a2_inhibition needs tdc_cyp1a2_veith.csv of the data set scikit-fingerprints/TDC_cyp1a2_veith "
        "from the Hub, with the columns SMILES, label: fetch it by `hf download --repo-type dataset "
        "scikit-fingerprints/TDC_cyp1a2_veith`, or put it at data/scikit-fingerprints/TDC_cyp1a2_veith/",
    ),
    "a whole data set that is not to be had offline": (
        changed(source={"hub": "lab/pairs@v2"}),
        None,
        "the task binding needs the data set lab/pairs@v2 from the Hub, with the columns Drug, Target, Y: fetch it by "
        "`hf download --repo-type dataset lab/pairs --revision v2`, or put it at data/lab/pairs; it could not be had",
    ),
    "an unknown format": (
        table("data.xlsx", "", source={"path": "data.xlsx"}),
        None,
        "data.xlsx is none of the formats that can be read (.csv,",
    ),
    "a broken table": (table("test.csv", 'Drug,Target,Y\n"C,M,1\n'), None, "test.csv cannot be read: "),
    "a broken Parquet file": (
        table("t.parquet", "nonsense", source={"files": {"train": "train.csv", "test": "t.parquet"}}),
        None,
        "t.parquet cannot be read: ",
    ),
    "an unknown testbed loader": (
        changed(source={"testbed": "b3d"}),
        None,
        "source.testbed is 'b3d'; did you mean b3db? (known: b3db, antimicrobial,",
    ),
    "a column that is missing": (
        changed(columns={"molecule": "drug", "protein": "Target"}),
        None,
        "train.csv has no column drug; did you mean Drug? (it has key, Drug, Target, Y).",
    ),
    "labels outside the mapping": (
        table("test.csv", TEST + "4,C,MKT,2\n5,C,MKT,\n"),
        None,
        "test.csv has '2' for Y in rows 4, 5, which is none of the labels (Yes, No, 1, 0).",
    ),
    "many labels outside the mapping": (
        table("test.csv", TEST + "4,C,MKT,2\n" * 9),
        None,
        "rows 4, 5, 6, 7, 8 and 4 more, which",
    ),
    "an empty value": (table("test.csv", TEST + "4,,MKT,1\n"), None, "test.csv has no value for Drug in row 4."),
    "an identifier twice": (
        table("test.csv", TEST + "2,CC,MKT,1\n", id="key"),
        None,
        "test.csv has the key '2' more than once, in rows 2, 4.",
    ),
    "an empty split": (table("test.csv", "key,Drug,Target,Y\n"), None, "test.csv has no rows in the split test."),
    "an empty file": (
        table("test.jsonl", "", source={"files": {"train": "train.csv", "test": "test.jsonl"}}),
        None,
        "test.jsonl has no rows in the split test.",
    ),
    "no such split": (
        changed(split={"evaluated": "tset"}),
        None,
        "has no split tset; did you mean test? (it has train, test).",
    ),
    "a single file that does not say what is evaluated": (
        changed(source={"path": "test.csv"}, examples=None),
        None,
        "test.csv has no split test (it has train). split: {by: molecule} shares it out, split: {evaluated: train} "
        "asks about all.",
    ),
    "a row in two splits": (
        table(
            "splits.json", '{"train": [0, 1], "test": [1]}', source={"path": "test.csv", "split_file": "splits.json"}
        ),
        None,
        "splits.json has row 1 in train and again in test.",
    ),
    "a row that is not there": (
        table("splits.json", '{"train": [0], "test": [3]}', source={"path": "test.csv", "split_file": "splits.json"}),
        None,
        "splits.json has row 3 in test; expected numbers from 0 to 2.",
    ),
    "a rule for data that has splits": (
        changed(split={"by": "protein"}),
        None,
        "train.csv has the splits train, test; leave split.by and source.split_file out.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence(esmerge, folder, case):
    change, name, message = BAD[case]
    change(folder)
    code, _, error = esmerge("tasks", name or "task.yaml")
    assert code == 2, error
    assert message in error
    assert error.startswith("esmerge: ") and error.count("\n") == 1


def test_examples_by_molecules_need_rdkit(esmerge, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    code, _, error = esmerge("tasks", "task.yaml")
    assert code == 2
    assert error == "esmerge: the task binding compares molecules by RDKit: pip install 'esmerge[molecules]'.\n"


def test_packages_that_cannot_be_fetched(esmerge, tmp_path, monkeypatch):
    monkeypatch.setenv("ESMERGE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, output, error = esmerge("tasks", "localisation")
    assert code == 2
    assert "to be fetched:  p-scldata from PyPI" in output
    assert error.startswith("esmerge: pip could not download p-scldata: ") and error.count("\n") == 1
