"""Code that comes with a checkpoint runs if the user says so, and never otherwise."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
CONFIGURATION = """
import os
from pathlib import Path
from transformers import LlamaConfig

Path(os.environ["MARK"]).write_text("the code has run")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
LOAD = """
import sys
import torch
from esmerge import load_model
model, processor = load_model(sys.argv[1], sys.argv[2] or None, trust_remote_code=sys.argv[3] == "trust")
with torch.no_grad():
    logits = model(input_ids=torch.arange(9)[None]).logits
print(type(model.language_model).__name__, float(logits.double().sum()))
"""


@pytest.fixture
def world(llama, multimodal, tmp_path, recipe):
    """A base with code of its own, a recipe, and a function that runs a command; whether the code ran is `mark`."""
    folder = tmp_path / "inputs"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "base/config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "base/config.json").write_text(json.dumps(config))
    (folder / "base/configuration_own.py").write_text(CONFIGURATION)
    (folder / "base/modeling_own.py").write_text(MODELING)

    class World:
        mark = tmp_path / "mark"
        inputs = folder
        content = recipe

        def run(self, *command):
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
            variables = {"MARK": str(self.mark), "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
            return subprocess.run(
                [*map(str, command)], env={**os.environ, **variables}, capture_output=True, text=True, check=False
            )

        def esmerge(self, command, output, *options):
            program = [sys.executable, "-c", "from esmerge.cli import main; main()"]
            return self.run(*program, command, folder / "recipe.yaml", "-o", output, "--quiet", *options)

        def load(self, model, base="", trust=""):
            return self.run(sys.executable, "-c", LOAD, model, base, trust)

    return World()


@pytest.mark.parametrize("command", ["merge", "compare"])
def test_base_is_refused_without_the_flag(world, tmp_path, command):
    done = world.esmerge(
        command, tmp_path / "merged", *(["--method=linear", "--method=ties"] if command == "compare" else [])
    )
    assert done.returncode == 2
    assert done.stderr.startswith("esmerge: the base base is a 'own_llama', which only code of its own can build")
    assert "--trust-remote-code" in done.stderr and done.stderr.count("\n") == 1
    assert not world.mark.exists() and not (tmp_path / "merged").exists()


def test_specialist_is_refused_without_the_flag(world, llama, tmp_path):
    shutil.move(world.inputs / "base", world.inputs / "own")
    shutil.copytree(llama / "base", world.inputs / "base")
    world.content["specialists"]["cell"] = {"model": "own"}
    done = world.esmerge("merge", tmp_path / "merged")
    assert done.returncode == 2
    assert done.stderr.startswith("esmerge: the specialist cell is a 'own_llama'")
    assert "--trust-remote-code" in done.stderr and done.stderr.count("\n") == 1
    assert not world.mark.exists()


def test_with_the_flag_it_is_a_base_like_any_other(world, llama, merge, tmp_path):
    # Which tokenizer transformers makes of one set of files depends on the model's type.
    mask = torch.arange(6).expand(3, 6) == 2
    probe = {"inputs_embeds": torch.randn(3, 6, 32), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    probe |= {f"mask.{name}": mask.clone() for name in world.content["specialists"]}
    save_file(probe, tmp_path / "probe.safetensors")
    world.content["probe"] = {"tensors": str(tmp_path / "probe.safetensors")}
    world.content["output"] = {"format": "full"}
    done = world.esmerge("merge", tmp_path / "merged-own", "--trust-remote-code")
    assert not done.returncode, done.stderr
    assert world.mark.exists()
    plain = merge(world.content)
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged-own", plain))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    record = yaml.safe_load((tmp_path / "merged-own/esmerge.yaml").read_text())
    assert record["inputs"]["base"]["code"].keys() == {"configuration_own.py", "modeling_own.py"}

    world.mark.unlink()
    refused = world.load(tmp_path / "merged-own")
    assert "is a 'own_llama'" in refused.stderr and "--trust-remote-code" in refused.stderr
    assert not world.mark.exists()
    loaded, reference = world.load(tmp_path / "merged-own", trust="trust"), world.load(plain)
    assert loaded.stdout.split()[0] == "OwnForCausalLM", loaded.stderr
    assert loaded.stdout.split()[1] == reference.stdout.split()[1], reference.stderr


def test_adapter_with_encoders(world, multimodal, tmp_path):
    for name in ("molecule", "protein", "cell"):
        shutil.copytree(multimodal / name / "modalities", world.inputs / name / "modalities")
    world.content["coefficients"] = "uniform"
    done = world.esmerge("merge", tmp_path / "merged", "--trust-remote-code")
    assert not done.returncode, done.stderr
    refused = world.load(tmp_path / "merged", world.inputs / "base")
    assert "the base" in refused.stderr and "--trust-remote-code" in refused.stderr
    loaded = world.load(tmp_path / "merged", world.inputs / "base", "trust")
    assert not loaded.returncode and loaded.stdout.startswith("Peft"), loaded.stderr
    # transformers has no way to build a multimodal model around an LLM that it does not know.
    world.content["output"] = {"format": "full"}
    done = world.esmerge("merge", tmp_path / "full", "--trust-remote-code")
    assert done.returncode == 2 and "output.format: adapter" in done.stderr


def test_code_that_is_not_needed_is_left_behind(world, tmp_path):
    """A Llama that also names code of its own is built by transformers."""
    config = json.loads((world.inputs / "base/config.json").read_text())
    (world.inputs / "base/config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    world.content |= {"coefficients": "uniform", "output": {"format": "full"}}
    done = world.esmerge("merge", tmp_path / "merged")
    assert not done.returncode, done.stderr
    assert not world.mark.exists() and not list((tmp_path / "merged").glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).__name__ == "LlamaForCausalLM"


def test_fine_tuning(world, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "a,Yes\nb,No\n" * 4)
    task = {"name": "toy", "source": {"files": {"train": "train.csv"}}, "columns": {"text": "text"}, "answer": "label"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**task, "prompt": "Is it {text}?", "choices": ["Yes", "No"]}))
    recipe = {"model": str(world.inputs / "base"), "tasks": ["toy.yaml"], "validation": None}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(recipe))
    program = [sys.executable, "-c", "from esmerge.cli import main; main()", "finetune", tmp_path / "tune.yaml"]
    done = world.run(*program, "-o", tmp_path / "tuned", "--quiet")
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr
    assert not world.mark.exists() and not (tmp_path / "tuned").exists()
    done = world.run(*program, "-o", tmp_path / "tuned", "--quiet", "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert world.mark.exists() and (tmp_path / "tuned" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("encoders", [False, True])
def test_tokenizer_with_code_of_its_own(world, llama, multimodal, tmp_path, encoders):
    shutil.copy(llama / "base/config.json", world.inputs / "base")
    settings = json.loads((world.inputs / "base/tokenizer_config.json").read_text())
    own = "tokenization_own.OwnTokenizer"
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, own]}}
    (world.inputs / "base/tokenizer_config.json").write_text(json.dumps(settings))
    code = "from transformers import PreTrainedTokenizerFast\nimport os\nfrom pathlib import Path\n"
    code += "Path(os.environ['MARK']).write_text('')\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (world.inputs / "base/tokenization_own.py").write_text(code)
    if encoders:
        shutil.copytree(multimodal / "protein/modalities", world.inputs / "protein/modalities")
        world.content["output"] = {"format": "full"}
    done = world.esmerge("merge", tmp_path / "merged")
    assert done.returncode == 2, done.stderr
    assert "the tokenizer of base needs code of its own" in done.stderr and "--trust-remote-code" in done.stderr
    assert not world.mark.exists() and not (tmp_path / "merged").exists()
    done = world.esmerge("merge", tmp_path / "merged", "--trust-remote-code")
    assert not done.returncode, done.stderr
    assert world.mark.exists()
