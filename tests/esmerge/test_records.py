"""The record of a merge does it again from anywhere, with the very inputs that it had."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from esmerge.sources import checkpoint_hash, content_hash

NAMES = ["molecule", "protein", "cell"]


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def project(llama, tmp_path, recipe, monkeypatch):
    """A folder with the files of `llama` and a recipe for them in `cfg`, which is the current folder."""
    folder = shutil.copytree(llama, tmp_path / "project")
    recipe["base"] = "../base"
    recipe["specialists"] = {name: f"../{name}" for name in NAMES}
    recipe["probe"]["data"] = {name: f"../{name}.txt" for name in NAMES}
    (folder / "cfg").mkdir()
    (folder / "cfg" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def record(project, esmerge):
    """The record of a merge with that recipe."""
    code, _, err = esmerge("merge", "cfg/recipe.yaml", "-o", "results/merged", "--quiet")
    assert code == 0, err
    return project / "results" / "merged" / "esmerge.yaml"


@pytest.fixture
def refused(record, esmerge):
    """A function that merges from the record in vain, and returns the sentence."""

    def run(*options, command="merge"):
        code, _, err = esmerge(command, record, "-o", record.parent.parent / "refused", "--quiet", *options)
        assert code == 2, err
        assert err.startswith("esmerge: ") and err.count("\n") == 1
        assert [entry.name for entry in record.parent.parent.iterdir()] == ["merged"]
        return err

    return run


def retrain(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_does_it_again_from_anywhere(project, record, esmerge, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(record, "copy.yaml")
    for number, file in enumerate([record, "copy.yaml"]):
        code, _, err = esmerge("merge", file, "-o", f"again-{number}", "--quiet")
        assert code == 0, err
        assert files_of(tmp_path / "elsewhere" / f"again-{number}") == files_of(record.parent)


class TestChangedInputs:
    def test_specialist(self, project, record, refused, esmerge):
        retrain(project / "molecule")
        sentence = f"specialists.molecule: {project}/molecule is not what it was when {record} was written"
        assert sentence in refused() and "without its section inputs" in refused()

    def test_are_merged_without_the_section(self, project, record, esmerge):
        retrain(project / "molecule")
        content = yaml.safe_load(record.read_text())
        del content["inputs"]
        (project / "copy.yaml").write_text(yaml.safe_dump(content))
        for file, name in (("copy.yaml", "copied"), ("cfg/recipe.yaml", "now")):
            code, _, err = esmerge("merge", file, "-o", name, "--quiet")
            assert code == 0, err
        assert files_of(project / "copied") == files_of(project / "now")
        assert (
            files_of(project / "now")["adapter_model.safetensors"]
            != (record.parent / "adapter_model.safetensors").read_bytes()
        )

    def test_base(self, project, refused):
        config = json.loads((project / "base" / "config.json").read_text())
        (project / "base" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
        assert f"base: {project}/base is not what it was" in refused()

    def test_items_of_the_probe(self, project, refused):
        with (project / "cell.txt").open("a") as stream:
            stream.write("CD19\n")
        assert f"probe: {project}/cell.txt is not what it was" in refused()

    def test_are_found_by_a_comparison(self, project, refused):
        retrain(project / "molecule")
        assert "specialists.molecule" in refused("--method=linear", "--method=ties", command="compare")

    def test_that_are_replaced_on_purpose(self, project, record, refused, esmerge):
        shutil.copytree(project / "molecule", project / "retrained")
        retrain(project / "retrained")
        replaced = ("--set", f"specialists.molecule.model={project}/retrained")
        code, _, err = esmerge("merge", record, "-o", "replaced", "--quiet", *replaced)
        assert code == 0, err
        retrain(project / "protein")
        assert "specialists.protein" in refused(*replaced)
        assert "specialists.protein" in refused("--set", "seed=7")

    @pytest.mark.parametrize("inputs", [3, {"specialists": ["molecule"]}, {"probe": 1}, {"specialists": {"cell": 1}}])
    def test_section_that_cannot_be_read(self, record, refused, inputs):
        content = yaml.safe_load(record.read_text())
        record.write_text(yaml.safe_dump(content | {"inputs": inputs}))
        assert f"{record}: its section inputs is not as a merge wrote it: restore or remove it." in refused()


def test_changed_encoder(multimodal, recipe, esmerge, tmp_path):
    shutil.copytree(multimodal, tmp_path / "inputs")
    (tmp_path / "inputs" / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"coefficients": "uniform"}))
    code, _, err = esmerge("merge", tmp_path / "inputs" / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    assert code == 0, err
    file = tmp_path / "inputs" / "molecule" / "modalities" / "molecule" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    code, _, err = esmerge("merge", tmp_path / "merged" / "esmerge.yaml", "-o", tmp_path / "again", "--quiet")
    assert code == 2 and "specialists.molecule: the encoder is not what it was" in err


def test_a_licence_makes_a_folder_no_other_one_but_counts_as_a_file(llama, tmp_path):
    folder = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    before = checkpoint_hash(folder)
    (folder / "LICENSE.txt").write_text("Do what you like.")
    assert checkpoint_hash(folder) == before
    (folder / "notes.txt").write_text("Trained on Tuesday.")
    assert checkpoint_hash(folder) != before
    items = [tmp_path / "licensed_drugs.txt", tmp_path / "notices.txt"]
    for file, text in zip(items, ("CCO", "CCN"), strict=True):
        file.write_text(text)
    first = content_hash(items[0])
    items[0].write_text("CCC")
    assert len({first, *map(content_hash, items)}) == 3
