"""Publishing: what arrives on a Hub is what loads from there, all of it or nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from safetensors.torch import load_file

REPO = "owner/merged"


@pytest.fixture
def merged(from_hub):
    """An adapter whose parents are on the Hub."""
    return from_hub()


@pytest.fixture
def publish(esmerge):
    """A function that publishes a folder without being asked, which must succeed, and returns the output."""

    def run(folder, *options, repo=REPO):
        code, output, error = esmerge("publish", folder, repo, "--yes", *options)
        assert code == 0, error
        return output

    return run


@pytest.fixture
def refused(esmerge, api):
    """A function that publishes a folder in vain: one sentence, exit code 2, and the repository as it was."""

    def run(folder, *options, repo=REPO):
        def state():
            return {model.id: (api.repo_info(model.id).sha) for model in api.list_models()}

        before = state()
        code, _, error = esmerge("publish", folder, repo, "--yes", *options)
        assert code == 2, error
        sentences = [line for line in error.splitlines() if line.startswith("esmerge: ")]
        assert len(sentences) == 1 and "Traceback" not in error
        assert state() == before
        return sentences[0]

    return run


def files(api, repo=REPO, revision=None):
    return set(api.list_repo_files(repo, revision=revision)) - {".gitattributes"}


def load(code):
    """What the lines that load a model give."""
    names = {}
    exec(code, names)
    return names["model"]


def lines_of(output):
    """The address and the code at the end of the output."""
    address, code = output.rsplit("\n\n", 1)
    return address.splitlines()[-1].split()[0], code


def assert_same_model(first, second):
    tensors, others = first.state_dict(), second.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    prompt = torch.arange(5, 17)[None]
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        texts = [model.generate(input_ids=prompt, **options) for model in (first, second)]
    assert torch.equal(*texts)


def test_adapter(merged, publish, api, results):
    from peft import AutoPeftModelForCausalLM

    results(merged)
    (merged / "results" / "b3db.jsonl").write_text("{}\n")
    (merged / "NOTICE").write_text("See https://lab.org/home/mol.\n")  # no path of anybody's machine
    (merged / ".DS_Store").write_bytes(b"\0")
    output = publish(merged, "--tag", "v1")
    assert "not sent: .DS_Store" in output and "not sent: results/b3db.jsonl" in output
    address, code = lines_of(output)
    assert address == f"{api.endpoint}/{REPO}"
    assert 'revision="v1"' in code
    expected = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    assert files(api) == expected - {".DS_Store", "results/b3db.jsonl"}
    assert [commit.title for commit in api.list_repo_commits(REPO)] == [
        "Publish merged, merged by esmerge",
        "initial commit",
    ]
    assert (api.repo_info(REPO, revision="v1").sha) == api.repo_info(REPO).sha
    folder = snapshot_download(REPO)
    stored = load_file(f"{folder}/adapter_model.safetensors")
    for name, tensor in load_file(merged / "adapter_model.safetensors").items():
        assert torch.equal(stored[name], tensor)
    assert_same_model(load(code), AutoPeftModelForCausalLM.from_pretrained(merged))
    card = api.model_info(REPO).card_data
    assert card.base_model == "lab/base"
    assert {result.metric_value for result in card.eval_results} == {0.8761, 0.81}


def test_nothing_new_sends_nothing(merged, publish, api, connected):
    publish(merged)
    first = api.repo_info(REPO).sha
    connected.requests.clear()
    assert "has all of this already" in publish(merged)
    assert api.repo_info(REPO).sha == first
    sent = {request.path for request in connected.requests if request.method in ("PUT", "POST")}
    assert sent == {"/api/validate-yaml"}


def test_dry_run_and_questions(merged, esmerge, api, esmerge_program, online):
    code, output, error = esmerge("publish", merged, REPO, "--dry-run")
    assert code == 0, error
    assert re.search(r"\+ adapter_model.safetensors  [\d.]+ kB", output) and "nothing was sent" in output
    assert not (merged / "README.md").exists()
    done = online(esmerge_program, "publish", merged, REPO)
    assert done.returncode == 2 and "nobody answered" in done.stderr, done.stderr
    assert not api.repo_exists(REPO)
    # Not even the card is written, be there something to send or not.
    assert esmerge("publish", merged, REPO, "--yes")[0] == 0
    (merged / "README.md").unlink()
    code, output, error = esmerge("publish", merged, REPO, "--dry-run")
    assert code == 0, error
    assert "has all of this already" in output
    assert not (merged / "README.md").exists()


def test_full_checkpoint_in_shards(connected, publish, api, make_base, make_adapter, tokenizer, tmp_path, llama):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from esmerge.pipeline import merge
    from esmerge.recipe import parse_recipe

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
    )
    make_base(config, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    specialists = {}
    for seed, name in enumerate(("molecule", "protein")):
        make_adapter(tmp_path / "base", tmp_path / name, seed, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        specialists[name] = {"model": name}
    content = {"base": "base", "specialists": specialists, "coefficients": "uniform", "output": {"format": "full"}}
    folder = tmp_path / "merged"
    merge(parse_recipe(content, tmp_path), folder, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    publish(folder)
    assert "model.safetensors" in files(api)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="12MB")
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    assert len(shards) > 1 and max((folder / name).stat().st_size for name in shards) > 10_000_000
    output = publish(folder)
    assert "- model.safetensors" in output
    assert shards < files(api) and "model.safetensors" not in files(api)
    assert_same_model(load(lines_of(output)[1]), model)
    lfs = {entry.path for entry in api.list_repo_tree(REPO) if getattr(entry, "lfs", None)}
    assert shards <= lfs


def test_mllm_with_encoders(from_hub, multimodal, publish, api):
    from esmerge import load_model

    folder = from_hub(multimodal, output={"format": "full"})
    _, code = lines_of(publish(folder))
    assert "from esmerge import load_model" in code
    there, here = load(code), load_model(folder)[0]
    assert_same_model(there, here)


def test_pull_request_merged(merged, publish, api, results):
    publish(merged)
    results(merged)
    output = publish(merged, "--pr", "--message", "Scores")
    address, code = lines_of(output)
    assert address == f"{api.endpoint}/{REPO}/discussions/1"
    assert 'revision="refs/pr/1"' in code
    assert "results/b3db.json" not in files(api)
    assert "results/b3db.json" in files(api, revision="refs/pr/1")
    assert "has all of this already" in publish(merged, "--pr", "--message", "Scores")
    results(merged, "tissue")
    assert lines_of(publish(merged, "--pr", "--message", "Scores"))[0] == address
    api.merge_pull_request(REPO, 1)
    assert "results/tissue.json" in files(api)


def test_a_draft_of_ones_own_goes_on(merged, publish, api):
    api.create_repo(REPO)
    draft = api.create_pull_request(REPO, title="The model")
    assert draft.status == "draft"
    assert lines_of(publish(merged, "--pr", "--message", "The model"))[0].endswith("/discussions/1")
    assert "adapter_model.safetensors" in files(api, revision="refs/pr/1")


def test_pull_request_to_somebody_else(merged, publish, refused, api, monkeypatch):
    publish(merged)
    monkeypatch.setenv("HF_TOKEN", "hf_othersWriteToken")
    (merged / "NOTICE").write_text("By all of us.\n")
    assert "belongs to owner" in refused(merged)
    publish(merged, "--pr")
    assert "NOTICE" in files(api, revision="refs/pr/1")
    (merged / "LICENSE").write_text("Free.\n")
    publish(merged, "--revision", "refs/pr/1")
    assert "LICENSE" in files(api, revision="refs/pr/1")
    assert not {"NOTICE", "LICENSE"} & files(api)


def test_branch_tag_and_private(merged, publish, refused, api):
    output = publish(merged, "--private", "--revision", "trial")
    assert lines_of(output)[0].endswith("/tree/trial")
    assert api.repo_info(REPO).private
    assert "adapter_model.safetensors" in files(api, revision="trial")
    assert files(api) == set()
    publish(merged, "--tag", "v1")
    publish(merged, "--tag", "v1")
    (merged / "NOTICE").write_text("New.\n")
    assert "has a tag v1 already" in refused(merged, "--tag", "v1")
    assert "v1 is a tag" in refused(merged, "--revision", "v1")


def test_an_adapter_of_a_private_base_is_of_no_use_to_others(merge, recipe, llama, publish, connected):
    connected.add(llama / "base", "owner/base", private=True)
    folder = merge({**recipe, "coefficients": "uniform"})
    options = ("--base-model", "owner/base", "--license", "apache-2.0")
    noted = "the base owner/base is private, so nobody else can load this adapter of it."
    assert noted not in publish(folder, *options, "--private", repo="owner/hidden")
    assert noted in publish(folder, *options)


def test_a_new_branch_without_new_files(merged, publish, api):
    publish(merged)
    output = publish(merged, "--revision", "v2")
    assert lines_of(output)[0].endswith("/tree/v2")
    assert "has all of this already" not in output
    assert files(api, revision="v2") == files(api)
    assert "has all of this already" in publish(merged, "--revision", "v2")


def test_paths_of_this_machine_stay_here(merge, recipe, llama, publish, refused, api, connected, tmp_path):
    connected.add(llama / "base", "lab/base")
    recipe["specialists"]["molecule"]["model"] = str(llama / "molecule")
    folder = merge({**recipe, "coefficients": "uniform"})
    assert "--base-model" in refused(folder)
    assert "lab/none is not on the Hub" in refused(folder, "--base-model", "lab/none")
    assert "lab/base is not on the Hub at v9" in refused(folder, "--base-model", "lab/base@v9")
    publish(folder, "--base-model", "lab/base", "--license", "apache-2.0")
    there = snapshot_download(REPO)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama / "base")  # the folder is as it was
    grep = subprocess.run(
        ["grep", "-RIl", "-e", str(llama), "-e", str(tmp_path), there], capture_output=True, text=True
    )
    assert grep.stdout == ""
    load(f'from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained("{REPO}")')


def test_a_published_record_does_it_again(recipe, llama, publish, esmerge, connected, tmp_path, monkeypatch):
    """With folders of its parents beside it, and not with repositories that happen to be called alike."""
    connected.add(llama / "base", "lab/base")
    project = tmp_path / "project"
    places = {"molecule": "runs/mol-lora", "protein": "runs/protein/final", "cell": "runs/cell/final"}
    shutil.copytree(llama / "base", project / "base")
    for name, place in places.items():
        shutil.copytree(llama / name, project / place)
        (project / "items" / name).mkdir(parents=True)
        shutil.copy(llama / f"{name}.txt", project / "items" / name / "test.txt")
    recipe["specialists"] = places
    recipe["probe"]["data"] = {name: f"items/{name}/test.txt" for name in places}
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert esmerge("merge", project / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")[0] == 0
    publish(tmp_path / "merged", "--base-model", "lab/base", "--license", "apache-2.0")
    there = tmp_path / "there"
    snapshot_download(REPO, local_dir=there)
    record = yaml.safe_load((there / "esmerge.yaml").read_text())
    models = {"base": "./base", "molecule": "./mol-lora", "protein": "./protein/final", "cell": "./cell/final"}
    sources = {"base": record["inputs"]["base"], **record["inputs"]["specialists"]}
    assert {name: pin["source"] for name, pin in sources.items()} == models
    items = {name: f"./probe/{name}/test.txt" for name in places}
    assert record["recipe"]["probe"]["data"] == items and set(record["inputs"]["probe"]) == set(items.values())
    assert "model: ./protein/final" in (there / "README.md").read_text()
    monkeypatch.chdir(project)  # where base and runs are, which are nothing to a record from elsewhere
    code, _, error = esmerge("merge", there / "esmerge.yaml", "-o", tmp_path / "again", "--quiet")
    assert code == 2 and f"base: the folder {there / 'base'} does not exist" in error
    for name, place in models.items():
        shutil.copytree(llama / name, there / place)
    for name, place in items.items():
        (there / place).parent.mkdir(parents=True)
        shutil.copy(llama / f"{name}.txt", there / place)
    code, _, error = esmerge("merge", there / "esmerge.yaml", "-o", tmp_path / "again", "--quiet")
    assert code == 0, error
    for file in ("adapter_model.safetensors", "coefficients.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()
    shutil.copy(llama / "cell.txt", there / items["protein"])
    code, _, error = esmerge("merge", there / "esmerge.yaml", "-o", tmp_path / "other", "--quiet")
    assert code == 2 and f"probe: {there / items['protein']} is not what it was" in error


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("NOTICE", "see /home/jane/models", "/home/jane"),
        ("NOTICE", "token hf_" + "aB3" * 12, "access token"),
        ("NOTICE", "hf_ownersWriteToken", "access token"),
        ("NOTICE", "ghp_" + "aB3" * 12, "access token"),
        ("NOTICE", "-----BEGIN RSA PRIVATE KEY-----", "access token"),
        ("generation_config.json", '{"cache": "/mnt/cluster/jane"}', "/mnt/cluster/jane"),
        ("results/b3db.json", "{}", "b3db.json"),
        ("adapter_model.safetensors", "broken", "adapter_model.safetensors"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("README.md", "---\nlicense: [\n---\n", "README.md"),
        ("README.md", "---\nwidget: {text: hi}\n---\n", '"widget" must be an array'),
    ],
)
def test_unfit_files(merged, refused, path, text, reason):
    (merged / path).parent.mkdir(exist_ok=True)
    (merged / path).write_text(text)
    assert reason in refused(merged)


def test_unfit_folders(merged, refused, from_hub, tmp_path):
    assert "no folder" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no esmerge result" in refused(tmp_path / "empty")
    with (merged / "LICENSE").open("wb") as stream:
        stream.truncate(500_000_000_001)  # sparse
    assert "500 GB" in refused(merged)
    (merged / "LICENSE").unlink()
    (merged / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refused(merged)


def test_conflicting_licences(from_hub, refused, publish, api):
    folder = from_hub(cards={"protein": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    sentence = refused(folder)
    assert "apache-2.0" in sentence and "cc-by-nc-4.0 (lab/protein)" in sentence and "--license" in sentence
    assert "mit" in refused(folder, "--license", "mti")
    publish(folder, "--license", "cc-by-nc-4.0")
    assert api.model_info(REPO).card_data.license == "cc-by-nc-4.0"


@pytest.mark.parametrize("format_", ["adapter", "full"])
def test_unknown_licence_of_the_base(from_hub, refused, publish, api, connected, format_):
    """The specialists' licence is not stated as that of the whole."""
    folder = from_hub(cards={"base": b"# A base"}, output={"format": format_})
    connected.fail(path="/lab/base/resolve/.*README.md", status=403, times=9)
    assert "the licence of lab/base is not known, as its card cannot be read" in refused(folder)
    connected.faults.clear()
    sentence = refused(folder)
    assert "the licence of lab/base is not known, as no card of it states one" in sentence and "--license" in sentence
    publish(folder, "--license", "llama3.1")
    assert api.model_info(REPO).card_data.license == "llama3.1"


@pytest.mark.parametrize(
    ("repo", "options", "reason"),
    [
        ("merged", (), "user/merged"),
        ("owner/a--b", (), "no name that the Hub accepts"),
        ("owner/x/y", (), "no name that the Hub accepts"),
        ("other/merged", (), "belongs to other"),
        (REPO, ("--pr",), "does not show"),
        (REPO, ("--pr", "--tag", "v1"), "cannot be tagged"),
        (REPO, ("--revision", "refs/pr/7"), "refs/pr/7"),
        (REPO, ("--message", " "), "--message"),
    ],
)
def test_unfit_destinations(merged, refused, repo, options, reason):
    if "refs/pr/7" in options:
        HfApi().create_repo(repo)
    assert reason in refused(merged, *options, repo=repo)


def test_tokens(merged, refused, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ownersReadToken")
    assert "can only read" in refused(merged)
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in" in refused(merged)


def test_wrong_token(merged, esmerge, monkeypatch, connected):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, error = esmerge("publish", merged, REPO, "--yes")
    assert code == 2 and "does not accept the token" in error
    assert not connected.repositories.get(("models", REPO))


def test_public_stays_public(merged, publish, refused):
    publish(merged)
    assert "is public" in refused(merged, "--private")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"method": "PUT", "status": 403, "message": "Forbidden"}, "may not write"),
        ({"method": "POST", "path": "/commit/", "status": 403, "message": "Forbidden"}, "may not write"),
        ({"method": "POST", "path": "/commit/", "status": 404, "message": "Gone"}, "does not show"),
        ({"method": "POST", "path": "/commit/", "status": 412, "message": "A commit has happened"}, "somebody else"),
        ({"method": "POST", "path": "/commit/", "status": 503, "times": 9}, "has a problem"),
        ({"method": "POST", "path": "/commit/", "drop": True, "times": 9}, "connection"),
        ({"method": "PUT", "drop": True, "times": 99, "skip": 1}, "connection"),
    ],
)
def test_failures_change_nothing_and_the_rerun_goes_on(
    merged, publish, refused, api, connected, monkeypatch, fault, reason
):
    publish(merged)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits longer before each attempt
    (merged / "NOTICE").write_text("New.\n")
    for name in ("a.png", "b.png"):
        (merged / name).write_bytes(name.encode() * 3_000_000)  # large enough to be stored apart
    connected.fail(**fault)
    assert re.search(reason, refused(merged))
    stored = {request.path for request in connected.requests if request.method == "PUT" and request.status == 200}
    connected.faults.clear()
    connected.requests.clear()
    publish(merged)
    assert {"NOTICE", "a.png", "b.png"} < files(api)
    again = {request.path for request in connected.requests if request.method == "PUT"}
    assert not stored & again


def test_an_outage_before_the_edits_there_are_known(merged, publish, refused, connected, results, monkeypatch):
    publish(merged)
    results(merged)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    connected.fail(method="HEAD", path="README", status=503, times=99)
    assert "the same command goes on" in refused(merged)
    connected.faults.clear()
    publish(merged)


def test_a_short_outage_is_not_noticed(merged, publish, api, connected):
    connected.fail(method="PUT", status=503)
    publish(merged)
    assert "adapter_model.safetensors" in files(api)


def test_somebody_pushes_meanwhile(merged, publish, refused, api, connected, monkeypatch):
    publish(merged)
    (merged / "NOTICE").write_text("Mine.\n")
    create_commit = HfApi.create_commit

    def interrupted(self, *arguments, **options):
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        theirs = [CommitOperationAdd("theirs.txt", b"theirs")]
        HfApi(endpoint=connected.endpoint).create_commit(REPO, theirs, commit_message="Theirs")
        return self.create_commit(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    with pytest.raises(AssertionError):  # the repository is not as it was, but theirs
        refused(merged)
    assert "NOTICE" not in files(api) and "theirs.txt" in files(api)
    publish(merged)
    assert {"NOTICE", "theirs.txt"} < files(api)


def test_an_edited_card_is_published_as_it_is(merged, publish):
    publish(merged)
    card = merged / "README.md"
    card.write_text(card.read_text().replace("## Limits and biases\n", "## Limits and biases\n\n- Mine.\n"))
    publish(merged)
    assert "- Mine." in Path(hf_hub_download(REPO, "README.md")).read_text()


def test_edits_on_the_hub_are_not_lost(merged, publish, refused, results, api):
    def edit(old, new):
        text = Path(hf_hub_download(REPO, "README.md")).read_text()
        assert old in text
        new_text = text.replace(old, new).encode()
        api.upload_file(path_or_fileobj=new_text, path_in_repo="README.md", repo_id=REPO)

    publish(merged)
    results(merged)
    publish(merged)  # only generated sections differ
    edit("## Limits and biases\n", "## Limits and biases\n\n- Written on the Hub.\n")
    edit("pipeline_tag: text-generation", "pipeline_tag: text-classification")
    results(merged, "tissue")
    sentence = refused(merged)
    assert "(pipeline_tag, Limits and biases)" in sentence and "hf download" in sentence
    hf_hub_download(REPO, "README.md", local_dir=merged)
    publish(merged)
    text = Path(hf_hub_download(REPO, "README.md")).read_text()
    assert "- Written on the Hub." in text and "text-classification" in text and "tissue" in text
    assert "has all of this already" in publish(merged)


def test_a_card_that_was_there_before(merged, publish, refused, api):
    api.create_repo(REPO)
    theirs = b"---\nlicense: apache-2.0\n---\n# About\n\nComing soon.\n"
    api.upload_file(path_or_fileobj=theirs, path_in_repo="README.md", repo_id=REPO)
    assert "the beginning" in refused(merged)
    hf_hub_download(REPO, "README.md", local_dir=merged)
    publish(merged)
    text = Path(hf_hub_download(REPO, "README.md")).read_text()
    assert "Coming soon." in text and "## Recipe" in text


def test_adapter_with_encoders(from_hub, multimodal, publish):
    from esmerge import load_model

    folder = from_hub(multimodal)
    address, code = lines_of(publish(folder, "--revision", "trial"))
    assert f'load_model("{REPO}@trial")' in code and address.endswith("/tree/trial")
    assert_same_model(load(code), load_model(folder)[0])


def test_the_model_is_replaced_as_a_whole(merged, publish, api):
    (merged / "modalities" / "protein").mkdir(parents=True)
    (merged / "modalities" / "protein" / "config.json").write_text('{"kind": "text", "placeholder": "<protein>"}')
    publish(merged)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="examples/notes.txt", repo_id=REPO)
    shutil.rmtree(merged / "modalities")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="added_tokens.json", repo_id=REPO)
    assert "- modalities/protein/config.json" in publish(merged)
    assert not {"modalities/protein/config.json", "added_tokens.json"} & files(api)
    assert "examples/notes.txt" in files(api)


def test_another_model_is_not_replaced_silently(merged, esmerge, connected, esmerge_program, online, llama):
    warning = f"{REPO} holds another model, whose files this replaces"
    connected.add(llama / "base", REPO)
    code, output, _ = esmerge("publish", merged, REPO, "--dry-run")
    assert code == 0 and f"warning: {warning}" in output
    unanswered = online(esmerge_program, "publish", merged, REPO)
    assert unanswered.returncode == 2 and warning in unanswered.stdout and "nobody answered" in unanswered.stderr
    code, output, error = esmerge("publish", merged, REPO, "--yes")
    assert code == 0 and warning in output
    warnings = [line.partition(": config.json")[0] for line in error.splitlines() if "WARNING" in line]
    assert warnings == [f"esmerge: WARNING: {warning}"]
    settings = json.loads((merged / "tokenizer_config.json").read_text())
    (merged / "tokenizer_config.json").write_text(json.dumps(settings))
    code, output, error = esmerge("publish", merged, REPO, "--yes")  # what is there now is a result of ours
    assert code == 0 and "~ tokenizer_config.json" in output and "another model" not in output + error
    connected.add({"LICENSE": b"Free."}, "owner/second")
    code, output, error = esmerge("publish", merged, "owner/second", "--yes")
    assert code == 0 and "another model" not in output + error


def test_tokenizer_with_code_of_its_own(merged, publish, api, online):
    settings = json.loads((merged / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (merged / "tokenizer_config.json").write_text(json.dumps(settings))
    (merged / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (merged / "folder").mkdir()
    (merged / "folder" / "other.py").write_text("")
    _, code = lines_of(publish(merged))
    assert "own.py" in files(api) and "folder/other.py" not in files(api)
    assert "trust_remote_code=True" in code
    load_tokenizer = "from transformers import AutoTokenizer\nprint(AutoTokenizer.from_pretrained("
    load_tokenizer += f"{REPO!r}, trust_remote_code=True))"
    done = online(sys.executable, "-c", f"{code}\n{load_tokenizer}")
    assert done.returncode == 0 and "OwnTokenizer" in done.stdout, done.stderr
