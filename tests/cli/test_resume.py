"""A merge that was killed or stopped goes on from there, and ends in the very files of one that was not."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from esmerge.writing import FullOutput

LAYERS = 5
TENSORS = 9 * LAYERS + 3


@pytest.fixture(scope="module")
def project(tmp_path_factory, make_base):
    """A base and two full specialists whose singular vectors take a second or two to merge, and their recipe."""
    folder = tmp_path_factory.mktemp("resume")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    make_base(config, folder / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        model.save_pretrained(folder / name)
    recipe = {
        "base": "base",
        "specialists": {"one": "one", "two": "two"},
        "coefficients": {"one": 0.6, "two": 0.4},
        "method": "tsv",
        "output": {"format": "full"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def undisturbed(project, run_program):
    """The files of a merge that nothing interrupted."""
    run_program("merge", project / "recipe.yaml", "-o", project / "undisturbed", "--quiet")
    return files_of(project / "undisturbed")


@pytest.fixture
def merge(esmerge, project):
    """A function that runs the project's recipe to its end."""

    def run(output, *options):
        code, _, err = esmerge("merge", project / "recipe.yaml", "-o", output, "--quiet", *options)
        assert (code, err) == (0, "")

    return run


@pytest.fixture(scope="module")
def with_signals(project):
    """The same merge with coefficients from embedding signals, which are measured first."""
    torch.manual_seed(3)
    mask = torch.zeros(24, 8, dtype=torch.bool)
    mask[:, 4] = True
    tensors = {"inputs_embeds": torch.randn(24, 8, 128), "attention_mask": torch.ones(24, 8, dtype=torch.int64)}
    save_file({**tensors, "mask.one": mask, "mask.two": mask.clone()}, project / "probe.safetensors")
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe["probe"] = {"tensors": "probe.safetensors"}
    recipe["coefficients"] = {"from": "embedding_signals", "projections": 64}
    (project / "signals.yaml").write_text(yaml.safe_dump(recipe))
    return project / "signals.yaml"


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def journal_of(output):
    """The tensors that a merge into `output` has completed so far."""
    journal = output.parent / f".{output.name}.partial" / ".model.journal"
    if not journal.exists():
        return []
    return [json.loads(line)[0] for line in journal.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def killed(esmerge_program, project):
    """The output of a merge that was killed as soon as some of its tensors were written."""
    output = project / "killed"
    kill_after(5, output, esmerge_program, project / "recipe.yaml")
    return output


def kill_after(count, output, esmerge_program, recipe, *options):
    """Kills a merge as soon as `count` of its tensors are written."""
    command = [esmerge_program, "merge", recipe, "-o", output, "--quiet", *options]
    with subprocess.Popen(command, env=os.environ | threads(1)) as process:
        while len(journal_of(output)) < count:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    assert count <= len(journal_of(output)) < TENSORS


@pytest.fixture
def left(killed, tmp_path):
    """A copy of what a killed merge left, as that of a merge into the folder `merged`."""
    shutil.copytree(killed.parent / f".{killed.name}.partial", tmp_path / ".merged.partial")
    return tmp_path / "merged"


def test_ends_in_the_same_files(left, undisturbed, merge):
    done = journal_of(left)
    merge(left, "--resume")
    assert files_of(left) == undisturbed
    assert 5 <= len(done) < TENSORS
    assert [path.name for path in left.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.")])
def test_goes_on_after_memory_ran_out_in_this_process(undisturbed, project, esmerge, tmp_path, monkeypatch, error):
    write, output = FullOutput.write, tmp_path / "merged"

    def fail(self, target, stream):
        if len(journal_of(output)) >= 5:
            raise error
        write(self, target, stream)

    monkeypatch.setattr(FullOutput, "write", fail)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["merge", project / "recipe.yaml", "-o", output, "--quiet"]
    code, _, err = esmerge(*command)
    assert code == 2 and err.count("\n") == 1 and not output.exists()
    assert err.startswith("esmerge: memory ran out (") and "--resume goes on" in err
    monkeypatch.setattr(FullOutput, "write", write)
    assert esmerge(*command, "--resume")[0] == 0
    assert files_of(output) == undisturbed


@pytest.fixture
def written(monkeypatch):
    """Names of the tensors that this process merges."""
    names = []
    write = FullOutput.write

    def note(output, target, stream):
        names.append(target.written)
        write(output, target, stream)

    monkeypatch.setattr(FullOutput, "write", note)
    return names


def test_does_not_do_finished_tensors_again(left, undisturbed, merge, written, caplog):
    done = journal_of(left)
    merge(left, "--resume")
    assert len(written) == TENSORS - len(done) and not {*written} & {*done}
    assert files_of(left) == undisturbed
    assert not caplog.records


def overwrite(left, name, content):
    """Puts other bytes where a tensor begins in what a killed merge left; None: zeros in all of its places."""
    weights = left.parent / ".merged.partial" / "model.safetensors"
    with weights.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start, end = json.loads(stream.read(length))[name]["data_offsets"]
        stream.seek(8 + length + start)
        stream.write(bytes(end - start) if content is None else content)


@pytest.mark.parametrize("content", [None, b"mark"], ids=["zeros", "other bytes"])
def test_tensors_that_never_reached_the_disk_are_merged_again(left, undisturbed, merge, written, caplog, content):
    """After a power cut a file has its whole size, with zeros in it, though the journal tells of more."""
    done = journal_of(left)
    for name in done[1:3]:
        overwrite(left, name, content)
    merge(left, "--resume")
    assert files_of(left) == undisturbed
    assert {*written} & {*done} == {*done[1:3]}
    [sentence] = [record.getMessage() for record in caplog.records]
    assert f"what the disk has of 2 of {len(done)} complete tensors is not what was written" in sentence


@pytest.mark.parametrize("lost", [slice(0, 100), slice(-100, None)], ids=["its beginning", "its end"])
def test_a_journal_that_did_not_reach_the_disk_whole(left, undisturbed, merge, written, lost):
    done = journal_of(left)
    journal = left.parent / ".merged.partial" / ".model.journal"
    content = bytearray(journal.read_bytes())
    content[lost] = bytes(100)
    journal.write_bytes(content)
    merge(left, "--resume")
    assert files_of(left) == undisturbed
    assert TENSORS - len(done) < len(written) < TENSORS


def test_a_file_whose_header_did_not_reach_the_disk(left, undisturbed, merge):
    weights = left.parent / ".merged.partial" / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.write(bytes(100))
    merge(left, "--resume")
    assert files_of(left) == undisturbed


def test_of_a_line_that_was_cut_off(left, undisturbed, merge):
    with (left.parent / ".merged.partial" / ".model.journal").open("a") as journal:
        journal.write('["model.norm.wei')
    merge(left, "--resume")
    assert files_of(left) == undisturbed


def test_killed_twice_in_the_middle_of_a_line(left, undisturbed, merge, project, esmerge_program):
    """What a second run adds to its journal does not end up on the line that the first one left unfinished."""
    journal = left.parent / ".merged.partial" / ".model.journal"
    with journal.open("a") as stream:
        stream.write('["model.norm.wei')
    first = len(journal_of(left))
    kill_after(first + 5, left, esmerge_program, project / "recipe.yaml", "--resume")
    assert len(journal_of(left)) >= first + 5
    merge(left, "--resume")
    assert files_of(left) == undisturbed


def test_without_it_everything_is_done_again(left, undisturbed, merge):
    weights = left.parent / ".merged.partial" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000:] = b"\xff" * 1000
    weights.write_bytes(content)
    (left.parent / ".merged.partial" / "stray").write_text("")
    merge(left)
    assert files_of(left) == undisturbed
    assert [path.name for path in left.parent.iterdir()] == ["merged"]


def test_where_there_is_nothing_to_resume(tmp_path, undisturbed, merge):
    merge(tmp_path / "merged", "--resume")
    assert files_of(tmp_path / "merged") == undisturbed


def threads(count):
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))


def run_until(point, program):
    """Runs the command line in a process that kills itself where it calls a function for the first time."""
    module, _, function = point.rpartition(".")
    script = f"""
import importlib, os, signal, sys
owner = importlib.import_module("{module}") if "{module}" != "pathlib.Path" else __import__("pathlib").Path
setattr(owner, "{function}", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
from esmerge.cli import main
main()
"""
    command = [sys.executable, "-c", script, *map(str, program)]
    done = subprocess.run(command, env=os.environ | threads(1), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    "point",
    [
        "esmerge.results.copy_model_files",
        "esmerge.results.write_tensors",
        "esmerge.results.write_record",
        "pathlib.Path.rename",
    ],
)
def test_killed_after_the_last_tensor(tmp_path, project, undisturbed, merge, written, point):
    output = tmp_path / "merged"
    run_until(point, ["merge", project / "recipe.yaml", "-o", output, "--quiet"])
    assert [path.name for path in tmp_path.iterdir()] == [".merged.partial"]
    merge(output, "--resume")
    assert files_of(output) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not written or point == "pathlib.Path.rename"


@pytest.fixture(scope="module")
def undisturbed_signals(project, with_signals, esmerge_program):
    command = [esmerge_program, "merge", with_signals, "-o", project / "undisturbed-signals", "--quiet"]
    subprocess.run(command, env=os.environ | threads(1), check=True)
    return files_of(project / "undisturbed-signals")


@pytest.mark.parametrize("point", ["esmerge.gradients.dense_score", "esmerge.writing.CheckpointWriter", None])
def test_of_embedding_signals(tmp_path, with_signals, undisturbed_signals, esmerge_program, point):
    """Killed while they are measured and spooled, or while tensors are merged by them."""
    output = tmp_path / "merged"
    command = ["merge", with_signals, "-o", output, "--quiet"]
    if point is None:
        kill_after(5, output, esmerge_program, with_signals)
    else:
        run_until(point, command)
    assert [path.name for path in tmp_path.iterdir()] == [".merged.partial"]
    visible = [path.name for path in (tmp_path / ".merged.partial").iterdir() if not path.name.startswith(".")]
    assert visible == ([] if point else ["model.safetensors"]), "what was spooled is gone with the process"
    subprocess.run([esmerge_program, *command, "--resume"], env=os.environ | threads(1), check=True)
    assert files_of(output) == undisturbed_signals
    assert yaml.safe_load((output / "esmerge.yaml").read_text())["threads"] == 1


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_of_embedding_signals_with_another_number_of_threads(tmp_path, with_signals, esmerge_program):
    output = tmp_path / "merged"
    kill_after(5, output, esmerge_program, with_signals)
    command = [esmerge_program, "merge", with_signals, "-o", output, "--quiet", "--resume"]
    done = subprocess.run(command, env=os.environ | threads(2), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "was begun with another number of threads: start again without --resume" in done.stderr


def test_with_another_number_of_threads(left, project, undisturbed, esmerge_program):
    """Merging itself does not depend on it."""
    command = [esmerge_program, "merge", project / "recipe.yaml", "-o", left, "--quiet", "--resume"]
    done = subprocess.run(command, env=os.environ | threads(2), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(left) == undisturbed


@pytest.mark.parametrize(
    "change", [["--set", "method=iso_c"], ["--set", "coefficients.one=0.7"], ["--set", "seed=1"]], ids=lambda c: c[1]
)
def test_of_another_recipe_is_refused(left, project, esmerge, change):
    before = files_of(left.parent)
    code, _, err = esmerge("merge", project / "recipe.yaml", "-o", left, "--quiet", "--resume", *change)
    assert code == 2
    assert err.startswith(f"esmerge: what is left of {left} is of another recipe or of other inputs")
    assert err.count("\n") == 1
    assert files_of(left.parent) == before, "it can still be resumed with its own recipe"


def test_of_changed_inputs_is_refused(left, project, esmerge, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns(".*", "undisturbed*"))
    recipe = copy / "recipe.yaml"
    with (copy / "two" / "config.json").open("a") as config:
        config.write("\n")
    code, _, err = esmerge("merge", recipe, "-o", left, "--quiet", "--resume")
    assert code == 2
    assert "of another recipe or of other inputs" in err


def test_of_inputs_whose_contents_alone_changed_is_refused(project, esmerge, esmerge_program, tmp_path):
    """Of the same size, and dated back."""
    copy, output = tmp_path / "copy", tmp_path / "merged"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns(".*", "undisturbed*"))
    kill_after(5, output, esmerge_program, copy / "recipe.yaml")
    weights = copy / "two" / "model.safetensors"
    times = weights.stat()
    with weights.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_mtime_ns == times.st_mtime_ns
    code, _, err = esmerge("merge", copy / "recipe.yaml", "-o", output, "--quiet", "--resume")
    assert code == 2
    assert "of another recipe or of other inputs" in err


FORKED = """
import os, sys
import esmerge.writing
from esmerge.cli import main
esmerge.writing.FORKED_BYTES = 0
{patch}
main()
"""


def forked(patch, *arguments):
    """The command line and environment of a run that merges in forked processes."""
    return [sys.executable, "-c", FORKED.format(patch=patch), *map(str, arguments)], os.environ | threads(2)


def running(output):
    """The processes that have a path in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(output).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def holds_files(process):
    """Whether a process has not ended: one that has no command line any more may yet have its files open."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return False
    return state[0] not in "ZX"


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads do it")


@needs_fork
def test_forked_processes_write_the_same_files(project, undisturbed, tmp_path):
    """And are forked: what one of them does to its memory is not seen by the first."""
    patch = """
import esmerge.workers
run = esmerge.workers._run
def note(number):
    open(f"{os.environ['PIDS']}/{os.getpid()}", "w").close()
    return run(number)
esmerge.workers._run = note
"""
    (tmp_path / "pids").mkdir()
    command, environment = forked(patch, "merge", project / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    # `note` is sent by its name, which only this very process and its forks know.
    done = subprocess.run(command, env=environment | {"PIDS": str(tmp_path / "pids")}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list((tmp_path / "pids").iterdir())) == 2
    assert files_of(tmp_path / "merged") == undisturbed


@needs_fork
def test_beside_other_threads_nothing_is_forked():
    script = """
import threading
import torch
from tqdm import tqdm
from esmerge.workers import can_fork
cpu, stop = torch.device("cpu"), threading.Event()
list(tqdm(range(3), disable=False))  # a progress bar has a thread, too
print(can_fork(cpu), can_fork(torch.device("cuda")))
thread = threading.Thread(target=stop.wait)
thread.start()
print(can_fork(cpu))
stop.set()
thread.join()
print(can_fork(cpu))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "True"]


@needs_fork
def test_forked_processes_end_with_the_first_and_their_work_is_gone_on_with(
    project, undisturbed, merge, written, tmp_path
):
    output = tmp_path / "merged"
    command, environment = forked("", "merge", project / "recipe.yaml", "-o", output, "--quiet")
    with subprocess.Popen(command, env=environment) as process:
        while len(journal_of(output)) < 5:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        processes = running(output)
        assert len(processes) == 3
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(holds_files, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = journal_of(output)
    assert 5 <= len(done) < TENSORS
    merge(output, "--resume")
    assert files_of(output) == undisturbed
    assert len(written) == TENSORS - len(done)


@needs_fork
@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ("esmerge.writing.is_finite = lambda rows: False", b"has NaN or infinite values"),
        ("esmerge.writing.merged_blocks = lambda *_: os.kill(os.getpid(), 9)", b"a process was killed, most likely"),
    ],
)
def test_what_goes_wrong_in_a_forked_process_is_one_sentence(project, tmp_path, patch, said):
    command, environment = forked(patch, "merge", project / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count(b"\n") == 1, done.stderr
    assert not list(tmp_path.iterdir()) and not running(tmp_path), "nothing was complete, so nothing is kept"


GOES_ON = "the same command with --resume goes on from what is in {}/.merged.partial.\n"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=needs_fork)])
def test_interrupted(project, undisturbed, merge, written, tmp_path, processes):
    output = tmp_path / "merged"
    command, environment = forked("", "merge", project / "recipe.yaml", "-o", output, "--quiet")
    with subprocess.Popen(command, env=environment | threads(processes), stderr=subprocess.PIPE, text=True) as process:
        while len(journal_of(output)) < 5:
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "\nesmerge: interrupted; " + GOES_ON.format(tmp_path)
    done = journal_of(output)
    assert 5 <= len(done) < TENSORS
    merge(output, "--resume")
    assert files_of(output) == undisturbed
    assert len(written) == TENSORS - len(done)


def test_interrupted_while_a_resumed_merge_measures_its_signals(
    tmp_path, with_signals, undisturbed_signals, esmerge_program
):
    """What the first run completed stays."""
    output = tmp_path / "merged"
    kill_after(5, output, esmerge_program, with_signals)
    patch = "import signal, esmerge.gradients; esmerge.gradients.dense_score = lambda *_: signal.raise_signal(2)"
    resumed = ["merge", with_signals, "-o", output, "--quiet", "--resume"]
    command, environment = forked(patch, *resumed)
    done = subprocess.run(command, env=environment | threads(1), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\nesmerge: interrupted; " + GOES_ON.format(tmp_path))
    assert len(journal_of(output)) >= 5
    subprocess.run([esmerge_program, *resumed], env=environment | threads(1), check=True)
    assert files_of(output) == undisturbed_signals


# As memory that runs out, once the largest tensors are complete.
KILLED = """
write = esmerge.writing.FullOutput.write
def die(output, target, stream):
    if target.name == "layers.2.self_attn.q_proj.weight":
        os.kill(os.getpid(), 9)
    write(output, target, stream)
esmerge.writing.FullOutput.write = die
"""


@needs_fork
def test_killed_process_of_several(project, undisturbed, esmerge_program, tmp_path):
    """What the message says helps."""
    command, environment = forked(KILLED, "merge", project / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "esmerge: a process was killed, most likely because memory ran out: let one work at a time "
        "(OMP_NUM_THREADS=1); " + GOES_ON.format(tmp_path)
    )
    assert 0 < len(journal_of(tmp_path / "merged")) < TENSORS
    again = [esmerge_program, *command[3:], "--resume"]
    subprocess.run(again, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert files_of(tmp_path / "merged") == undisturbed


@needs_fork
def test_killed_process_of_several_after_a_probe(with_signals, esmerge_program, tmp_path):
    """Nothing is said of another number of threads, with which it could not be gone on."""
    command, environment = forked(KILLED, "merge", with_signals, "-o", tmp_path / "merged", "--quiet")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "esmerge: a process was killed, most likely because memory ran out: free some memory; "
        + GOES_ON.format(tmp_path)
    )
    plain = [esmerge_program, "merge", with_signals, "--quiet", "-o"]
    subprocess.run([*plain, tmp_path / "merged", "--resume"], env=environment, check=True)
    subprocess.run([*plain, tmp_path / "undisturbed"], env=environment, check=True)
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "undisturbed")


def test_interrupted_comparison(project, tmp_path):
    """There is no going on with one, so nothing stays."""
    patch = "import signal; esmerge.writing.results.copy_model_files = lambda *_: signal.raise_signal(2)"
    options = ["-o", tmp_path / "merged", "--quiet", "--method=linear", "--method=ties"]
    command, environment = forked(patch, "compare", project / "recipe.yaml", *options)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\nesmerge: interrupted; nothing was written.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs to mount a small disk in a namespace of its own",
)
def test_disk_that_fills_up(project, undisturbed, esmerge_program, tmp_path):
    """With a file of someone else. What is complete needs no room again."""
    size = len(undisturbed[Path("model.safetensors")])
    (tmp_path / "disk").mkdir()
    patch = f"""
import esmerge.pipeline
write_all = esmerge.pipeline.write_all
def fill(*arguments):
    with open("disk/other", "wb") as file:
        file.write(bytes({3 * size // 2}))
    write_all(*arguments)
esmerge.pipeline.write_all = fill
"""
    script = """
        mount -t tmpfs -o size="$1" tmpfs disk
        "$2" -c "$3" merge "$4" --quiet -o disk/merged
        echo $?
        truncate -s 0 disk/other && head -c "$5" /dev/zero > disk/other
        "$6" merge "$4" --quiet -o disk/merged --resume && cp -r disk/merged .
    """
    arguments = [2 * size, sys.executable, FORKED.format(patch=patch), project / "recipe.yaml", size * 3 // 4]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, arguments), esmerge_program],
        cwd=tmp_path,
        env=os.environ | threads(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "esmerge: the disk is full; free some space: " + GOES_ON.format("disk")
    assert done.stdout == f"1\ndisk/merged: {TENSORS} tensors merged, 0 copied from the base\n"
    assert files_of(tmp_path / "merged") == undisturbed
