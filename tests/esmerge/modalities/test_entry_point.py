"""A kind of modality from another package."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
        self.embedding = torch.nn.Embedding(256, hidden_size)
    def forward(self, codes, mask):
        return self.embedding(codes[mask.bool()])
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


def test_installed_package_adds_a_kind(tmp_path):
    source, site, modality = (tmp_path / name for name in ("source", "site", "modality"))
    for folder in (source, modality):
        folder.mkdir()
    (source / "esmerge_letters.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(PROJECT)
    (modality / "config.json").write_text(json.dumps({"kind": "letters", "placeholder": "<letters>"}))
    run = [sys.executable, "-c", PROGRAM, modality]
    unknown = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "'letters' is no known kind of modality" in unknown.stderr
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["esmerge_letters", [3, 4]]
