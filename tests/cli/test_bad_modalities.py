"""Bad items, encoders and settings of modalities: one sentence before anything is encoded, and nothing left behind."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

CASES = []


def case(*words, command="merge"):
    """Registers a function that spoils an input; all words must be in the message."""

    def register(spoil):
        CASES.append(pytest.param(spoil, words, command, id=spoil.__name__.replace("_", " ")))
        return spoil

    return register


class Inputs:
    """A recipe, and the specialists with encoders that it names, in a folder of their own."""

    def __init__(self, folder, recipe):
        self.folder, self.recipe = folder, recipe

    def __truediv__(self, name):
        return self.folder / name

    def modality(self, name):
        return self / name / "modalities" / name

    def settings(self, name, **fields):
        file = self.modality(name) / "config.json"
        content = {key: value for key, value in (json.loads(file.read_text()) | fields).items() if value is not None}
        file.write_text(json.dumps(content))

    def tensors(self, name, change):
        file = self.modality(name) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def item(self, name, line, text):
        file = self / f"{name}.txt"
        lines = file.read_text().splitlines()
        lines[line - 1] = text
        file.write_text("\n".join(lines) + "\n")

    def cached(self, items, **fields):
        """Makes molecules a modality with features of some items."""
        shutil.rmtree(self.modality("molecule"))
        self.modality("molecule").mkdir()
        settings = {"kind": "cached", "placeholder": "<mol>", "width": 6, **fields}
        (self.modality("molecule") / "config.json").write_text(json.dumps(settings))
        projector = {"projector.weight": torch.randn(32, 6), "projector.bias": torch.randn(32)}
        save_file(projector, self.modality("molecule") / "model.safetensors")
        if items is not None:
            features = {item: torch.randn(2, 6) for item in items}
            save_file(features, self.modality("molecule") / "features.safetensors")


@pytest.fixture
def inputs(multimodal, tmp_path, recipe):
    shutil.copytree(multimodal, tmp_path / "inputs")
    return Inputs(tmp_path / "inputs", recipe)


MOLECULES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "C#N"]

# Items


@case("probe.data.molecule", "molecule.txt, line 3", "'C1CC' is no valid SMILES", "leave it out")
def invalid_smiles(inputs):
    inputs.item("molecule", 3, "C1CC")


@case("molecule.txt, line 2 (also at fault: 3, 5)", "'xyz' is no valid SMILES")
def several_invalid_smiles(inputs):
    for line in (2, 3, 5):
        inputs.item("molecule", line, "xyz")


@case("molecule.txt, line 4", "'CCÖ' is no valid SMILES")
def smiles_with_foreign_letters(inputs):
    inputs.item("molecule", 3, "\n" + "CCÖ")


@case("protein.txt, line 5", "'MKJ'", "'J' at position 3", "no amino acid")
def letter_that_is_no_amino_acid(inputs):
    inputs.item("protein", 5, "MKJ")


@case("base has no tokenizer", "tokenizer.save_pretrained")
def base_without_a_tokenizer(inputs):
    for file in (inputs / "base").glob("tokenizer*"):
        file.unlink()
    del inputs.recipe["probe"]
    inputs.recipe |= {"coefficients": "uniform", "output": {"format": "full"}}


@case("cell.txt, line 1", "<cell> is empty (', ,')", command="compare")
def empty_gene_list(inputs):
    inputs.item("cell", 1, ", ,")


@case("cell.txt, line 2", "empty ('[]')")
def empty_gene_list_without_a_modality(inputs):
    shutil.rmtree(inputs / "cell" / "modalities")
    inputs.item("cell", 2, "[]")


@case("cell.txt, line 2", "'CD3D <mol>' has <mol> in it")
def item_with_a_placeholder_in_it(inputs):
    inputs.item("cell", 2, "CD3D <mol>")


@case("molecule.txt, line 5", "features.safetensors has no features of 'C#N'", "export them")
def item_without_cached_features(inputs):
    inputs.cached(MOLECULES[:4])


@case("molecule.txt, line 1", "features.safetensors is missing")
def cached_features_that_are_missing(inputs):
    inputs.cached(None)


@case("features.safetensors is truncated")
def cached_features_that_are_truncated(inputs):
    inputs.cached(MOLECULES)
    file = inputs.modality("molecule") / "features.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@case("the features of 'CCO' have shape [2, 6], expected [n, 7]")
def cached_features_of_another_width(inputs):
    inputs.cached(MOLECULES, width=7)
    inputs.tensors("molecule", lambda tensors: tensors.update({"projector.weight": torch.zeros(32, 7)}))


# Modalities and the probe


@case("probe.template has <mol> in it", "write {molecule}")
def placeholder_in_the_template(inputs):
    inputs.recipe["probe"]["template"] += " <mol>"


@case("probe.data has no modality protein, which the specialist protein needs")
def encoder_that_no_probe_item_is_for(inputs):
    del inputs.recipe["probe"]["data"]["protein"]
    inputs.recipe["probe"]["template"] = "{molecule} {cell}"


@case("molecule and cell have the same placeholder, <mol>", "give one of them another")
def two_specialists_with_one_placeholder(inputs):
    inputs.settings("cell", placeholder="<mol>")


@case("molecule.encoder gives another", "remove one of them")
def two_encoders_of_one_specialist(inputs):
    inputs.recipe["specialists"]["molecule"]["encoder"] = "protein/modalities/protein"


@case("no modality cell, only molecule", "name the specialist molecule")
def two_specialists_that_claim_one_modality(inputs):
    shutil.rmtree(inputs / "cell")
    shutil.copytree(inputs / "molecule", inputs / "cell")


# Encoders


@case("projector.fc2.weight makes soft tokens of size 20", "the base base has hidden_size 32", command="compare")
def encoder_of_another_llm(inputs):
    inputs.tensors("protein", lambda tensors: tensors.update({"projector.fc2.weight": torch.zeros(20, 20)}))


@case("the encoder of protein in", "lacks projector.fc1.bias")
def encoder_that_lacks_a_tensor(inputs):
    inputs.tensors("protein", lambda tensors: tensors.pop("projector.fc1.bias"))


@case("the encoder of molecule in", "has unexpected extra")
def encoder_with_a_tensor_that_nothing_uses(inputs):
    inputs.tensors("molecule", lambda tensors: tensors.update(extra=torch.zeros(2)))


@case("fc1.weight has shape [32, 9]", "expected")
def encoder_of_other_settings(inputs):
    inputs.tensors("molecule", lambda tensors: tensors.update({"fc1.weight": torch.zeros(32, 9)}))


@case("encoder makes NaN or infinite values of", "save it again")
def nan_in_an_encoder(inputs):
    inputs.tensors("molecule", lambda tensors: tensors["projector.weight"].fill_(torch.nan))


@case("as a pickle")
def pickled_encoder(inputs):
    file = inputs.modality("protein") / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))


@case("'smell' is no known kind of modality", "install its package")
def unknown_kind(inputs):
    inputs.settings("molecule", kind="smell")


@case("modalities/molecule", "tokens", "greater than 0")
def setting_that_cannot_be(inputs):
    inputs.settings("molecule", tokens=0)


@case("modalities/cell/config.json is no valid JSON")
def settings_that_are_no_json(inputs):
    (inputs.modality("cell") / "config.json").write_text("{")


@case("Mol-LLaMA's package cannot be imported", "export_mol_llama.py", "the kind cached")
def encoder_whose_package_is_missing(inputs):
    inputs.settings("molecule", kind="mol_llama", n_bits=None, tokens=None, radius=None, intermediate_size=None)
    inputs.tensors("molecule", lambda tensors: [tensors.pop(name) for name in list(tensors)])
    inputs.tensors("molecule", lambda tensors: tensors.update({"llm_proj.weight": torch.zeros(32, 4)}))


@case("cached: features of width 6 do not fit", "hidden size 32")
def cached_features_that_need_a_projector(inputs):
    inputs.cached(MOLECULES, projector="none")


@case("specialists.molecule.features: the file", "does not exist")
def features_that_do_not_exist(inputs):
    inputs.recipe["specialists"]["molecule"]["features"] = "nowhere.safetensors"


@pytest.mark.parametrize(("spoil", "words", "command"), CASES)
def test_one_sentence_and_nothing_done(inputs, esmerge, tmp_path, monkeypatch, spoil, words, command):
    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft_tokens"))
    spoil(inputs)
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(inputs.recipe, sort_keys=False))
    before = sorted(inputs.folder.rglob("*"))
    options = ["--method", "linear", "--method", "ties"] if command == "compare" else []
    code, out, err = esmerge(command, inputs / "recipe.yaml", "-o", tmp_path / "merged", "--quiet", *options)
    assert code == 2, err
    assert not out
    assert err.startswith("esmerge: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert sorted(inputs.folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"], "nothing was encoded or written"


def test_merged_without_its_package(inputs, esmerge, tmp_path):
    """What is only copied need not run."""
    encoder_whose_package_is_missing(inputs)
    inputs.recipe["coefficients"] = "uniform"
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(inputs.recipe, sort_keys=False))
    code, _, err = esmerge("merge", inputs / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    assert not code, err
    copied = load_file(tmp_path / "merged/modalities/molecule/model.safetensors")
    assert torch.equal(copied["llm_proj.weight"], torch.zeros(32, 4))
