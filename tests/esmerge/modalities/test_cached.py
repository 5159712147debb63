"""Features from another environment."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

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


def test_only_what_is_asked_for_is_read(tmp_path):
    """From a file that no memory holds and no disk has room for."""
    size = 1 << 42
    header = {
        "much": {"dtype": "F32", "shape": [size // 24, 6], "data_offsets": [0, size // 24 * 24]},
        "CCO": {"dtype": "F32", "shape": [1, 6], "data_offsets": [size // 24 * 24, size // 24 * 24 + 24]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "features.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(8 + len(text) + size // 24 * 24)
        file.write(torch.arange(6, dtype=torch.float32).numpy().tobytes())
    modality = modality_from_settings(SETTINGS, "settings", tmp_path)
    assert modality.features("CCO")["values"].tolist() == [[0, 1, 2, 3, 4, 5]]


class Molecules(torch.utils.data.Dataset):
    def __init__(self, modality, items):
        self.modality, self.items = modality, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.modality.features(self.items[index])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_read_by_workers(folder, method):
    modality = modality_from_settings(SETTINGS, "settings", folder)
    items = ["CCO", "C#N"] * 4
    expected = modality.collate([modality.features(item) for item in items])
    loader = DataLoader(
        Molecules(modality, items),
        batch_size=4,
        collate_fn=modality.collate,
        num_workers=2,
        multiprocessing_context=method,
    )
    batches = list(loader)
    for name, whole in expected.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), whole)


def test_a_file_that_was_replaced_is_read_anew(folder):
    modality = modality_from_settings(SETTINGS, "settings", folder)
    before = modality.features("CCO")["values"]
    changed = load_file(folder / "features.safetensors") | {"CCO": torch.ones(4, 6)}
    (folder / "features.safetensors").unlink()
    save_file(changed, folder / "features.safetensors")
    assert before.shape == (2, 6) and modality.features("CCO")["values"].shape == (4, 6)


def test_the_projector_needs_no_file(folder, make, run, tmp_path):
    """As where a multimodal checkpoint is built from its config alone."""
    modality, encoder = make(SETTINGS, 16, folder)
    save_encoder(modality, encoder, tmp_path / "saved")
    (tmp_path / "saved/features.safetensors").unlink()
    again = load_encoder(open_modality(tmp_path / "saved"), tmp_path / "saved", 16)
    assert torch.equal(run(modality, again, ["CCO"])[0], run(modality, encoder, ["CCO"])[0])
