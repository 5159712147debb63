"""Base, specialists and probe data from the Hub: pinned, downloaded as far as needed, refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import esmerge
from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError
from esmerge.hub import PartialCopies
from esmerge.mllm import MllmProcessor
from esmerge.pipeline import compare
from esmerge.pipeline import merge as run_merge
from esmerge.recipe import load_recipe, parse_recipe

NAMES = ("molecule", "protein", "cell")
# Where people put second copies of their weights, and what is nobody's business here.
CLUTTER = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"a second copy",
    "original/model.safetensors": b"a third",
    "onnx/model.onnx": b"a fourth",
    "training_args.bin": b"pickle",
    "README.md": b"# A model",
}


@pytest.fixture
def published(llama, on_hub, tmp_path):
    """The models and items of `llama` on the Hub; returns commits."""
    commits = {"base": on_hub(llama / "base", "owner/base")}
    on_hub(CLUTTER, "owner/base")
    for name in NAMES:
        commits[name] = on_hub(llama / name, f"lab/{name}", leave_out=["README.md"])
    items = {f"{name}.txt": (llama / f"{name}.txt").read_bytes() for name in NAMES}
    commits["data"] = on_hub(items, "owner/items", kind="datasets")
    return commits


@pytest.fixture
def hub_recipe(recipe, published):
    """The recipe of `llama`, with all that it names on the Hub."""
    recipe["base"] = "owner/base"
    recipe["specialists"] = {name: f"lab/{name}" for name in NAMES}
    recipe["probe"]["data"] = {name: f"hf://datasets/owner/items/{name}.txt" for name in NAMES}
    return recipe


@pytest.fixture
def merged(connected, tmp_path):
    """A function that merges a mapping, relative to an empty folder, and returns the output folder."""
    (tmp_path / "empty").mkdir()

    def merged(content, name="merged"):
        run_merge(parse_recipe(content, tmp_path / "empty"), tmp_path / name, progress=False)
        return tmp_path / name

    return merged


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights_requests(hub):
    return [r for r in hub.requests if r.method == "GET" and r.storage and r.file.endswith(".safetensors")]


def test_same_as_from_folders(hub_recipe, merged, merge, llama, published):
    content = json.loads(json.dumps(hub_recipe))
    content["base"] = "base"
    content["specialists"] = {name: name for name in NAMES}
    content["probe"]["data"] = {name: f"{name}.txt" for name in NAMES}
    ours, local = merged(hub_recipe), merge(content, "local")
    for name in ("adapter_model.safetensors", "coefficients.safetensors", "tokenizer.json"):
        assert (ours / name).read_bytes() == (local / name).read_bytes()


def test_record_has_commits_and_does_it_again(hub_recipe, merged, published, hub, on_hub, esmerge, tmp_path):
    first = merged(hub_recipe)
    record = yaml.safe_load((first / "esmerge.yaml").read_text())
    head = hub.repositories["models", "owner/base"].refs["refs/heads/main"]
    assert record["inputs"]["base"] == {"source": "owner/base", "commit": head}
    assert record["recipe"]["base"] == f"owner/base@{head}"
    for name in NAMES:
        assert record["inputs"]["specialists"][name] == {"source": f"lab/{name}", "commit": published[name]}
        file = f"hf://datasets/owner/items@{published['data']}/{name}.txt"
        assert record["recipe"]["probe"]["data"][name] == file
        assert file in record["inputs"]["probe"]
    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", head)
    # Everything moves on, which changes nothing for what is pinned.
    for name in NAMES:
        on_hub({"adapter_model.safetensors": b"broken"}, f"lab/{name}")
        on_hub({f"{name}.txt": b"changed"}, "owner/items", kind="datasets")
    on_hub({"config.json": b"{}"}, "owner/base")
    assert esmerge("merge", first / "esmerge.yaml", "-o", tmp_path / "again", "--quiet")[0] == 0
    assert files(tmp_path / "again") == files(first)


def test_only_needed_files_are_downloaded(hub_recipe, merged, hub):
    merged(hub_recipe)
    downloaded = hub.downloaded()
    assert not downloaded & CLUTTER.keys()
    assert {"model.safetensors", "adapter_model.safetensors", "tokenizer.json", "molecule.txt"} <= downloaded
    assert len([r for r in weights_requests(hub) if r.status == 200]) == 4
    hub.requests.clear()
    merged(hub_recipe, "again")
    assert not hub.downloaded(whole=False)


def test_revisions(hub_recipe, merged, hub, on_hub, llama, published, connected):
    repository = hub.repositories["models", "lab/molecule"]
    repository.refs["refs/tags/v1"] = published["molecule"]
    on_hub(llama / "cell", "lab/molecule", leave_out=["README.md"])
    expected = merged({**hub_recipe, "specialists": {**hub_recipe["specialists"], "molecule": "lab/molecule@v1"}})
    short = f"lab/molecule@{published['molecule'][:8]}"
    by_hash = merged({**hub_recipe, "specialists": {**hub_recipe["specialists"], "molecule": short}}, "short")
    assert files(by_hash) == files(expected)
    record = yaml.safe_load((expected / "esmerge.yaml").read_text())
    assert record["recipe"]["specialists"]["molecule"]["model"] == f"lab/molecule@{published['molecule']}"


def test_variants_share_one_commit(hub_recipe, connected, tmp_path):
    variants = {"linear": {"method": {"name": "linear"}}, "ties": {"method": {"name": "ties", "density": 0.5}}}
    compare(parse_recipe(hub_recipe, tmp_path), variants, tmp_path / "compared", progress=False)
    bases = {
        yaml.safe_load((tmp_path / "compared" / name / "esmerge.yaml").read_text())["recipe"]["base"]
        for name in variants
    }
    assert len(bases) == 1
    assert len([r for r in connected.requests if r.path.endswith("/owner/base")]) == 1


def test_what_does_not_fit_is_refused_by_its_header(hub_recipe, merged, make_base, on_hub, hub, llama, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(llama / "base").config
    config.intermediate_size = 40
    make_base(config, tmp_path / "other")
    on_hub(tmp_path / "other", "owner/other")
    with pytest.raises(InputError, match=r"lab/\w+ changes .*mlp.* with shape .*another base") as refused:
        merged({**hub_recipe, "base": "owner/other"})
    assert str(tmp_path) not in str(refused.value)
    assert {r.status for r in weights_requests(hub)} == {206}
    assert not (tmp_path / "merged").exists()


def test_large_headers_and_values_are_read_by_range(hub_recipe, merged, on_hub, hub, llama, tmp_path):
    """A full checkpoint with a long header, whose norms are compared with the base's before it is downloaded."""
    other = shutil.copytree(llama / "base", tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(other)
    from safetensors.torch import load_file, save_file

    metadata = {"format": "pt", "notes": "long " * 20000}
    save_file(load_file(other / "model.safetensors"), other / "model.safetensors", metadata=metadata)
    on_hub(other, "lab/full")
    hub_recipe["specialists"]["molecule"] = "lab/full"
    hub_recipe["output"] = {"format": "adapter", "rank": 4}
    with pytest.raises(InputError, match=r"molecule changes model\.norm\.weight, which a LoRA adapter cannot"):
        merged(hub_recipe)
    assert {r.status for r in weights_requests(hub)} == {206}


def refusal(merged, content):
    with pytest.raises(InputError) as refused:
        merged(content)
    message = str(refused.value)
    assert "\n" not in message.strip()
    assert "hf_" not in message.replace("hf_home", "")
    return message


def changed(recipe, **fields):
    return {**recipe, **fields}


def test_no_access(hub_recipe, merged, hub, monkeypatch, tmp_path):
    hub.repositories["models", "lab/protein"].gated = "manual"
    hub.repositories["models", "lab/cell"].private = True
    only_cell = changed(hub_recipe, specialists={name: f"lab/{name}" for name in ("molecule", "cell")})
    address = f"{hub.endpoint}/lab/protein"
    monkeypatch.setenv("HF_TOKEN", "hf_othersWriteToken")
    missing = "specialists.cell.model: lab/cell is no folder here, and the Hub has no such model"
    assert missing in refusal(merged, only_cell)
    gated = "specialists.protein.model: lab/protein is gated, and your token has no access to it: accept its licence"
    assert f"{gated} at {address}." in refusal(merged, hub_recipe)
    monkeypatch.delenv("HF_TOKEN")
    assert f"accept its licence at {address} and log in with `hf auth login`" in refusal(merged, hub_recipe)
    assert "for a private one, log in with `hf auth login`" in refusal(merged, only_cell)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept your token: log in again with `hf auth login`" in refusal(merged, hub_recipe)
    assert not (tmp_path / "merged").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_ownersReadToken")
    merged(hub_recipe)


@pytest.mark.parametrize(
    ("base", "culprit", "remedy"),
    [
        ("owner/bsae", "base: owner/bsae is no folder here, and the Hub has no such model", "check the spelling"),
        ("owner/base@v9", "owner/base has no revision v9", "it has main"),
        ("owner--base", "neither a folder nor a valid Hub id", "user/repo"),
        ("owner/pickled", "weights as pickles only (pytorch_model.bin)", "save_pretrained"),
        ("owner/torn", "lacks model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    ],
)
def test_faulty_repositories(hub_recipe, merged, on_hub, llama, hub, base, culprit, remedy):
    config = (llama / "base" / "config.json").read_bytes()
    on_hub({"config.json": config, "pytorch_model.bin": b"pickle"}, "owner/pickled")
    index = json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}).encode()
    on_hub({"config.json": config, "model.safetensors.index.json": index}, "owner/torn")
    message = refusal(merged, changed(hub_recipe, base=base))
    assert culprit in message
    assert remedy in message
    assert "pytorch_model.bin" not in hub.downloaded()


@pytest.mark.parametrize(
    ("file", "culprit"),
    [
        ("hf://datasets/owner/items/molecules.txt", "owner/items has no file molecules.txt (it has cell.txt, molecule"),
        ("hf://datasets/owner/nothing/molecule.txt", "the Hub has no such dataset"),
        ("hf://datasets/owner/items@v2/molecule.txt", "owner/items has no revision v2; it has main"),
        ("hf://datasets/owner/items", "names no file on the Hub"),
    ],
)
def test_faulty_references_to_data(hub_recipe, merged, file, culprit):
    hub_recipe["probe"]["data"]["molecule"] = file
    message = refusal(merged, hub_recipe)
    assert message.startswith("probe.data.molecule: ")
    assert culprit in message


def test_no_room(hub_recipe, merged, hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    assert "free some space, or set HF_HOME" in refusal(merged, hub_recipe)
    assert not weights_requests(hub)


def test_connections_that_break_off(hub_recipe, merged, hub):
    hub.fail(method="GET", path="owner/base.*model.safetensors", cut=50_000, skip=1)
    hub.fail(method="GET", path="lab/molecule.*adapter_model.safetensors", status=503)
    merged(hub_recipe)
    assert [r.status for r in weights_requests(hub) if "owner/base" in r.path].count(200) == 2


def test_rows_that_cannot_be_read_ahead(published, connected, hub):
    with PartialCopies() as copies:
        copies.add("owner/base", None, "base")
        hub.fail(path="owner/base.*model.safetensors", status=403, times=99)
        with (
            Checkpoint.open(copies.folders["owner/base", None]) as checkpoint,
            pytest.raises(InputError, match="base: the Hub answered 403 for owner/base: your token may not read it"),
        ):
            checkpoint.read("model.norm.weight")


def test_unreachable_or_failing(hub_recipe, merged, hub, monkeypatch):
    hub.fail(path="/api/models/owner/base", status=500, times=99)
    assert "the Hub answered 500 for owner/base: try again later" in refusal(merged, hub_recipe)
    hub.faults.clear()
    first = merged(hub_recipe, "first")
    hub.fail(drop=True, times=999)
    assert files(merged(hub_recipe, "cached")) == files(first)
    message = refusal(merged, changed(hub_recipe, base="owner/elsewhere"))
    assert "the connection to" in message
    assert "run the same command again" in message


def test_offline_without_a_cache(hub_recipe, merged, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(merged, hub_recipe)
    assert "owner/base is no folder here and not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub" in message
    assert "`hf download owner/base`" in message
    hub_recipe["base"] = str(Path("/"))
    hub_recipe["specialists"] = dict.fromkeys(NAMES, "/")
    assert "owner/items is not in the cache" in refusal(merged, hub_recipe)
    assert not hub.requests


def test_offline(hub_recipe, published, online, hub, esmerge_program, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(hub_recipe))
    command = (esmerge_program, "merge", tmp_path / "recipe.yaml", "--quiet", "-o")
    first = online(*command, tmp_path / "first")
    assert first.returncode == 0, first.stderr
    assert "%|" not in first.stderr
    hub.requests.clear()
    again = online(*command, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert not hub.requests
    assert files(tmp_path / "again") == files(tmp_path / "first")


def test_merged_adapter_loads_from_the_hub(hub_recipe, merged, on_hub, tokenizer):
    local = merged(hub_recipe)
    commit = on_hub(local, "owner/merged")
    on_hub({"adapter_config.json": b"{}"}, "owner/merged")
    on_hub({"config.json": b"{}"}, "owner/base")
    config = json.loads((local / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained("owner/base", revision=config["revision"])
    model = PeftModel.from_pretrained(base, "owner/merged", revision=commit)
    ours, processor = esmerge.load_model(f"owner/merged@{commit}")
    inputs = AutoTokenizer.from_pretrained("owner/merged", revision=commit)(["Molecule: CCO"], return_tensors="pt")
    assert processor(text=["Molecule: CCO"])["input_ids"].tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**inputs).logits)


def test_merged_shards_load_from_the_hub(hub_recipe, merged, on_hub, hub, tmp_path):
    folder = merged({**hub_recipe, "output": {"format": "full"}})
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shutil.copytree(folder, tmp_path / "shards", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    on_hub(tmp_path / "shards", "owner/full")
    hub.requests.clear()
    model = AutoModelForCausalLM.from_pretrained("owner/full")
    loaded, _ = esmerge.load_model("owner/full")
    with Checkpoint.open(folder) as expected:
        state = model.state_dict()
        assert len({r.file for r in weights_requests(hub)}) > 2
        for name in expected:
            assert torch.equal(state[name], expected.read(name))
            assert torch.equal(loaded.language_model.state_dict()[name], expected.read(name))
    # Shards serve as a base, too.
    merged({**hub_recipe, "base": "owner/full"}, "second")


def test_multimodal_specialists_from_the_hub(multimodal, recipe, merged, on_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft_tokens"))
    for name in ("base", *NAMES):
        on_hub(multimodal / name, f"owner/{name}", leave_out=["README.md"])
    # One of them has its encoder in a repository of its own.
    plain = {file.name: file.read_bytes() for file in (multimodal / "protein").glob("adapter*")}
    on_hub(plain, "owner/plain")
    encoder = on_hub(multimodal / "protein" / "modalities" / "protein", "owner/esm")
    recipe["base"] = "owner/base"
    recipe["specialists"] = {name: {"model": f"owner/{name}"} for name in NAMES}
    recipe["specialists"]["protein"] = {"model": "owner/plain", "encoder": "owner/esm"}
    recipe["probe"]["data"] = {name: str(multimodal / f"{name}.txt") for name in NAMES}
    folder = merged({**recipe, "output": {"format": "full"}})
    record = yaml.safe_load((folder / "esmerge.yaml").read_text())
    assert record["recipe"]["specialists"]["protein"]["encoder"] == f"owner/esm@{encoder}"
    on_hub(folder, "owner/mllm")
    model, processor = AutoModel.from_pretrained("owner/mllm"), MllmProcessor.from_pretrained("owner/mllm")
    loaded, _ = esmerge.load_model("owner/mllm")
    inputs = processor(text=["<mol> and <protein>?"], molecule=["CCO"], protein=["MKTAYIAK"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, loaded(**inputs).logits)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_recipe_of_a_result_takes_overrides(hub_recipe, merged, tmp_path):
    record = merged(hub_recipe) / "esmerge.yaml"
    assert load_recipe(record, ["seed=7"]).seed == 7
