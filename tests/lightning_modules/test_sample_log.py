import json

import pytest

from esmerge.errors import InputError, Interrupted
from lightning_modules.sample_log import UnfinishedRun, log_file, read_log, write_log

RUN = {"model": "xxh3:1", "batch_size": 4}


def records(*ids):
    return [{"id": name, "answer": "Yes", "prediction": "No", "log_likelihoods": {"Yes": -1 / 3}} for name in ids]


def interrupted(folder):
    """A run of two processes, one of which was killed while it wrote its second record."""
    run = UnfinishedRun(folder, "toy")
    run.begin(RUN, resume=False)
    for rank in (0, 1):
        writer = UnfinishedRun(folder, "toy")
        writer.append(records(f"a{rank}"), rank)
        writer.close()
    with (run.folder / "rank1.jsonl").open("a") as stream:
        stream.write(json.dumps(records("b1")[0])[:20])
    return run.folder


def again(folder, run=RUN):
    resumed = UnfinishedRun(folder, "toy")
    resumed.begin(run, resume=True)
    return resumed


def test_goes_on_after_a_torn_line(tmp_path):
    interrupted(tmp_path)
    run = again(tmp_path)
    assert sorted(run.records()) == ["a0", "a1"]
    run.append(records("b1", "b0"), rank=0)
    # Another interruption, and one process fewer.
    run.close()
    del run
    run = again(tmp_path)
    found = run.finish(tmp_path, ["b0", "a0", "b1", "a1"])
    assert found == records("b0", "a0", "b1", "a1")
    assert read_log(log_file(tmp_path, "toy")) == found
    run.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["toy.jsonl"]


def test_goes_on_after_a_tear_inside_a_character(tmp_path):
    folder = interrupted(tmp_path)
    line = json.dumps({**records("b1")[0], "generated": "é"}, ensure_ascii=False).encode()
    with (folder / "rank0.jsonl").open("ab") as stream:
        stream.write(line[: line.index("é".encode()) + 1])
    assert sorted(again(tmp_path).records()) == ["a0", "a1"]


@pytest.mark.parametrize(("file", "content"), [("run.json", "[]"), ("run.json", "{"), ("batch_size.json", "")])
def test_damaged_notes_are_one_sentence(tmp_path, file, content):
    folder = interrupted(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=f"{file} is damaged: start again without --resume"):
        again(tmp_path).note("batch_size")


def test_without_resume_all_begins_anew(tmp_path):
    interrupted(tmp_path)
    run = UnfinishedRun(tmp_path, "toy")
    run.begin({"model": "another"}, resume=False)
    assert run.records() == {}


def test_another_evaluation_is_not_gone_on_with(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(InputError, match="differs in batch_size"):
        again(tmp_path, {**RUN, "batch_size": 8})


@pytest.mark.parametrize("line", ["{nonsense}", "[1]", '{"id": "x"}', ""])
def test_damage_in_the_middle_is_an_error(tmp_path, line):
    file = interrupted(tmp_path) / "rank0.jsonl"
    file.write_text(f"{line}\n" + file.read_text())
    with pytest.raises(InputError, match=r"rank0\.jsonl, line 1 is no record"):
        again(tmp_path)


def test_a_damaged_description_is_an_error(tmp_path):
    (interrupted(tmp_path) / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        again(tmp_path)


def test_two_processes_do_not_write_one_run(tmp_path):
    interrupted(tmp_path)
    run = again(tmp_path)
    with pytest.raises(InputError, match="another process is at the evaluation of toy"):
        again(tmp_path)
    run.remove()


def test_interrupted_at_any_time_says_how_to_go_on(tmp_path):
    with pytest.raises(Interrupted, match="--resume goes on"), UnfinishedRun(tmp_path, "toy") as run:
        run.begin(RUN, resume=False)
        raise KeyboardInterrupt
    # Other processes, and work that has not begun, leave it to the first.
    with pytest.raises(KeyboardInterrupt), UnfinishedRun(tmp_path, "other"):
        raise KeyboardInterrupt


def test_samples_without_a_record_are_noticed(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(RuntimeError, match="2 samples of toy"):
        again(tmp_path).finish(tmp_path, ["a0", "b0", "b1"])
    assert not log_file(tmp_path, "toy").exists()


def test_floats_come_back_to_the_last_bit(tmp_path):
    file = tmp_path / "toy.jsonl"
    write_log(file, records("é", "b"))
    assert read_log(file) == records("é", "b")
