import csv
import json
import random
import shutil

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Larger than usual, so that a random model's answers differ in likelihood by more than rounding.
    "initializer_range": 0.3,
}


@pytest.fixture
def tiny_settings():
    """Settings that every decoder's configuration class knows."""
    return TINY


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


@pytest.fixture
def write_task(tmp_path):
    """A function that writes a task about molecules of very different length, and its data; returns its file."""

    def write(samples=23, name="toy", **changes):
        generator = random.Random(samples)
        atoms = ["C", "N", "O", "CC", "C(=O)", "c1ccccc1"]
        rows = [("smiles", "soluble")]
        for _ in range(samples):
            rows.append(("".join(generator.choices(atoms, k=generator.randint(1, 9))), generator.randint(0, 1)))
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
        task = {
            "name": name,
            "version": 1,
            "title": "Solubility",
            "description": "Made up.",
            "source": {"files": {"test": f"{name}.csv"}},
            "columns": {"molecule": "smiles"},
            "answer": "soluble",
            "labels": {1: "Yes", 0: "No way"},
            "prompt": "Molecule: {molecule}\nDoes it dissolve?",
            "choices": ["Yes", "No way"],
            "metrics": ["accuracy", "macro_f1", "mcc", "auroc", "average_precision"],
            "max_new_tokens": 6,
            "citation": "none",
            "licence": "cc0-1.0",
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(task, sort_keys=False))
        return file

    return write


@pytest.fixture
def text_model(llama, tmp_path):
    """A folder with a text model of one's own, whose results go beside it."""
    return shutil.copytree(llama / "base", tmp_path / "model")


@pytest.fixture
def results_of():
    """A function that reads results and log of a task from a model's folder."""

    def read(folder, task="toy"):
        results = json.loads((folder / "results" / f"{task}.json").read_text())
        lines = (folder / "results" / f"{task}.jsonl").read_text().splitlines()
        return results, [json.loads(line) for line in lines]

    return read
