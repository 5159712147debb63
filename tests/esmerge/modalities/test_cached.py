"""Features from another environment."""

import pytest
import torch
from safetensors.torch import save_file

from esmerge.errors import InputError
from esmerge.modalities import load_encoder, modality_from_settings, open_modality, save_encoder

SETTINGS = {"kind": "cached", "placeholder": "<mol>", "width": 6}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    features = {"CCO": torch.randn(2, 6), "C#N": torch.randn(3, 6).half(), "flat": torch.randn(6)}
    features["broken"] = torch.full((1, 6), float("nan"))
    save_file(features, tmp_path / "features.safetensors")
    return tmp_path


@pytest.mark.parametrize("projector", ["linear", "mlp", "none"])
def test_soft_tokens(folder, make, run, projector):
    hidden = 6 if projector == "none" else 16
    modality, encoder = make({**SETTINGS, "projector": projector, "intermediate_size": 5}, hidden, folder)
    together = run(modality, encoder, ["C#N", "CCO"])
    assert [len(tokens) for tokens in together] == [3, 2]
    for item, tokens in zip(["C#N", "CCO"], together, strict=True):
        values = modality.features(item)["values"]
        torch.testing.assert_close(tokens, encoder.projector(values))


def test_saved_and_loaded_with_its_file(folder, make, run, tmp_path):
    modality, encoder = make(SETTINGS, 16, folder)
    save_encoder(modality, encoder, tmp_path / "saved")
    again = open_modality(tmp_path / "saved")
    loaded = load_encoder(again, tmp_path / "saved", 16)
    assert torch.equal(run(again, loaded, ["CCO"])[0], run(modality, encoder, ["CCO"])[0])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("CCC", "no features of 'CCC'"),
        ("flat", r"shape \[6\], expected \[n, 6\]"),
        ("broken", "NaN"),
    ],
)
def test_items_without_good_features(folder, item, words):
    modality = modality_from_settings(SETTINGS, "settings", folder)
    with pytest.raises(InputError, match=words) as error:
        modality.features(item)
    assert "features.safetensors" in str(error.value)


def test_missing_file(tmp_path):
    modality = modality_from_settings(SETTINGS, "settings", tmp_path)
    with pytest.raises(InputError, match="is missing"):
        modality.features("CCO")


def test_width_of_another_llm():
    modality = modality_from_settings({**SETTINGS, "projector": "none"}, "settings")
    with pytest.raises(InputError, match="width 6 do not fit an LLM of hidden size 16"):
        modality.build(16)


def test_mol_llama_without_its_package():
    modality = modality_from_settings({"kind": "mol_llama"}, "settings")
    assert modality.soft_tokens(modality.features("CCO")) == 8
    with pytest.raises(InputError, match="kind cached"):
        modality.build(16)
