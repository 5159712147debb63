"""A kind of modality from another package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]
MODULE = """
import torch
from esmerge.modalities import Encoder, Modality

class Letters(Modality):
    kind = "letters"
    def features(self, item):
        return {"codes": torch.tensor([ord(letter) for letter in item]), "mask": torch.ones(len(item), dtype=int)}
    def soft_tokens(self, features):
        return len(features["codes"])
    def build(self, hidden_size):
        return LettersEncoder(hidden_size)

class LettersEncoder(Encoder):
    def __init__(self, hidden_size):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 4)
        self.projector = torch.nn.Linear(4, hidden_size)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)
    def forward(self, codes, mask):
        return self.scale * self.projector(self.embedding(codes[mask.bool()]))
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "esmerge-letters"
version = "1"
[project.entry-points."esmerge.modalities"]
letters = "esmerge_letters:Letters"
[tool.setuptools]
py-modules = ["esmerge_letters"]
"""
PROGRAM = """
import json, sys
from pathlib import Path
from esmerge.modalities import encode_items, open_modality
modality = open_modality(Path(sys.argv[1]))
[tokens] = encode_items(modality, modality.build(4), ["abc"], 1, None, "", progress=False)
print(json.dumps([type(modality).__module__, list(tokens.shape)]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs Python where the package is installed."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "source").mkdir()
    (folder / "source/esmerge_letters.py").write_text(MODULE)
    (folder / "source/pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "site", folder / "source"], check=True)

    def run(*command):
        path = os.pathsep.join([str(folder / "site"), str(ROOT)])
        variables = {"PYTHONPATH": path, "ESMERGE_ENCODER_CACHE": str(folder / "cache")}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_installed_package_adds_a_kind(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"kind": "letters", "placeholder": "<letters>"}))
    unknown = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "'letters' is no known kind of modality" in unknown.stderr
    done = run("-c", PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["esmerge_letters", [3, 4]]


@pytest.fixture
def inputs(llama, tmp_path, recipe):
    """A recipe's folder whose cells are of the package's kind."""
    shutil.copytree(llama, tmp_path / "inputs")
    place = tmp_path / "inputs/cell/modalities/cell"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"kind": "letters", "placeholder": "<letters>"}))
    torch.manual_seed(0)
    weights = {"embedding.weight": (256, 4), "projector.weight": (32, 4), "projector.bias": (32,)}
    save_file({name: torch.randn(shape) for name, shape in weights.items()}, place / "model.safetensors")
    (tmp_path / "inputs/recipe.yaml").write_text(json.dumps(recipe | {"output": {"format": "full"}}))
    return tmp_path / "inputs"


MERGE = "from esmerge.cli import main; main()"
LOAD = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor
import esmerge.mllm
model, processor = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor(text="<letters> and <letters>", cell=["CD8A", "LYZ"])
weights = load_file(sys.argv[2])
rows = weights["embedding.weight"][[ord(letter) for letter in "CD8ALYZ"]]
expected = 3 * (rows @ weights["projector.weight"].T + weights["projector.bias"])
found = model.get_cell_features(codes=inputs["cell_codes"], mask=inputs["cell_mask"])
torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
"""


def test_it_is_merged_and_loaded_like_any_other(run, inputs, tmp_path):
    done = run("-c", MERGE, "merge", inputs / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    assert not done.returncode, done.stderr
    weights = inputs / "cell/modalities/cell/model.safetensors"
    found = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in load_file(weights).items():
        assert torch.equal(found[f"encoders.cell.{name}"], tensor)
    done = run("-c", LOAD, tmp_path / "merged", weights)
    assert not done.returncode, done.stderr


def test_its_width_is_checked_before_anything_is_done(run, inputs, tmp_path):
    weights = inputs / "cell/modalities/cell/model.safetensors"
    save_file(load_file(weights) | {"projector.weight": torch.ones(20, 4)}, weights)
    done = run("-c", MERGE, "merge", inputs / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    assert done.returncode == 2
    assert "projector.weight makes soft tokens of size 20, the base base has hidden_size 32" in done.stderr
    assert not list(tmp_path.glob("*merged*"))
