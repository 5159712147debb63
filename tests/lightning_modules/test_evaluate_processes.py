"""Evaluations by the installed program in processes of their own: several at a time, killed, short of memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

SAME = ("samples", "scores", "invalid_rate", "answers", "predictions", "run")


@pytest.fixture
def start(esmerge_program, text_model):
    """A function that starts an evaluation of the text model."""

    def start(*arguments, **environment):
        return subprocess.Popen(
            [esmerge_program, "evaluate", text_model, "--quiet", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    return start


@pytest.fixture
def run(start, esmerge, text_model):
    """A function that runs such an evaluation to its end, with several devices in processes of their own."""

    def run(*arguments):
        if "--devices" in arguments:
            process = start(*arguments)
            out, err = process.communicate(timeout=240)
            code = process.returncode
        else:
            code, out, err = esmerge("evaluate", text_model, "--quiet", *arguments)
        assert code == 0, err
        return out

    return run


def test_many_devices_give_what_one_gives(run, write_task, results_of, tmp_path):
    # 23 samples in batches of 3 are eight batches, the last of two samples; 5 in batches of 3 are two.
    tasks = ["--task", write_task(23), "--task", write_task(7, name="small")]
    arguments = [*tasks, "--batch-size", 3, "--accelerator", "cpu"]
    run(*arguments, "-o", tmp_path / "one")
    for strategy in ("ddp", "fsdp"):
        output = tmp_path / strategy
        printed = run(*arguments, "--devices", 2, "--strategy", strategy, "-o", output)
        assert printed.count("mcc") == 2  # by one process only
        for task in ("toy", "small"):
            one, many = (tmp_path / "one" / "results", output / "results")
            assert (one / f"{task}.jsonl").read_bytes() == (many / f"{task}.jsonl").read_bytes()
            first, second = results_of(tmp_path / "one", task)[0], results_of(output, task)[0]
            assert {name: first[name] for name in SAME} == {name: second[name] for name in SAME}
            assert second["settings"]["devices"] == 2


def test_ranks_that_share_weights_generate_equally_often(run, write_task, text_model, make_base, tmp_path):
    """Rows of a model with ALiBi are not padded but read one by one, of which ranks have 4 and 3 here."""
    from transformers import AutoTokenizer, BloomConfig

    vocabulary = len(AutoTokenizer.from_pretrained(text_model))
    make_base(BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4), text_model)
    arguments = [
        "--task",
        write_task(7, max_new_tokens=3),
        "--batch-size",
        4,
        "--accelerator",
        "cpu",
        "--score",
        "generate",
    ]
    run(*arguments, "-o", tmp_path / "one")
    run(*arguments, "--devices", 2, "--strategy", "fsdp", "-o", tmp_path / "two")
    one, two = (tmp_path / name / "results" / "toy.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_what_stops_one_process_is_said_once(start, write_task, text_model):
    """One sample, whose turn is late and with the second process, makes the model say NaN."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    file, samples = write_task(90), 90
    data = file.with_suffix(".csv")
    lines = data.read_text().splitlines()
    # The shortest prompt but for some is in one of the last batches.
    shortest = min(range(1, samples + 1), key=lambda row: len(lines[row]))
    lines[shortest] = "~," + lines[shortest].split(",")[1]
    data.write_text("\n".join(lines) + "\n")
    weights = load_file(text_model / "model.safetensors")
    token = AutoTokenizer.from_pretrained(text_model)("~", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, text_model / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--task", file, "--batch-size", 1, "--accelerator", "cpu", "--devices", 2]
    for resumed in ([], ["--resume"]):
        process = start(*arguments, *resumed)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2, err
        assert err.count("esmerge: ") == 1
        assert f"the sample test-{shortest} of toy are NaN in float32" in err
    assert not (text_model / "results" / "toy.json").exists()


def kill_in_the_middle(process, folder, after, how=signal.SIGKILL):
    """Kill a process when so many records are on the disk."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if sum(file.read_bytes().count(b"\n") for file in folder.glob("rank*.jsonl")) >= after:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.kill(process.pid, how)
    return process.communicate()[1]


def test_a_killed_evaluation_goes_on_to_the_same_results(start, run, write_task, results_of, text_model, tmp_path):
    arguments = ["--task", write_task(400), "--batch-size", 3]
    run(*arguments, "-o", tmp_path / "whole")
    unfinished = text_model / "results" / ".toy.unfinished"
    kill_in_the_middle(start(*arguments), unfinished, after=20)
    assert not (text_model / "results" / "toy.json").exists()
    # As a process that was killed while it wrote may leave it.
    with (unfinished / "rank0.jsonl").open("r+b") as stream:
        stream.truncate(stream.seek(0, os.SEEK_END) - 5)
    run(*arguments, "--resume")
    found, whole = results_of(text_model), results_of(tmp_path / "whole")
    assert found[1] == whole[1]
    assert {name: found[0][name] for name in SAME} == {name: whole[0][name] for name in SAME}
    assert 0 < found[0]["samples_computed"] < 400
    assert not unfinished.exists()
    # What is finished stays as it is.
    before = (text_model / "results" / "toy.json").stat().st_mtime_ns
    run(*arguments, "--resume")
    assert (text_model / "results" / "toy.json").stat().st_mtime_ns == before


def test_interrupted_from_the_keyboard(start, write_task, text_model):
    process = start("--task", write_task(4000), "--batch-size", 1)
    err = kill_in_the_middle(process, text_model / "results" / ".toy.unfinished", 20, signal.SIGINT)
    assert process.returncode == 130
    assert err.strip() == "esmerge: interrupted; the same command with --resume goes on."


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs to mount a small disk in a namespace of its own",
)
def test_a_full_disk_is_no_end(esmerge_program, write_task, text_model, tmp_path):
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=32k tmpfs "$1" && "$2" evaluate "$3" --task "$4" --quiet -o "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path / "disk", esmerge_program, text_model, write_task(600)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ("esmerge: the disk is full; free some space: the same command with --resume goes on.\n")


def test_goes_on_with_another_number_of_devices(start, run, write_task, text_model, tmp_path):
    arguments = ["--task", write_task(400), "--batch-size", 3, "--accelerator", "cpu"]
    run(*arguments, "-o", tmp_path / "whole")
    kill_in_the_middle(start(*arguments), text_model / "results" / ".toy.unfinished", after=20)
    run(*arguments, "--resume", "--devices", 2)
    logs = [folder / "results" / "toy.jsonl" for folder in (text_model, tmp_path / "whole")]
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_a_damaged_log_is_one_sentence(start, esmerge, write_task, text_model):
    arguments = ["--task", write_task(400), "--batch-size", 3]
    unfinished = text_model / "results" / ".toy.unfinished"
    kill_in_the_middle(start(*arguments), unfinished, after=20)
    lines = (unfinished / "rank0.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "rank0.jsonl").write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    code, _, err = esmerge("evaluate", text_model, "--quiet", *arguments, "--resume")
    assert code == 2
    assert "rank0.jsonl, line 2 is no record of a sample" in err
    assert len(err.strip().splitlines()) == 1
    err = esmerge("evaluate", text_model, "--quiet", *arguments[:2], "--batch-size", 4, "--resume")[2]
    assert "differs in batch_size" in err


def test_the_batch_size_is_halved_until_it_fits(text_model, write_task):
    """With an estimate that is far too high and little address space, allocations really fail."""
    script = f"""
import resource, sys
import torch, transformers, lightning_modules.evaluate
from lightning_modules import evaluation, likelihood
from lightning_modules.likelihood import AnswerScorer
evaluation.first_batch_size = lambda *arguments: 64
tried = []
score = AnswerScorer.__call__
def scarce(self, prompts, reader):
    tried.append(len(prompts))
    ballast = torch.empty(len(prompts) * (1 << 28), dtype=torch.uint8)
    return score(self, prompts, reader)
AnswerScorer.__call__ = scarce
from esmerge.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), -1))
sys.argv = ["esmerge", "evaluate", {str(text_model)!r}, "--task", {str(write_task(70))!r}, "--quiet"]
try:
    main()
finally:
    print(tried)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout.strip().splitlines()[-1])
    results = json.loads((text_model / "results" / "toy.json").read_text())
    size = results["settings"]["batch_size"]
    assert size < 64
    halvings = tried.index(size) + 1
    assert tried[:halvings] == [64 >> step for step in range(halvings)]
    assert sum(tried[halvings:]) == results["samples"] == 70
    assert max(tried[halvings:]) == size
