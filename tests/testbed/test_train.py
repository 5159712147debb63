"""Training of the specialists on a tiny base, and the trained ones that come with the testbed."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.testbed.base_model import base_model_folder
from benchmarks.testbed.data import MODALITIES, load_task
from benchmarks.testbed.packages import pinned_packages
from benchmarks.testbed.specialists import BASE_ID, FOLDER, PLANS, RECORD, specialist_folders
from benchmarks.testbed.train import train
from esmerge.mllm.loading import load_model
from esmerge.modalities import modality_from_settings
from esmerge.modalities.registry import modality_settings as settings_of
from esmerge.recipe import parse_recipe


def tensors(folder):
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_a_specialist_is_saved_in_bfloat16_without_the_base(trained):
    for modality in MODALITIES:
        found = tensors(trained / modality)
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        assert any("lora_B" in name and tensor.any() for name, tensor in found.items())
        assert all("lora_" in name or "modalities" in name for name in found)
        config = json.loads((trained / modality / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == BASE_ID
        text = "".join(file.read_text() for file in (trained / modality).rglob("*.json"))
        assert str(trained.parent) not in text and "/base" not in text
    assert not (trained / "cell" / "modalities" / "cell" / "model.safetensors").exists()


def test_encoders_are_trained(trained, plans):
    for modality in ("molecule", "protein"):
        torch.manual_seed(plans[modality].seed)
        saved = load_file(trained / modality / "modalities" / modality / "model.safetensors")
        fresh = modality_from_settings(plans[modality].settings, modality).build(32).state_dict()
        assert saved.keys() == fresh.keys()
        # Biases start at zero, and stay there unless a gradient reaches them.
        biases = [name for name, tensor in fresh.items() if name.endswith("bias") and not tensor.any()]
        moved = {name for name in biases if saved[name].any()}
        assert {name.split(".")[0] for name in moved} >= ({"projector"} if modality == "molecule" else {"encoder"})


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_same_seed_gives_the_same_specialist_to_the_last_bit(llama, plans, tiny_task, trained, tmp_path, modality):
    for name, plan in (("same", plans[modality]), ("other", replace(plans[modality], seed=7))):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(name))  # whatever happened before does not matter
        train(llama / "base", tiny_task(modality), plan, tmp_path / name)
    first, same, other = (tensors(folder) for folder in (trained / modality, tmp_path / "same", tmp_path / "other"))
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    for name in ("adapter_config.json", f"modalities/{modality}/config.json"):
        assert (trained / modality / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_training_leaves_the_randomness_and_threads_of_the_process_alone(llama, plans, tiny_task, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    train(llama / "base", tiny_task("cell"), plans["cell"], tmp_path)
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


def test_trained_specialists_load_and_merge(llama, tiny_task, trained, tmp_path, monkeypatch):
    from esmerge.pipeline import merge

    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft_tokens"))
    for modality in MODALITIES:
        model, processor = load_model(trained / modality, llama / "base")
        placeholder = processor.modalities[modality].placeholder
        inputs = processor(text=f"{placeholder}?", **{modality: [tiny_task(modality).examples["test"][0].item]})
        assert model(**inputs).logits.isfinite().all()
    recipe = {
        "base": "base",
        "specialists": {modality: {"model": str(trained / modality)} for modality in MODALITIES},
        "coefficients": "uniform",
        "output": {"format": "adapter", "rank": 12},
    }
    merge(parse_recipe(recipe, llama), tmp_path / "merged", progress=False)
    model, processor = load_model(tmp_path / "merged", llama / "base")
    assert set(processor.modalities) == set(MODALITIES) and set(model.encoders) == {"molecule", "protein"}
    assert model.generate(**processor(text="<mol>", molecule=["CCO"]), max_new_tokens=2).shape[1] > 3


def test_the_specialists_of_the_testbed_are_as_planned():
    sizes = 0
    for modality, folder in specialist_folders().items():
        record = json.loads((folder / RECORD).read_text())
        assert record["plan"] == asdict(PLANS[modality])
        assert record["samples"] == {split: len(those) for split, those in load_task(modality).examples.items()}
        # Packages for other tasks may have come since.
        assert (
            record["packages"].items() <= {name: package.version for name, package in pinned_packages().items()}.items()
        )
        processor_settings = json.loads((folder / "modalities" / modality / "config.json").read_text())
        assert processor_settings == settings_of(modality_from_settings(PLANS[modality].settings, modality))
        sizes += sum(file.stat().st_size for file in folder.rglob("*"))
    assert sizes <= 12e6


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_specialists_of_the_testbed_load(modality):
    model, processor = load_model(FOLDER / modality, base_model_folder())
    assert list(processor.modalities) == [modality]
    item = load_task(modality).examples["test"][0].item
    inputs = processor(text=processor.modalities[modality].placeholder, **{modality: [item]})
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
