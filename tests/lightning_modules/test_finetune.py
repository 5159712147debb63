"""`esmerge finetune`: what it writes can be evaluated and merged, and does not depend on interruptions."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from esmerge.mllm import MllmProcessor
from esmerge.mllm.loading import assemble, load_model
from esmerge.modalities import modality_from_settings
from esmerge.modalities.registry import MODALITIES_FOLDER, save_encoder
from lightning_modules.data import TokenizedExample
from lightning_modules.finetuning_data import FinetuningData


@pytest.fixture
def write_recipe(llama, write_task, tmp_path):
    """A function that writes a recipe for the base of the fixture `llama`; returns its file."""

    def write(name="recipe", **changes):
        # The answer is in the molecule: it can be learnt.
        for split, samples in (("train", 40), ("validation", 12)):
            rows = [f"{'CC' if n % 2 else 'NN'}{'O' * (n % 5)},{n % 2}" for n in range(samples)]
            (tmp_path / f"{split}.csv").write_text("\n".join(["smiles,soluble", *rows]) + "\n")
        files = {"train": "train.csv", "validation": "validation.csv", "test": "validation.csv"}
        task = write_task(3, source={"files": files})
        recipe = {
            "model": str(llama / "base"),
            "tasks": [task.name],
            "epochs": 3,
            "batch_size": 4,
            "learning_rate": 0.01,
            "lora": {"rank": 4, "dropout": 0.1},
            "validation": {"per_epoch": 2},
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        recipe = {field: value for field, value in recipe.items() if value is not None}
        file.write_text(yaml.safe_dump({**recipe, "validation": recipe["validation"] or None}))
        return file

    return write


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_jointly_trained_adapter_learns_and_is_evaluated_and_merged(
    esmerge, write_recipe, results_of, llama, recipe, tmp_path
):
    code, out, err = esmerge("finetune", write_recipe(), "-o", tmp_path / "tuned", "--quiet")
    assert code == 0, err
    record = yaml.safe_load((tmp_path / "tuned" / "finetuning.yaml").read_text())
    assert record["samples"] == {"toy": 40}
    assert record["steps"] == 30
    assert f"{record['validation_loss']:.4f}" in out
    assert str(tmp_path) not in (tmp_path / "tuned" / "finetuning.yaml").read_text()
    assert not list(tmp_path.glob(".*finetuning*"))
    for folder in (llama / "base", tmp_path / "tuned"):
        output = tmp_path / f"results-{folder.name}"
        assert esmerge("evaluate", folder, "--task", tmp_path / "toy.yaml", "--quiet", "-o", output)[0] == 0
    found = [results_of(tmp_path / f"results-{name}")[0]["scores"]["auroc"]["value"] for name in ("base", "tuned")]
    assert found[1] == 1 > found[0]
    # The weights are those of the lowest of the validation losses that were logged.
    logged = (tmp_path / "tuned" / "logs").rglob("metrics.csv")
    rows = [line.split(",") for line in next(logged).read_text().splitlines()]
    losses = [float(row[rows[0].index("validation_loss")]) for row in rows[1:] if row[rows[0].index("validation_loss")]]
    assert len(losses) == 6
    assert record["validation_loss"] == pytest.approx(min(losses))
    # It is a specialist like any other.
    recipe["base"] = str(llama / "base")
    recipe["specialists"]["molecule"] = {"model": str(tmp_path / "tuned")}
    recipe["coefficients"] = "uniform"
    recipe.pop("probe")
    for name in ("protein", "cell"):
        recipe["specialists"][name] = {"model": str(llama / name)}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = esmerge("merge", tmp_path / "merge.yaml", "-o", tmp_path / "merged", "--quiet")
    assert code == 0, err


def test_an_adapter_goes_on_to_be_trained(esmerge, write_recipe, llama, tmp_path):
    file = write_recipe(model=str(llama / "molecule"), base=str(llama / "base"), lora=None)
    code, _, err = esmerge("finetune", file, "-o", tmp_path / "tuned", "--quiet")
    assert code == 0, err
    before, after = weights(llama / "molecule"), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (llama / "molecule", tmp_path / "tuned")]
    assert configs[0]["r"] == configs[1]["r"]
    load_model(tmp_path / "tuned")


def test_the_same_seed_gives_the_same_bits(esmerge, write_recipe, tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        file = write_recipe(seed=seed, epochs=1)
        assert esmerge("finetune", file, "-o", tmp_path / name, "--quiet")[0] == 0
    assert same(weights(tmp_path / "first"), weights(tmp_path / "again"))
    assert not same(weights(tmp_path / "first"), weights(tmp_path / "other"))


@pytest.fixture
def start(esmerge_program):
    def start(file, output, *arguments):
        command = [esmerge_program, "finetune", file, "-o", output, "--quiet", "--accelerator", "cpu", *arguments]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def kill_after_a_checkpoint(process, work):
    deadline = time.monotonic() + 120
    while not (work / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_training_goes_on_to_the_same_bits(start, esmerge, write_recipe, tmp_path):
    file = write_recipe(epochs=12, validation={"per_epoch": 3, "patience": 30})
    killed = tmp_path / "killed"
    assert esmerge("finetune", file, "-o", tmp_path / "whole", "--quiet")[0] == 0
    kill_after_a_checkpoint(start(file, killed), tmp_path / ".killed.finetuning")
    assert not killed.exists()
    # Other work is not gone on with.
    code, _, err = esmerge("finetune", write_recipe("other", epochs=11), "-o", killed, "--quiet", "--resume")
    assert code == 2
    assert "differs in recipe" in err
    checkpoint = tmp_path / ".killed.finetuning" / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    code, _, err = esmerge("finetune", file, "-o", killed, "--quiet", "--resume")
    assert code == 2
    assert "last.ckpt is damaged: start again without --resume" in err
    # As if it had been trained for long before.
    content = torch.load(io.BytesIO(whole), weights_only=True)
    content["callbacks"]["Timer"]["time_elapsed"]["train"] += 1000
    torch.save(content, checkpoint)
    code, _, err = esmerge("finetune", file, "-o", killed, "--quiet", "--resume")
    assert code == 0, err
    assert same(weights(tmp_path / "whole"), weights(killed))
    records = [yaml.safe_load((f / "finetuning.yaml").read_text()) for f in (tmp_path / "whole", killed)]
    assert records[0]["validation_loss"] == records[1]["validation_loss"]
    assert 0 < records[0]["seconds"] < 1000 < records[1]["seconds"] < 2000


def test_the_best_weights_survive_an_interruption(start, esmerge, write_recipe, tmp_path):
    file = write_recipe(epochs=6, learning_rate=0.2, lora={"rank": 4}, validation={"per_epoch": 1})
    assert esmerge("finetune", file, "-o", tmp_path / "whole", "--quiet")[0] == 0
    whole = yaml.safe_load((tmp_path / "whole" / "finetuning.yaml").read_text())
    with next((tmp_path / "whole" / "logs").rglob("metrics.csv")).open() as stream:
        losses = [float(row["validation_loss"]) for row in csv.DictReader(stream) if row["validation_loss"]]
    best = losses.index(min(losses))
    assert best < len(losses) - 1  # what comes after is worse: the result is not of the end
    # Killed when the round after the best one begins.
    script = f"""
import os, signal, sys
from lightning_modules.finetuning_data import FinetuningData
batches = FinetuningData.round_batches
def killed(self, number, rank):
    if number == {best + 1}:
        os.kill(os.getpid(), signal.SIGKILL)
    return batches(self, number, rank)
FinetuningData.round_batches = killed
from esmerge.cli import main
sys.argv = ["esmerge", "finetune", {str(file)!r}, "-o", {str(tmp_path / "killed")!r}, "--quiet", "--accelerator", "cpu"]
main()
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    code, _, err = esmerge("finetune", file, "-o", tmp_path / "killed", "--quiet", "--resume")
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "killed" / "finetuning.yaml").read_text())["validation_loss"] == min(losses)
    assert whole["validation_loss"] == min(losses)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_result_that_could_not_be_written_is_written_by_resuming(esmerge, write_recipe, tmp_path, monkeypatch):
    file, output = write_recipe(epochs=1, validation={"per_epoch": 1}), tmp_path / "tuned"

    def full(self, folder, **_):
        (folder / "adapter_model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(PeftModel, "save_pretrained", full)
        code, _, err = esmerge("finetune", file, "-o", output, "--quiet")
        assert code == 1 and "the same command with --resume goes on" in err
        assert not output.exists()
    code, _, err = esmerge("finetune", file, "-o", output, "--quiet", "--resume")
    assert code == 0, err
    assert "validation_loss" in yaml.safe_load((output / "finetuning.yaml").read_text())
    assert esmerge("finetune", file, "-o", tmp_path / "whole", "--quiet")[0] == 0
    assert same(weights(tmp_path / "whole"), weights(output))


def test_a_base_on_the_hub_stays_pinned(connected, on_hub, esmerge, write_recipe, llama, tmp_path):
    commit = on_hub(llama / "base", "lab/base")
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    names_base = {"base_model_name_or_path": "lab/base", "revision": commit}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **names_base}))
    recipes = {
        "named": {"model": str(adapter)},
        "given": {"model": str(llama / "molecule"), "base": f"lab/base@{commit}"},
        "new": {"model": f"lab/base@{commit}"},
    }
    for name, models in recipes.items():
        file = write_recipe(name, epochs=1, **models)
        code, _, err = esmerge("finetune", file, "-o", tmp_path / f"{name}-tuned", "--quiet")
        assert code == 0, err
        written = json.loads((tmp_path / f"{name}-tuned" / "adapter_config.json").read_text())
        assert {field: written[field] for field in names_base} == names_base
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"{name}-tuned")
        load_model(tmp_path / f"{name}-tuned")


def test_an_adapter_keeps_its_dropout(esmerge, write_recipe, llama, tmp_path):
    for dropout in (0.0, 0.5):
        adapter = shutil.copytree(llama / "molecule", tmp_path / f"adapter-{dropout}")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": dropout}))
        file = write_recipe(model=str(adapter), base=str(llama / "base"), epochs=1)
        assert esmerge("finetune", file, "-o", tmp_path / f"tuned-{dropout}", "--quiet")[0] == 0
    assert not same(weights(tmp_path / "tuned-0.0"), weights(tmp_path / "tuned-0.5"))


def test_two_processes_train_one_model(start, esmerge, write_recipe, tmp_path):
    # 40 samples in batches of 3 for two processes: 14 batches, 7 steps. The validation loss is over all 12 samples.
    records = {}
    # In batches of 16 the validation samples are fewer than two processes would have a batch each of.
    for name, rate, size, devices in (
        ("trained", 0.01, 3, 2),
        ("two", 1e-9, 3, 2),
        ("one", 1e-9, 3, 1),
        ("large", 1e-9, 16, 2),
    ):
        file, output = write_recipe(name, batch_size=size, epochs=2, learning_rate=rate), tmp_path / f"{name}-out"
        if devices == 1:
            assert esmerge("finetune", file, "-o", output, "--quiet")[0] == 0
        else:
            process = start(file, output, "--devices", devices)
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
        records[name] = yaml.safe_load((output / "finetuning.yaml").read_text())
    assert records["two"]["steps"] == records["trained"]["steps"] == 14
    for name in ("two", "large"):
        assert records[name]["validation_loss"] == pytest.approx(records["one"]["validation_loss"], abs=1e-6)
    assert records["trained"]["validation_loss"] < records["one"]["validation_loss"] - 0.1


def test_stops_early(esmerge, write_recipe, tmp_path):
    file = write_recipe(learning_rate=1e-12, epochs=20, validation={"per_epoch": 1, "patience": 2})
    assert esmerge("finetune", file, "-o", tmp_path / "tuned", "--quiet")[0] == 0
    record = yaml.safe_load((tmp_path / "tuned" / "finetuning.yaml").read_text())
    assert 20 <= record["steps"] <= 60


def test_samples_of_a_small_task_are_repeated(esmerge, write_recipe, tmp_path):
    for name, changes in {"plain": {"epochs": 2}, "repeated": {"epochs": 1, "repeat": {"toy": 2}}}.items():
        code, _, err = esmerge("finetune", write_recipe(name, **changes), "-o", tmp_path / f"{name}-tuned", "--quiet")
        assert code == 0, err
    records = [
        yaml.safe_load((tmp_path / f"{name}-tuned" / "finetuning.yaml").read_text()) for name in ("plain", "repeated")
    ]
    assert [record["samples"] for record in records] == [{"toy": 40}, {"toy": 80}]
    assert records[0]["steps"] == records[1]["steps"]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"epoch": 1}, "epoch is no known field; did you mean epochs?"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["b3bd"]}, "did you mean b3db?"),
        ({"tasks": ["toy.yaml", "toy.yaml"]}, "stands there twice"),
        ({"tasks": ["toy.yaml", "./toy.yaml"]}, "2 tasks have the same name, toy"),
        ({"as_text": ["molecul"]}, "molecul is a modality of neither the model nor a task; did you mean molecule?"),
        ({"base": "somewhere"}, "no adapter but a whole model"),
        ({"learning_rate": 1e30}, "the training diverged"),
        ({"learning_rate": 1e30, "validation": False}, "the training diverged"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"repeat": {"toys": 2}}, "repeat.toys is none of the tasks; did you mean toy?"),
        ({"repeat": {"toy": 0}}, "repeat.toy"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"targets": ["nowhere"]}}, "lora.targets"),
        ({"validation": {"split": "dev"}}, "dev"),
        ({"model": "nowhere/at/all"}, "model"),
        ({"chat_template": "nowhere.jinja"}, "nowhere.jinja"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(esmerge, write_recipe, tmp_path, changes, culprit):
    code, _, err = esmerge("finetune", write_recipe(**changes), "-o", tmp_path / "tuned", "--quiet")
    assert code == 2, err
    said = [line for line in err.splitlines() if line.startswith("esmerge:")]
    assert len(said) == 1
    assert culprit in said[0]
    assert not (tmp_path / "tuned").exists()


def test_a_tokenizer_without_an_end(esmerge, write_recipe, llama, tmp_path):
    base = shutil.copytree(llama / "base", tmp_path / "base")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).exists():
            settings = json.loads((base / name).read_text())
            (base / name).write_text(json.dumps({**settings, "eos_token": None}))
    code, _, err = esmerge("finetune", write_recipe(model=str(base)), "-o", tmp_path / "tuned", "--quiet")
    assert code == 2, err
    assert "has no token that ends an answer: set eos_token" in err
    assert not (tmp_path / "tuned").exists()


def test_the_output_exists(esmerge, write_recipe, tmp_path):
    (tmp_path / "tuned").mkdir()
    code, _, err = esmerge("finetune", write_recipe(), "-o", tmp_path / "tuned")
    assert code == 2
    assert "exists" in err


def test_every_example_is_seen_once_in_an_epoch(tokenizer):
    examples = [TokenizedExample([1] * (n % 7 + 1), [2]) for n in range(37)]
    for ranks, per_epoch in ((1, 1), (1, 3), (2, 2), (3, 4)):
        data = FinetuningData(examples, [], MllmProcessor(tokenizer), 4, 2, per_epoch, 0, ranks)
        rounds = [[data.round_batches(number, rank) for rank in range(ranks)] for number in range(data.rounds)]
        assert all(len({len(own) for own in shares}) == 1 for shares in rounds)
        steps = [[own[step] for own in shares] for shares in rounds for step in range(len(shares[0]))]
        assert len(steps) == data.steps == 2 * data.steps_per_epoch
        for epoch in range(2):
            batches = [b for step in steps[epoch * data.steps_per_epoch :][: data.steps_per_epoch] for b in step]
            assert sorted(index for batch in batches[: -(-37 // 4)] for index in batch) == list(range(37))


@pytest.fixture
def with_encoder(llama, modality_settings, tmp_path):
    """A multimodal checkpoint and an adapter with `modalities/`, both with an encoder for molecules."""
    torch.manual_seed(0)
    modality = modality_from_settings(modality_settings["molecule"], "molecule")
    encoder = modality.build(32)
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    save_encoder(modality, encoder, adapter / MODALITIES_FOLDER / "molecule")
    llm = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
    processor = MllmProcessor(AutoTokenizer.from_pretrained(llama / "base"), {"molecule": modality})
    assemble(llm, processor, {"molecule": encoder}).save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    return {"adapter": adapter, "full": tmp_path / "full"}


def test_training_on_a_device_that_is_not_the_cpu(
    esmerge, run_on_other_device, write_recipe, with_encoder, llama, tmp_path
):
    base = str(llama / "base")
    options = {"train_encoders": True, "epochs": 1, "lora": None, "precision": "float32"}
    file = write_recipe(model=str(with_encoder["adapter"]), base=base, **options)
    assert esmerge("finetune", file, "-o", tmp_path / "here", "--quiet", "--accelerator", "cpu")[0] == 0
    there = ["finetune", file, "-o", tmp_path / "there", "--quiet", "--accelerator", "other"]
    assert run_on_other_device(there) > 0
    for name in ("adapter_model.safetensors", "modalities/molecule/model.safetensors"):
        there, here = (load_file(tmp_path / folder / name) for folder in ("there", "here"))
        torch.testing.assert_close(there, here, rtol=0, atol=1e-3)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_encoders_are_trained_along_if_that_is_asked_for(
    esmerge, write_recipe, with_encoder, llama, tmp_path, kind, trained
):
    base = str(llama / "base") if kind == "adapter" else None
    file = write_recipe(model=str(with_encoder[kind]), base=base, train_encoders=trained, epochs=1)
    code, _, err = esmerge("finetune", file, "-o", tmp_path / "tuned", "--quiet")
    assert code == 0, err
    before, after = load_model(with_encoder[kind], base)[0], load_model(tmp_path / "tuned")[0]
    pairs = zip(before.encoders.parameters(), after.encoders.parameters(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs) is not trained
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert not torch.allclose(before(input_ids=ids).logits, after(input_ids=ids).logits, atol=1e-3)
    assert (tmp_path / "tuned" / "adapter_config.json").exists() is (kind == "adapter")
    assert esmerge("evaluate", tmp_path / "tuned", "--task", tmp_path / "toy.yaml", "--quiet")[0] == 0


def test_two_processes_train_encoders_that_are_not_in_every_batch(start, write_recipe, with_encoder, llama, tmp_path):
    recipe = yaml.safe_load(
        write_recipe(
            model=str(with_encoder["adapter"]), base=str(llama / "base"), train_encoders=True, epochs=1
        ).read_text()
    )
    # A second task asks about the text alone.
    task = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    (tmp_path / "text.yaml").write_text(yaml.safe_dump({**task, "name": "text", "modalities": ["none"]}))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({**recipe, "tasks": ["toy.yaml", "text.yaml"], "batch_size": 2}))
    process = start(tmp_path / "both.yaml", tmp_path / "tuned", "--devices", 2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert yaml.safe_load((tmp_path / "tuned" / "finetuning.yaml").read_text())["samples"] == {"toy": 40, "text": 40}
