"""`esmerge evaluate --compare`: models side by side, on what they have in common."""

import json
import re
import shutil

import pytest

from esmerge.sources import content_hash
from lightning_modules.comparison import compare_results
from lightning_modules.sample_log import read_log


@pytest.fixture
def evaluated(esmerge, llama, text_model, write_task, tmp_path):
    """Folders of the base and of an adapter of it, evaluated on 30 and on the first 20 samples of a task."""
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    file = write_task(30)
    assert esmerge("evaluate", text_model, "--task", file, "--quiet")[0] == 0
    assert esmerge("evaluate", adapter, "--task", file, "--quiet", "--limit", 20, "--base", llama / "base")[0] == 0
    return text_model, adapter


def test_models_are_compared_on_the_samples_in_common(esmerge, evaluated, results_of):
    code, out, err = esmerge("evaluate", "--compare", *evaluated)
    assert code == 0, err
    assert "toy: 20 samples in common" in out
    found = compare_results(evaluated, [], seed=42)[0]
    logs = [{record["id"]: record for record in results_of(folder)[1]} for folder in evaluated]
    shares = [sum(log[name]["prediction"] == log[name]["answer"] for name in logs[1]) / 20 for log in logs]
    assert found.values["accuracy"] == pytest.approx(shares)
    difference = found.differences["accuracy"][0]
    assert difference.value == pytest.approx(shares[1] - shares[0])
    assert difference.low <= difference.value <= difference.high
    assert 0 < difference.p_value <= 1
    assert f"{shares[1]:.3f}" in out
    # The adapter's own value on its samples is what its evaluation said.
    assert found.values["auroc"][1] == results_of(evaluated[1])[0]["scores"]["auroc"]["value"]


def test_a_model_with_itself(evaluated):
    for found in compare_results([evaluated[0], evaluated[0], evaluated[0]], ["toy"], seed=0):
        assert found.samples == 30
        for differences in found.differences.values():
            assert [(d.value, d.low, d.high, d.p_value) for d in differences] == [(0, 0, 0, 1)] * 2


def change_results(folder, **run):
    file = folder / "results" / "toy.json"
    content = json.loads(file.read_text())
    content["run"].update(run)
    file.write_text(json.dumps(content))


def change_log(folder, change):
    file, results = (folder / "results" / f"toy.{kind}" for kind in ("jsonl", "json"))
    records = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    results.write_text(json.dumps({**json.loads(results.read_text()), "log": content_hash(file)}))


def write_garbage(folder):
    change_log(folder, lambda record: record)
    file, results = (folder / "results" / f"toy.{kind}" for kind in ("jsonl", "json"))
    file.write_text("x\n")
    results.write_text(json.dumps({**json.loads(results.read_text()), "log": content_hash(file)}))


def log_of_another_run(folder):
    file = folder / "results" / "toy.jsonl"
    file.write_text(file.read_text().replace('"prediction": "Yes"', '"prediction": "No way"'))


def other_task(folder):
    (folder / "results" / "toy.json").rename(folder / "results" / "other.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "results"), "evaluate the model first"),
        (other_task, "no results of the same task"),
        (lambda folder: change_results(folder, version=2), "different versions of the task (1, 2)"),
        (lambda folder: change_results(folder, score="generate"), "different ways to score"),
        (lambda folder: change_log(folder, lambda record: {**record, "id": record["id"] + "x"}), "different samples"),
        (lambda folder: change_log(folder, lambda record: {**record, "answer": "Yes"}), "the answer to sample"),
        (lambda folder: (folder / "results" / "toy.jsonl").unlink(), "toy.jsonl is missing"),
        (write_garbage, "toy.jsonl, line 1"),
        (log_of_another_run, "toy.jsonl is not the log of the results beside it"),
        (lambda folder: change_results(folder, normalise="tokens"), "different ways to normalise (none, tokens)"),
        (lambda folder: (folder / "results" / "toy.json").write_text("{}"), "is no result of esmerge evaluate"),
    ],
)
def test_what_cannot_be_compared(esmerge, evaluated, spoil, message):
    spoil(evaluated[1])
    code, _, err = esmerge("evaluate", "--compare", *evaluated)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_generated_answers_are_compared_where_both_can_be_read(esmerge, evaluated):
    # One leaves a third of its answers out, the other another third.
    for number, folder in enumerate(evaluated):
        file = folder / "results" / "toy.json"
        content = json.loads(file.read_text())
        content["settings"]["score"] = content["run"]["score"] = "generate"
        content["scores"] = {name: {} for name in ("accuracy", "mcc", "total_accuracy", "invalid_rate")}
        file.write_text(json.dumps(content))
        left_out = {f"test-{row}" for row in range(1, 31) if row % 3 == number}
        change_log(
            folder, lambda record, ids=left_out: {**record, "prediction": None} if record["id"] in ids else record
        )
    logs = [{r["id"]: r for r in read_log(folder / "results" / "toy.jsonl")} for folder in evaluated]
    both = [name for name in logs[1] if all(log[name]["prediction"] is not None for log in logs)]
    found = compare_results(evaluated, [], seed=0)[0]
    assert (found.samples, found.readable) == (20, len(both)) == (20, 7)
    for number, log in enumerate(logs):
        assert found.values["accuracy"][number] == pytest.approx(
            sum(log[name]["prediction"] == log[name]["answer"] for name in both) / len(both)
        )
        assert found.values["invalid_rate"][number] == pytest.approx(
            sum(log[name]["prediction"] is None for name in logs[1]) / 20
        )
    values, difference = found.values["accuracy"], found.differences["accuracy"][0]
    assert difference.value == pytest.approx(values[1] - values[0])
    assert "20 samples in common, 7 of them read from all models" in " ".join(
        esmerge("evaluate", "--compare", *evaluated)[1].split()
    )
    change_log(evaluated[0], lambda record: {**record, "prediction": None})
    code, out, err = esmerge("evaluate", "--compare", *evaluated)
    assert (code, err) == (0, "")
    assert re.search(r"accuracy\s*│\s*-\s*│", out), out


def test_one_model_or_an_unknown_task(esmerge, evaluated):
    assert "at least two" in esmerge("evaluate", "--compare", evaluated[0])[2]
    assert "no results of b3db (it has: toy)" in esmerge("evaluate", "--compare", *evaluated, "--task", "b3db")[2]
